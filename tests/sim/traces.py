"""What a simulated core was told and what it commanded, as one number: ``python traces.py SEED …`` prints it."""

import hashlib
import sys
from collections.abc import Sequence

import simulated_daemon
from disturbances import disturb
from test_fleet import FAULTY_SECONDS, world_of
from weightsync.orchestrator.core import machine
from weightsync.orchestrator.core.commands import Command
from weightsync.orchestrator.core.events import Event
from weightsync.orchestrator.core.state import Fleet


def trace_of(seed: int) -> str:
    """Over every event and every command of a minute of disasters, in their order, with all that they say."""
    seen = hashlib.sha256()

    def step(fleet: Fleet, events: Sequence[Event], now: float) -> list[Command]:
        commands = machine.step(fleet, events, now)
        seen.update(f"{now} {events} {commands}".encode(errors="backslashreplace"))
        return commands

    simulated_daemon.step = step
    world, kinds = world_of(seed)
    disturb(world, kinds, FAULTY_SECONDS)
    world.run(FAULTY_SECONDS)
    return seen.hexdigest()


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(each, trace_of(int(each)))
