"""Journals that a simulated fleet has written."""

from functools import cache

from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.records import AnyRecord, decode_record
from world import World


@cache
def recording(seed: int) -> tuple[Policy, tuple[AnyRecord, ...]]:
    """The journal of a simulated fleet: calm for seed 0, else with everything going wrong."""
    world = World(seed, engines=2, ranks=1, trainers=1 + seed % 2, faults=0.03 if seed else 0.0)
    if seed:
        for at in range(7, 90, 11):
            world.later(at, world.crash_daemon)
            world.later(at + 5, lambda: world.kill_engine("e1"))
        world.later(50, world.kill_trainer)
    world.run(120.0)
    return world.policy, tuple(decode_record(body) for body in world.disk)
