"""Bugs about engines that lend what they serve, for ``plant`` to plant."""

from typing import Final

from plant import Mutant

_FEEDS: Final = "core/membership/feeds.py"
_LENDING: Final = "core/round/lending.py"
_STANDBY: Final = "core/standby.py"
_JUDGE: Final = "core/round/judge.py"
_REPORTS: Final = "core/round/reports.py"
_TESTS: Final = (
    "tests/unit/core/round/test_lending.py",
    "tests/unit/core/membership/test_feeds.py",
    "tests/sim/test_lending.py",
)

_RENEWED: Final = ("tests/unit/core/membership/test_renewals.py", "tests/sim/test_lending.py")
_RELAYS: Final = "core/round/relays.py"
_RELAYED: Final = ("tests/unit/core/round/test_relays.py", "tests/sim/test_relays.py")

LENDING: Final = (
    Mutant(
        "who takes is blamed for a seed that writes nothing",
        _REPORTS,
        "    everybody = current.remaining() if alone else phases.about(current)\n",
        "    everybody = current.remaining() if current.wave else phases.about(current)\n",
        _RELAYED,
    ),
    Mutant(
        "what stands by is written on before it is verified",
        _STANDBY,
        " == (current.version, verified.digest)\n",
        " == (current.version, status.standby_digest)\n",
        _RELAYED,
    ),
    Mutant(
        "a round with engines that stand still has two waves",
        _RELAYS,
        ' or any(standby.lands(fleet, name) == "live" for name in engines):\n',
        ":\n",
        _RELAYED,
    ),
    Mutant(
        "who takes from an engine that is out is left behind",
        _REPORTS,
        "    if orphans := current.orphans():\n",
        "    if orphans := []:\n",
        _RELAYED,
    ),
    Mutant(
        "what fails between engines is not taken from the trainer",
        _REPORTS,
        "        if name in current.lenders and current.lending:\n",
        "        if name in current.lenders and current.catch_up:\n",
        _RELAYED,
    ),
    Mutant(
        "engines decide before the others have taken it",
        "core/round/phases.py",
        "        if row.again and not current.wave and any(map(current.relays_to, current.remaining())):\n",
        "        if False:\n",
        _RELAYED,
    ),
    Mutant(
        "a lost engine's writes are forgotten on its own machine",
        "core/membership/members.py",
        'target.hello.boot not in ("", pending.boot)\n',
        'target.hello.boot != ""\n',
        _RELAYED,
    ),
    Mutant(
        "another endpoint keeps out a writer that shares its memory",
        "core/membership/members.py",
        "        if (spared and reached) or ",
        "        if reached or ",
        _RENEWED,
    ),
    Mutant(
        "a writer that has gone is never given up",
        "core/membership/renewals.py",
        "            if may_wake(",
        "            if not may_wake(",
        _RENEWED,
    ),
    Mutant(
        "who has a spare is asked for another endpoint alone",
        "core/membership/renewals.py",
        "spare=lost.wakes))",
        "spare=False))",
        _RENEWED,
    ),
    Mutant(
        "a spare is taken before a new process could prove the end of the old one",
        "core/membership/renewals.py",
        " if lost.hangs and not lost.wakes else ",
        " if lost.hangs or lost.wakes else ",
        _RENEWED,
    ),
    Mutant(
        "what was lent is not compared with what was decided",
        _JUDGE,
        '"engine") if digest != owed else None\n',
        '"engine") if False else None\n',
        _TESTS,
    ),
    Mutant(
        "an engine lends what it does not serve",
        _STANDBY,
        "    whole = agent.status.whole == version\n",
        "    whole = agent.status.whole is not None\n",
        _TESTS,
    ),
    Mutant(
        "a torn engine lends",
        _STANDBY,
        "    whole = agent.status.whole == version\n",
        "    whole = agent.status.applied == version and agent.status.window is None\n",
        _TESTS,
    ),
    Mutant(
        "an engine within a writer's reach lends",
        _LENDING,
        "    if fleet.tainted(name):\n",
        "    if False:\n",
        _TESTS,
    ),
    Mutant(
        "an engine lends to one that holds other boxes",
        _LENDING,
        " and [agent.contents for agent in fleet.ranks_of(name)] == wanted\n",
        "\n",
        _TESTS,
    ),
    Mutant(
        "a lender of which nothing came is asked again at once",
        _LENDING,
        "        alike = name != engine and now >= until and ",
        "        alike = name != engine and ",
        _TESTS,
    ),
    Mutant(
        "what a lender wrote hangs for good",
        _FEEDS,
        "            rest = _rest(turn.fleet, agent)\n",
        "            rest = NOTHING\n",
        _TESTS,
    ),
    Mutant(
        "a lender that changes meanwhile goes on lending",
        "core/machine.py",
        "        rounds.status_changed(turn, agent)\n",
        "",
        _TESTS,
    ),
    Mutant(
        "a writer of an engine is taken for a trainer's after a restart",
        "core/machine.py",
        '_named("inference" if taint.engine else "trainer", writer)',
        '_named("trainer", writer)',
        _TESTS,
    ),
    Mutant(
        "engines lend while a new version waits for them",
        _REPORTS,
        '        give_up(turn, current, Trouble(newer, "engine"))\n',
        "        pass\n",
        _TESTS,
    ),
    Mutant(
        "a borrower does not get the trainer's edges back",
        "core/membership/rendezvous.py",
        "    borrowing = fleet.feed.borrowers if fleet.feed is not None and fleet.feed.plan is not None else {}\n",
        "    borrowing = {name: name for name in fleet.engines if fleet.feed_number}\n",
        _TESTS,
    ),
    Mutant(
        "half of a pair borrows",
        _FEEDS,
        "    units = [unit for unit in late.values() if all(other in found for other in unit)]\n",
        "    units = [[name] for name in late]\n",
        _TESTS,
    ),
    Mutant(
        "the trainer writes what is lent",
        "core/conditions.py",
        "        lent = fleet.feed.borrowers if fleet.feed is not None else {}\n",
        "        lent = {}\n",
        _TESTS,
    ),
)
