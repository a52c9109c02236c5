"""One turn collects commands, each with the event that caused it."""

import pytest
from fleets import policy_for, trainer
from weightsync.orchestrator.core.commands import Append, CallEngine, Drop, Say
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.records import Committed, EpochBegan
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Heartbeat
from weightsync.orchestrator.protocol.names import RoundName, Version


@pytest.fixture
def turn() -> Turn:
    fleet, _ = start(policy_for(["e0"]), "journal", [], 0.0)
    return Turn(fleet, 5.0, 41)


def test_each_command_carries_its_cause(turn: Turn) -> None:
    turn.say("hello")
    turn.cause = 42
    turn.do(Drop(trainer(), 7, "rude"))
    turn.call("e0", Call.PROBE, 3.0)
    assert turn.commands == [
        Say("info", "hello", cause=41),
        Drop(trainer(), 7, "rude", cause=42),
        CallEngine("e0", Call.PROBE, 1, 3.0, cause=42),
    ]


def test_nothing_is_sent_to_somebody_who_is_not_here(turn: Turn) -> None:
    turn.send(trainer(), Heartbeat())
    assert turn.commands == []


def test_a_record_is_remembered_at_once_and_awaited_on_demand(turn: Turn) -> None:
    turn.append(EpochBegan(epoch=9))
    assert (turn.fleet.memory.epoch, turn.fleet.awaited) == (9, None)
    record = Committed(round=RoundName(9, 1), version=Version(7, 1), sequence=1)
    turn.append_and_wait(record)
    assert turn.fleet.awaited == ("Committed", RoundName(9, 1))
    assert turn.commands == [Append(EpochBegan(epoch=9), cause=41), Append(record, answer=True, cause=41)]


def test_the_newest_call_of_a_kind_is_the_one_whose_answer_counts(turn: Turn) -> None:
    turn.call("e0", Call.PROBE, 1.0)
    turn.call("e0", Call.PROBE, 1.0)
    assert turn.fleet.engines["e0"].calls == {Call.PROBE: 2}
