"""Journals that a simulated fleet has written."""

from functools import cache

from disturbances import disturb
from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.records import AnyRecord, decode_record
from world import World


@cache
def recording(seed: int) -> tuple[Policy, tuple[AnyRecord, ...]]:
    """The journal of a simulated fleet: calm for seed 0, else with everything going wrong."""
    world = World(seed, engines=2, ranks=1, trainers=1 + seed % 2)
    if seed:
        disturb(world, ("daemons", "commands", "disk", "engines", "trainers", "refused", "corrupt", "ill"), 25.0)
    world.run(30.0)
    return world.policy, tuple(map(decode_record, world.disk.bodies))
