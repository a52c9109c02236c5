"""What the core says in the simulation can be told: also when everybody's errors are as long and as odd as can be."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
import simulated_daemon
from disturbances import KINDS, disturb
from told import round_trip
from weightsync.orchestrator.core import machine
from weightsync.orchestrator.core.commands import Command
from weightsync.orchestrator.core.events import AgentLost, AgentSaid, CallFailed, Event
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS
from weightsync.orchestrator.protocol.messages import Closed, Verified
from world import World

LONGEST = "\ud800\n\x1b" + "x" * (MAX_REASON_CHARS - 3)


def loud(event: Event) -> Event:
    """The same event, with an error as long as an agent or an engine can make it."""
    match event:
        case AgentSaid(message=Closed() | Verified() as message) if message.error:
            return replace(event, message=msgspec.structs.replace(message, error=LONGEST))
        case CallFailed() | AgentLost():
            return replace(event, reason=LONGEST)
    return event


@pytest.mark.parametrize("seed", range(4))
def test_everything_that_is_said_is_taken_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Command] = []

    def step(fleet: Fleet, events: Sequence[Event], now: float) -> list[Command]:
        commands = machine.step(fleet, [loud(event) for event in events], now)
        round_trip(commands)
        said.extend(commands)
        return commands

    monkeypatch.setattr(simulated_daemon, "step", step)
    world = World(seed, engines=2, ranks=1 + seed % 2, trainers=1 + seed % 2)
    disturb(world, KINDS, 40.0)
    world.run(50.0)
    assert len({type(command) for command in said}) > 8
    assert any("…" in str(command) for command in said), "some sentence was as long as can be"
