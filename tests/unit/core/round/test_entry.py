"""What the phases command, to whom, and how often."""

from typing import Any

import pytest
from fleets import BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core.commands import Say
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.core.records import LiveDirty, RoundEnded, Taint
from weightsync.orchestrator.core.round import entry
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Commit, EngineStatus, Grant, Left, Quiesced, Verify
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.traces.context import child, of_version

TRAINER = trainer()


def committed(*engines: str, drive: Any, pairs: Any = ()) -> Any:
    """A fleet that serves version 1 and is inside the round for version 2, its workers in the update call."""
    fleet = drive(engines, pairs)
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    fleet.stage(2)
    fleet.settle()
    fleet.to(Phase.QUIESCING)
    for member in fleet.ranks_of():
        fleet.says(member, Quiesced(round=fleet.round.name))
    assert fleet.round.phase is Phase.MARKING
    return fleet


def leaves(fleet: Any, going: Any, engine: str, **status: Any) -> None:
    """Every worker of the engine leaves the update call, and the call ends."""
    for member in fleet.ranks_of(engine):
        fleet.says(member, Left(round=going.name, status=EngineStatus(**status)))
    fleet.fails(engine, Call.UPDATE, "aborted")


def test_agents_get_the_shorter_deadline(drive: Any) -> None:
    fleet = drive(options={"transfer": 50.0, "verify": 20.0})
    fleet.to(Phase.VERIFYING)
    assert [grant.deadline_seconds for grant in fleet.sent(TRAINER, Grant)] == [50.0 * AGENT_SHARE]
    for member in fleet.ranks_of():
        assert [word.deadline_seconds for word in fleet.sent(member, Verify)] == [20.0 * AGENT_SHARE]


def test_the_journal_knows_the_writers_and_their_reach_before_the_grant(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.MARKING)
    taint = Taint(100, "", "", {"e0/0": 100, "e0/1": 101})
    assert fleet.written()[-1] == LiveDirty(round=going.name, writers={"trainer/0": taint})
    assert fleet.sent(TRAINER, Grant) == []


def test_each_worker_is_expected_to_hold_what_was_sent_to_it(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.VERIFYING)
    assert going.expected == dict.fromkeys(fleet.ranks_of("e0", "e1"), ((11, 13), BYTES_PER_EDGE))


def test_every_worker_is_let_out_with_the_version(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.SWITCHING)
    for member in fleet.ranks_of():
        assert fleet.sent(member, Commit) == [Commit(round=going.name, version=going.version, trace=going.trace)]


def test_everybody_is_told_that_a_torn_round_is_over(drive: Any) -> None:
    """At once: what the workers hold counts as torn, whatever is still written."""
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    fleet.says(TRAINER, fleet.closed(peers=(), final=False, error="the device is gone", retry=False))
    assert fleet.fleet.round is None
    assert going.reason == "trainer/0 could not write: the device is gone"
    (stop,) = fleet.sent(TRAINER, Abort)
    assert (stop.torn, set(stop.members)) == (True, set(fleet.ranks_of("e0", "e1")))
    for member in fleet.ranks_of("e0", "e1"):
        assert fleet.sent(member, Abort) == [Abort(round=going.name, torn=True, reason=going.reason)]
    assert [state.torn_by for state in fleet.fleet.engines.values()] == [going.version] * 2


def test_every_engine_of_a_cancelled_round_is_resumed_at_once(drive: Any) -> None:
    """Each as soon as its own workers are out; with what it had."""
    fleet = committed("e0", "e1", drive=drive)
    going = fleet.round
    before = {name: fleet.called(name, Call.RESUME) for name in ("e0", "e1")}
    gone(fleet)
    assert fleet.fleet.round is None
    for member in fleet.ranks_of():
        assert fleet.sent(member, Abort) == [Abort(round=going.name, torn=False, reason="trainer/0 was lost: reset")]
    for done, name in enumerate(("e0", "e1"), start=1):
        leaves(fleet, going, name, applied=fleet.fleet.memory.committed)
        fleet.passes(fleet.policy.probe_interval)  # the update call has failed: what it has left is looked at first
        fleet.settle()
        assert [fleet.called(n, Call.RESUME) - before[n] for n in ("e0", "e1")] == [1, done - 1]
    ended = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert (ended.outcome, ended.reason, ended.fault) == ("failed", "trainer/0 was lost: reset", "trainer")


def gone(fleet: Any) -> None:
    """The trainer's connection ends, for longer than a reconnect takes."""
    fleet.loses(TRAINER)
    fleet.passes(fleet.policy.heartbeat)


def test_an_engine_that_holds_nothing_committed_is_not_resumed_by_a_cancelled_round(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.QUIESCING)
    gone(fleet)
    leaves(fleet, going, "e0")
    fleet.passes(fleet.policy.probe_interval)
    fleet.settle()
    assert fleet.fleet.round is None
    assert fleet.called("e0", Call.RESUME) == 0


@pytest.mark.parametrize("last", ["e0", "e1"])
def test_a_pair_leaves_a_cancelled_round_together(drive: Any, last: str) -> None:
    """A prefill engine that serves while its decode engine is paused has nobody to hand over to."""
    fleet = committed("e0", "e1", "e2", drive=drive, pairs=(("e0", "e1"),))
    going = fleet.round
    before = {name: fleet.called(name, Call.RESUME) for name in fleet.engines}
    gone(fleet)

    def resumed_after_leaving(name: str) -> set[str]:
        leaves(fleet, going, name, applied=fleet.fleet.memory.committed)
        fleet.passes(fleet.policy.probe_interval)
        fleet.settle()
        fleet.settle()
        return {name for name in fleet.engines if fleet.called(name, Call.RESUME) > before[name]}

    assert resumed_after_leaving("e0" if last == "e1" else "e1") == set()
    assert resumed_after_leaving("e2") == {"e2"}
    assert resumed_after_leaving(last) == {"e0", "e1", "e2"}


def test_a_writer_may_write_only_where_it_owes_bytes(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.WRITING)
    (grant,) = fleet.sent(TRAINER, Grant)
    assert set(grant.members) == {rank("e0", 0), rank("e0", 1), rank("e1", 0), rank("e1", 1)}
    assert fleet.fleet.unclosed[TRAINER, fleet.round.name].targets == dict.fromkeys(grant.members, 100) | {
        rank("e0", 1): 101,
        rank("e1", 1): 101,
    }


SAME = "step 2 holds the same bytes as step 1; does the trainer publish what it trains?"


def rounds(fleet: Any, step: int) -> None:
    """One more version, through all of its round."""
    if step > 1:
        fleet.stage(step)
        fleet.settle()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()


def test_a_version_of_the_same_bytes_as_the_one_before_is_said_once(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    rounds(fleet, 1)
    assert "same bytes" not in fleet.told()
    rounds(fleet, 2)
    said = [command for command in fleet.commands if isinstance(command, Say) and command.sentence == SAME]
    assert [command.level for command in said] == ["warning"]
    fleet.digest = (12, 13)
    rounds(fleet, 3)
    fleet.digest = (11, 13)
    rounds(fleet, 4)
    assert fleet.told().count("same bytes") == 1, "step 4 is no repetition of step 3"
    rounds(fleet, 5)
    assert "step 5 holds the same bytes as step 4;" in fleet.told()


def test_the_same_bytes_are_known_across_a_restart_of_the_daemon(drive: Any) -> None:
    fleet = drive()
    rounds(fleet, 1)
    again = drive(records=fleet.written())
    again.connect(TRAINER)
    digests = {"e0/0": f"{11:016x}{13:016x}", "e0/1": f"{11:016x}{13:016x}"}
    assert again.fleet.memory.held == {member: ((Version(7, 1), digest),) for member, digest in digests.items()}


def test_the_same_version_again_is_no_repetition(drive: Any) -> None:
    fleet = drive(options={})
    rounds(fleet, 1)
    fleet.stage(2)
    fleet.settle()
    fleet.digest = (12, 13)
    fleet.to(Phase.DECIDING)
    held = dict(fleet.fleet.memory.held)
    assert {newest[0] for newest, *_ in held.values()} == {Version(7, 2)}, "as the journal was told"
    turn = Turn(fleet.fleet, fleet.now, 0)
    entry.decide(turn, fleet.round)
    assert not [command for command in turn.commands if isinstance(command, Say)]


def test_whoever_is_told_of_a_round_is_told_its_trace_and_so_is_the_journal(drive: Any) -> None:
    """It is that of the publish, as the first rank has said it."""
    fleet = drive(("e0",))
    going = fleet.to(Phase.SWITCHING)
    told = [
        message.trace
        for member in fleet.ranks_of()
        for kind in (Verify, Commit)
        for message in fleet.sent(member, kind)
    ]
    told += [message.trace for message in fleet.sent(trainer(), Grant)]
    assert len(told) == 5
    assert set(told) == {going.trace}
    assert going.publish == of_version("unit", going.version)
    assert going.trace == child(going.publish, f"round {going.name}")
