"""Bugs about engines that land beside what they serve, for ``plant`` to plant."""

from typing import Final

from plant import Mutant

_CONDITIONS: Final = "core/conditions.py"
_ENGINES: Final = "core/membership/engines.py"
_ENTRY: Final = "core/round/entry.py"
_REPORTS: Final = "core/round/reports.py"
_STANDBY: Final = "core/standby.py"
_WAITS: Final = "core/round/waits.py"
_KEPT: Final = ("tests/unit/core/round/test_entry_kept.py", "tests/sim/test_kept.py")
_AHEAD: Final = ("tests/unit/core/test_versions_ahead.py", "tests/sim/test_ahead.py")

SHADOWS: Final = (
    Mutant(
        "a switch before the decision is durable",
        _ENTRY,
        "    _note_same_bytes(turn, current.version, digests)\n",
        "    _note_same_bytes(turn, current.version, digests)\n    switch(turn, current)\n",
    ),
    Mutant(
        "a switch believed before the audit",
        _WAITS,
        "    return all_hold(current, engine) and current.engines[engine].call_over\n",
        "    return current.engines[engine].call_over\n",
    ),
    Mutant(
        "a worker that is torn after its switch is resumed",
        _REPORTS,
        "    if has_left and agent.status.whole != current.version:\n",
        "    if False:\n",
    ),
    Mutant(
        "a standby is remembered after it was exposed",
        _REPORTS,
        "                _stands_by(turn, current, member, None, NO_BYTES)\n",
        "",
    ),
    Mutant(
        "a standby believed by its name",
        _STANDBY,
        "    return status.standby if (status.standby, hex_digest(status.standby_digest)) in decided else None\n",
        "    return status.standby if status.standby in dict(decided) else None\n",
    ),
    Mutant(
        "a rollback that the journal does not count",
        _ENTRY,
        "memory.sequence if current.catch_up else",
        "memory.sequence if current.catch_up or current.rollback else",
    ),
    Mutant(
        "a rollback to what was never committed",
        "core/round/rollback.py",
        "    return version if version in fleet.memory.done and version",
        "    return version if version",
    ),
    Mutant(
        "a shadow engine marked torn",
        _ENTRY,
        "        torn = current.granted and not current.engines[name].shadow\n",
        "        torn = current.granted\n",
    ),
    Mutant(
        "a shadow engine paused from the beginning",
        _ENTRY,
        "        if not progress.serves_on:\n",
        "        if True:\n",
    ),
    Mutant(
        "a shadow engine that serves an older version serves on",
        _STANDBY,
        ' != "live" and fleet.version_of(name) == committed for',
        ' != "live" for',
    ),
    Mutant(
        "ranks that meet others switch while they serve",
        _ENTRY,
        "not (progress.boundary and others == [name])",
        "others != [name]",
    ),
    Mutant(
        "a pair switches one after the other",
        _ENTRY,
        "    if all(current.engines[other].paused for other in others if other != name):\n",
        "    if True:\n",
    ),
    Mutant(
        "what is decided waits for a trainer",
        _ENGINES,
        "    if _may_switch(turn, name) and standby.owed(fleet, name):\n",
        "    if False:\n",
    ),
    Mutant(
        "what a late writer reaches is switched to",
        _STANDBY,
        '    if mode == "copy" and fleet.tainted(engine):\n',
        "    if False:\n",
    ),
    Mutant(
        "a switch without effect is repeated for ever",
        _CONDITIONS,
        "not engine.error and not tried and ",
        "not engine.error and ",
    ),
    Mutant(
        "a catch-up that hangs keeps new versions from all",
        _REPORTS,
        "    elif newer or phases.is_impatient(turn, current):\n",
        "    elif phases.is_impatient(turn, current):\n",
    ),
    Mutant(
        "a catch-up that hangs keeps others from catching up",
        "core/round/phases.py",
        "    keeps_another = current.keeps_another and ",
        "    keeps_another = False and ",
        ("tests/sim/test_one_bad_engine.py",),
    ),
    Mutant(
        "a version is decided before it is published",
        _WAITS,
        "    if current.ahead:\n",
        "    if False:\n",
        _AHEAD,
    ),
    Mutant(
        "a round runs ahead with engines that stand still for it",
        _CONDITIONS,
        "name in taking and standby.serves_on(fleet, name) and",
        "name in taking and",
        _AHEAD,
    ),
    Mutant(
        "a round runs ahead without an engine that is busy for a moment",
        _CONDITIONS,
        "name in taking and standby.serves_on(fleet, name) and not unready(fleet, name) for name in wished",
        "standby.serves_on(fleet, name) for name in taking",
        _AHEAD,
    ),
    Mutant(
        "engines are late with what is still being converted",
        _REPORTS,
        "    if turn.fleet.round is not current or current.awaits_trainer:\n",
        "    if turn.fleet.round is not current:\n",
        _AHEAD,
    ),
    Mutant(
        "what the trainer gives up is an engine's fault",
        "core/machine.py",
        "            versions.tend_ahead(turn)  # before its CLOSED, which is no engine's fault\n",
        "",
        _AHEAD,
    ),
    Mutant(
        "a round waits for a version that is given up",
        "core/versions.py",
        "        if conditions.held_by(fleet, agent) != version:\n",
        "        if False:\n",
        _AHEAD,
    ),
    Mutant(
        "an engine catches up from slots that are being filled",
        "core/machine.py",
        "            agent.staged, agent.converting = None, message.version\n",
        "            agent.converting = message.version\n",
        _AHEAD,
    ),
    Mutant(
        "what is kept of another staging is served",
        _STANDBY,
        "(known.version, known.restaged) != (version, fleet.memory.restaged.get(version, 0)):\n",
        "known.version != version:\n",
        _KEPT,
    ),
    Mutant(
        "what is kept is believed before it is verified",
        _STANDBY,
        "    return known if held == owed and not",
        "    return known if not",
        _KEPT,
    ),
    Mutant(
        "what is partly there is kept",
        _ENTRY,
        " or not judge.whole(current, name):\n",
        ":\n",
        _KEPT,
    ),
    Mutant(
        "what was written ahead is kept",
        _ENTRY,
        "        if current.ahead or not progress.shadow or not judge",
        "        if not progress.shadow or not judge",
        _KEPT,
    ),
    Mutant(
        "who lends what it serves keeps what it packs that over",
        "core/round/begin.py",
        '        if writer.role == "inference" and catch_up:\n',
        "        if False:\n",
        _KEPT,
    ),
)
