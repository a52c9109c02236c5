"""The bugs that ``plant`` plants: each one somebody could make, and breaks a promise of the protocol."""

from typing import Final

from plant import BAD_ENGINE, Mutant
from planted_engines import ENGINES
from planted_holds import HOLDS
from planted_lending import LENDING
from planted_shadows import SHADOWS

_MEMBERS: Final = "core/membership/members.py"
_ADMIT: Final = "core/membership/admission.py"
_MEMORY: Final = "core/memory.py"
_ENGINES: Final = "core/membership/engines.py"
_MACHINE: Final = "core/machine.py"
_STATE: Final = "core/state.py"
_CONDITIONS: Final = "core/conditions.py"
_ENTRY: Final = "core/round/entry.py"
_JUDGE: Final = "core/round/judge.py"
_REPORTS: Final = "core/round/reports.py"
_PROGRESS: Final = "core/round/progress.py"
_PHASES: Final = "core/round/phases.py"
_ENDINGS: Final = "core/round/endings.py"
_WAITS: Final = "core/round/waits.py"
_TABLE: Final = "core/round/transitions.py"
_RENEWALS: Final = "core/membership/renewals.py"
_ROSTER: Final = "core/membership/roster.py"
_OUTBOX: Final = "daemon/outbox.py"
_PLANNING: Final = "daemon/planning.py"
_EDGES: Final = "protocol/edges.py"

_TAINTS: Final = (
    Mutant(
        "taint cleared by one restarted target",
        _MEMBERS,
        '            if not pending.targets:\n                grant_over(turn, writer, name, "all',
        '            if True:\n                grant_over(turn, writer, name, "all',
    ),
    Mutant(
        "what hangs on its way to an engine keeps it out of all rounds",
        _MACHINE,
        "    renewals.evaluate(turn)\n",
        "",
    ),
    Mutant(
        "a renewed endpoint does not change the fingerprint",
        _EDGES,
        "peer.incarnation, peer.endpoint_name) for",
        "peer.incarnation) for",
        (BAD_ENGINE,),
    ),
    Mutant(
        "the planner's fingerprint is not of where peers are reached",
        _PLANNING,
        "reached_fingerprint(part.fingerprint, peers)",
        "reached_fingerprint(part.fingerprint, ())",
        ("tests/unit/daemon/test_planning.py",),
    ),
    Mutant(
        "another endpoint again and again",
        _RENEWALS,
        "Renewal(turn.now + known.wait, ",
        "Renewal(turn.now, ",
    ),
    Mutant(
        "an edge that hangs costs the patience of all",
        _MACHINE,
        "            rounds.edges_changed(turn, agent)\n",
        "",
    ),
    Mutant(
        "taint cleared by a newer process anywhere",
        _STATE,
        "return same_place and hello.incarnation != self.incarnation",
        "return hello.incarnation != self.incarnation",
    ),
    Mutant(
        "taint cleared by a process of a host that does not say its boot",
        _STATE,
        "same_place = bool(self.boot) and ",
        "same_place = ",
    ),
    Mutant(
        "taint cleared by CLOSED towards one peer",
        _MEMBERS,
        "    if message.final or not pending.targets:\n",
        "    if message.final or message.peers:\n",
    ),
    Mutant(
        "taint kept although its writer, which was replaced, says that it has closed",
        _MEMBERS,
        "    _close_grants(turn, event.member, hello)\n    objection",
        "    objection",
    ),
    Mutant(
        "granted to writers of whom one has no connection",
        _PHASES,
        "        if row.needs_writers and ",
        "        if False and ",
    ),
    Mutant(
        "taint forgotten at the end of a round",
        _MEMORY,
        "    memory.unclosed |= {(writer, record.round): taint for writer, taint in record.unclosed.items()}\n",
        "",
    ),
    Mutant(
        "taint of an open round forgotten by a restart",
        _MACHINE,
        "unclosed=orphan.writers if torn else {}",
        "unclosed={}",
    ),
    Mutant(
        "taint that is over comes back with a restart", _MEMORY, "memory.unclosed.pop((writer, name), None)", "pass"
    ),
    Mutant("an engine within reach of a late writer takes part", _CONDITIONS, " and not fleet.tainted(name)", ""),
    Mutant(
        "a grant given before the journal knows",
        _PHASES,
        "waits.not_quiesced, Phase.MARKING",
        "waits.not_quiesced, Phase.WRITING",
    ),
    Mutant(
        "writers are not told whom to spare",
        _ENTRY,
        "    if current.granted:\n        for writer",
        "    if False:\n        for writer",
    ),
    Mutant(
        "another configuration changes no member",
        _ROSTER,
        "    return fleet.policy, [*memory.admitted",
        "    return None, [*memory.admitted",
    ),
    Mutant(
        "an engine that is forgotten stays a member",
        _ROSTER,
        "[*memory.forgotten_engines], [*fleet.engines]\n",
        "[], [*fleet.engines]\n",
    ),
    Mutant(
        "an engine that leaves within a round stays a member",
        _ROSTER,
        "    if len(fleet.engines) == len(wanted):\n",
        "    if True:\n",
    ),
    Mutant(
        "who is told to stop first follows from hashes",
        _ENTRY,
        "    gone = dict.fromkeys(names)\n",
        "    gone = set(names)\n",
        ("tests/sim/test_traces.py",),
    ),
)

_COMMIT: Final = (
    Mutant(
        "a commit told before it is durable",
        _ENTRY,
        "    # In this order: a round that has ended",
        "    from weightsync.orchestrator.protocol.messages import Outcome\n\n"
        "    for agent in turn.fleet.trainers():\n"
        "        turn.send(agent.member, Outcome(version=current.version, committed=True, sequence=sequence))\n"
        "    # In this order: a round that has ended",
    ),
    Mutant(
        "RoundEnded before Committed",
        _ENTRY,
        "    turn.append_and_wait(Committed(round=current.name, version=current.version, sequence=sequence))\n"
        '    turn.append(summary(turn, current, "committed"))',
        '    turn.append(summary(turn, current, "committed"))\n'
        "    turn.append_and_wait(Committed(round=current.name, version=current.version, sequence=sequence))",
    ),
    Mutant(
        "commands leave before the record in front of them is durable",
        _OUTBOX,
        "                await self._append([command for command in commands if isinstance(command, Append)])\n",
        "                append = self._append([command for command in commands if isinstance(command, Append)])\n"
        "                self._inbox.spawn(append, 'append')\n",
        ("tests/unit/daemon/test_outbox.py",),
    ),
    Mutant(
        "a restart forgets that a round was decided",
        _MACHINE,
        "        _end_orphan(turn, orphan.decided,",
        "        _end_orphan(turn, False,",
    ),
    Mutant("a restart keeps the epoch", _MACHINE, "memory, memory.epoch + 1, now", "memory, memory.epoch, now"),
    Mutant("the order of commits stands still", _MEMORY, "            memory.sequence = sequence\n", ""),
    Mutant(
        "a catch-up counts as a commit",
        _ENTRY,
        "memory.sequence if current.catch_up else memory.sequence + 1",
        "memory.sequence + 1",
    ),
    Mutant(
        "a right is given unlooked at",
        "core/turn.py",
        "        invariants.commanded(self.fleet, command)\n",
        "",
    ),
    Mutant("invariants not called", _MACHINE, "    invariants.check(fleet, before, turn.commands)\n", ""),
    Mutant(
        "decided without a look at the digests",
        _PHASES,
        'entry.verify, lambda p: p.verify, waits.not_verified, Phase.DECIDING, "engine", judge.verified',
        'entry.verify, lambda p: p.verify, waits.not_verified, Phase.DECIDING, "engine"',
    ),
    Mutant(
        "digests not compared",
        _JUDGE,
        "if report.digest != digest or report.bytes != size:",
        "if report.bytes != size:",
    ),
    Mutant(
        "sizes not compared",
        _JUDGE,
        "if report.digest != digest or report.bytes != size:",
        "if report.digest != digest:",
    ),
    Mutant(
        "bytes of an edge not compared with the plan's",
        _JUDGE,
        "    if sent.bytes != owed:\n",
        "    if owed is None:\n",
    ),
    Mutant("a writer that could not write believed", _JUDGE, "    if writer in current.failed:\n", "    if False:\n"),
    Mutant(
        "the last writer's digest counts alone",
        _ENTRY,
        "(add_digests(digest, sent.digest), size + sent.bytes)",
        "(sent.digest, sent.bytes)",
    ),
    Mutant(
        "verified while a writer still writes",
        _PROGRESS,
        "        return writer in self.final or not any(",
        "        return bool(done) or not any(",
    ),
    Mutant(
        "FAILED while engines are torn by it",
        _ENDINGS,
        "    if tears or fleet.torn_by(current.version):\n        return\n",
        "",
    ),
    Mutant("a failed version begun again", "core/versions.py", " and version not in turn.fleet.memory.failed:", ":"),
)

_SERVING: Final = (
    Mutant(
        "pairs ignored",
        _STATE,
        "return [name for name, other in self.engines.items() if other.pair == pair] if pair else [engine]",
        "return [engine]",
    ),
    Mutant(
        "torn memory left as if nothing were written",
        _ENTRY,
        "        torn = current.granted and not current.engines[name].shadow\n",
        "        torn = False\n",
    ),
    Mutant(
        "a resume that means whoever is there",
        _ENGINES,
        "return tuple((agent.member.rank, agent.hello.incarnation) for agent in fleet.ranks_of(name))",
        "return ()",
    ),
    Mutant("any version may serve", _ENGINES, "    if version != memory.committed:\n", "    if False:\n"),
    Mutant(
        "one that serves another version is not paused",
        _ENGINES,
        "if want is Wish.PAUSE and engine.paused is False and not",
        "if False and not",
    ),
    Mutant("a paused engine is not resumed", _ENGINES, "if want is Wish.SERVE and engine.paused and", "if False and"),
    Mutant(
        "an engine is what it was when a call to it failed",
        _ENGINES,
        "            engine.paused = None  # whether it had its effect is to be seen\n",
        "            pass\n",
    ),
    Mutant("one that the operator holds serves", _ENGINES, "    if name in memory.holds:\n", "    if False:\n"),
    Mutant(
        "a hold is forgotten by a restart",
        _MEMORY,
        "                keep_newest(memory.holds, engine, reason, REMEMBERED_WISHES)\n",
        "                pass\n",
    ),
    Mutant(
        "finished as soon as one worker is out",
        _WAITS,
        "    return all(each is not None",
        "    return any(each is not None",
    ),
    Mutant(
        "finished before the workers are out",
        _ENTRY,
        "        if not waits.applied(current, name):\n",
        "        if False:\n",
    ),
    Mutant(
        "together without patience",
        _PHASES,
        "current.phase is Phase.SWITCHING and fleet.policy.together and",
        "False and",
    ),
    Mutant(
        "after the decision one waits for all",
        _ENTRY,
        "current.remaining() if turn.fleet.policy.together else",
        "current.remaining() if True else",
    ),
)

_BLAME: Final = (
    Mutant(
        "a worker that leaves in the middle is not missed",
        _TABLE,
        "    _P.VERIFYING: {**_WRITTEN,",
        "    _P.VERIFYING: {**_WRITTEN, _R.LEFT: _A.ignore,",
    ),
    Mutant(
        "patience without end",
        _PHASES,
        "turn.now - current.first_done >= turn.fleet.policy.patience",
        "turn.now - current.first_done >= 1e9",
    ),
    Mutant("too few engines commit", _REPORTS, "    if here < current.quorum:\n", "    if not here:\n"),
    Mutant("one bad engine costs the round", _REPORTS, "    if here < current.quorum:\n", "    if True:\n"),
    Mutant("nobody remembers who failed", "core/round/blame.py", "    state.failures += 1\n", ""),
    Mutant(
        "who failed once is never trusted again",
        "core/round/blame.py",
        "    state.failures, state.retry_at, state.blame, state.blamed_at = 0, 0.0, NO_TROUBLE, 0.0\n",
        "    pass\n",
    ),
    Mutant(
        "who failed is in everybody's round",
        _CONDITIONS,
        "    return any(fleet.engines[other].failures for other in fleet.unit(name))\n",
        "    return False\n",
    ),
    Mutant(
        "a member that is gone is waited for",
        _REPORTS,
        "turn.now >= since + turn.fleet.policy.heartbeat:",
        "turn.now >= since + 1e9:",
    ),
)

_CONNECTIONS: Final = (
    Mutant(
        "words of a replaced connection are heard",
        _MACHINE,
        "    if agent is None or agent.connection != event.connection:\n        return  # of a connection",
        "    if agent is None:\n        return  # of a connection",
    ),
    Mutant(
        "the answer to an older call counts",
        _MACHINE,
        "engine is None or engine.calls.get(event.call) != event.number:",
        "engine is None or event.call not in engine.calls:",
    ),
    Mutant(
        "another process taken for a member of the round",
        _REPORTS,
        "    if agent.hello.incarnation != known:\n",
        "    if False:\n",
    ),
    Mutant(
        "a grant that was lost is not told again",
        _REPORTS,
        "            entry.grant_to(turn, current, member)\n",
        "            pass\n",
    ),
    Mutant(
        "a Verify that was lost is not told again",
        _REPORTS,
        "        entry.ask_to_verify(turn, current, member)\n",
        "        pass\n",
    ),
    Mutant(
        "a Connect that was lost is not told again",
        _STATE,
        "        self.lends, self.unlent = before.lends, before.unlent\n",
        "        self.lends, self.unlent, self.delivered = before.lends, before.unlent, before.delivered\n",
    ),
    Mutant(
        "an outdated confirmation counts",
        "core/membership/rendezvous.py",
        "    if message.fingerprint == agent.delivered:\n",
        "    if message.fingerprint != agent.lends_delivered:\n",
    ),
    Mutant(
        "a restart forgets which trainer was replaced",
        _MEMORY,
        "            keep_newest(memory.generations, generation, None, REMEMBERED_GENERATIONS)\n",
        "            pass\n",
    ),
    Mutant(
        "who is connected is declared dead",
        "core/operator.py",
        "        if here is not None and here.hello.incarnation == pending.incarnation:\n",
        "        if False:\n",
    ),
    Mutant(
        "a worker is written to before it knows",
        _PHASES,
        "waits.not_durable, Phase.EXPOSING, ",
        "waits.not_durable, Phase.WRITING, ",
    ),
    Mutant(
        "who was thrown out counts as connected",
        _REPORTS,
        "        turn.fleet.leave(agent.member)  # of",
        "        # of",
    ),
    Mutant(
        "a trainer that was replaced is taken in again",
        _MEMBERS,
        "        if fleet.memory.was_replaced(hello.generation):\n",
        "        if False:\n",
    ),
    Mutant(
        "an agent's later epoch is not overtaken",
        _MEMBERS,
        "    if _obeyed_another(fleet, hello):\n        fleet.epoch",
        "    if False:\n        fleet.epoch",
    ),
    Mutant("a worker that returns is not let out", _MEMBERS, "        if final is not None:\n", "        if False:\n"),
    Mutant(
        "any STABLE of the step is believed",
        _CONDITIONS,
        "s.step == version.step and s.generation in (None, version.generation)",
        "s.step == version.step",
    ),
)

_ADMISSION: Final = (
    Mutant(
        "an engine of any name is admitted",
        _ADMIT,
        "    if not any(fnmatchcase(engine.name, pattern) for pattern in admission.names):\n",
        "    if False:\n",
    ),
    Mutant(
        "any URL is called",
        _ADMIT,
        "        if not may_be_at(admission, host_of(url)):\n",
        "        if False:\n",
    ),
    Mutant(
        "more engines than at most are admitted",
        _ADMIT,
        "len(others) < admission.at_most:",
        "len(others) >= 0:",
    ),
    Mutant(
        "a forgotten engine is admitted again",
        _ADMIT,
        "    if (over := memory.forgotten_engines.get(engine.name)) is not None:\n",
        "    if (over := memory.forgotten_engines.get(engine.name)) == 0:\n",
    ),
    Mutant(
        "an engine takes the name of one that lives",
        _ADMIT,
        " and _lives(fleet, engine.name, now):\n",
        " and False:\n",
    ),
    Mutant(
        "an engine takes the server of one that lives",
        _ADMIT,
        "        if _lives(fleet, other, now):\n",
        "        if False:\n",
    ),
    Mutant(
        "an admitted engine that is gone stays a member",
        _ADMIT,
        "        if turn.now >= engine.heard + limit:\n",
        "        if False:\n",
    ),
    Mutant(
        "a configuration that admits an engine no longer keeps it",
        _MACHINE,
        "            admission.configured_anew(turn)\n",
        "",
    ),
    Mutant(
        "an admitted engine is unknown to the next daemon",
        _ADMIT,
        "        turn.append(EngineAdmitted(engine=engine))\n",
        "        fleet.memory.admitted[engine.name] = engine\n",
    ),
    Mutant(
        "an engine may say where another host is",
        "daemon/admin/applications.py",
        "        await self._check_peer(engine, address)\n",
        "",
        ("tests/unit/daemon/admin/test_applications.py",),
    ),
)

PLANTED: Final = (
    *_TAINTS,
    *_COMMIT,
    *_SERVING,
    *_BLAME,
    *_CONNECTIONS,
    *_ADMISSION,
    *SHADOWS,
    *LENDING,
    *ENGINES,
    *HOLDS,
)
