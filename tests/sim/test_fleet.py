"""The core against a simulated fleet: seeds of everything going wrong, judged from the workers' memory.

``WEIGHTSYNC_SIM_SEEDS`` is the number of seeds, 25 by default, 500 with ``CI`` set; a failure names its seed, and the
same seed fails again in the same way.
"""

import os
import random
from typing import Final

import pytest
from disturbances import KINDS, disturb
from weightsync.orchestrator.protocol.layout import Lands
from world import World

SEEDS = range(int(os.environ.get("WEIGHTSYNC_SIM_SEEDS", "500" if os.environ.get("CI") else "25")))
FAULTY_SECONDS = 60.0
NAMES: Final = tuple(f"e{number}" for number in range(8))
CALM_SECONDS = 60.0
"""L1's T: every deadline of the policy may pass several times over."""


def world_of(seed: int, fan_out: str = "") -> tuple[World, list[str]]:
    """Of a shape and with some kinds of faults that the seed draws; many kinds at once would hide one another."""
    rng = random.Random(f"shape {seed}")
    engines = rng.choice((1, 2, 2, 3, 3, 4))
    pairs = [("e0", "e1")] if engines > 1 and rng.random() < 0.3 else []
    world = World(
        seed,
        engines=engines,
        ranks=rng.choice((1, 1, 2)),
        trainers=rng.choice((1, 1, 2, 3)),
        guarded=seed % 2 == 0,
        pairs=pairs,
        down=rng.sample([f"e{number}" for number in range(engines)], rng.choice((0, 0, 0, 1)) if engines > 1 else 0),
        together=rng.random() < 0.2,
        lease=rng.choice((0.0, 4.0)),
        min_engines=rng.choice((0.5, 0.5, 1, 1.0)),
        lands=modes(rng),
        meeting=rng.choice(((), (), ("e0",), NAMES)),
        fan_out=fan_out or random.Random(f"fan out {seed}").choice(("trainer", "auto")),
    )
    world.gives_up = random.Random(f"gives up {seed}").choice((0.0, 0.1))
    for name in world.configured:
        if name not in world.servers:
            world.later(rng.uniform(5.0, 40.0), world.faults.begin([name]))
            world.later(rng.uniform(5.0, 40.0), lambda name=name: bring(world, name))
    return world, rng.sample(KINDS, rng.choice((1, 2, 3, 4, 6, 9)))


def modes(rng: random.Random) -> dict[str, Lands]:
    """All engines land in one way, or each in its own."""
    one = rng.choice(("live", "live", "copy", "flip", "flip", ""))
    return {name: one or rng.choice(("live", "copy", "flip")) for name in NAMES}


def bring(world: World, name: str) -> None:
    """An engine that was down at the start comes, unless another configuration has dropped it or brought it by now."""
    if name in world.configured and name not in world.servers:
        world.start_engine(name)


def test_without_faults_version_after_version_is_committed() -> None:
    world = World(seed=0)
    world.run(30.0)
    assert len(world.judge.committed) >= 15, world.story()
    assert all(committed for _, committed in world.job.results), world.story()
    assert max(world.judge.pauses) < 1.0


def require_recovery(world: World, kinds: object) -> None:
    """Versions are committed again if somebody publishes, and once nobody does, all engines have the last one; no
    healthy one was paused for long. ``kinds``: what was wrong, for whoever reads of a failure."""
    committed = len(world.judge.committed)
    if not world.idle:
        world.run(world.now + 10.0)
        assert len(world.judge.committed) > committed, f"{kinds}: nothing is committed any more\n{world.story()}"
        world.idle = True
    world.run(world.now + 20.0)
    assert not world.judge.behind(), f"{kinds}: {world.judge.behind()}\n{world.story()}"
    longest = max(world.judge.pauses, default=0.0)
    assert longest <= world.patience, f"{kinds}: a healthy engine was paused for {longest} s\n{world.story()}"


@pytest.mark.parametrize("seed", SEEDS)
def test_no_engine_ever_serves_a_mixture_and_all_recover(seed: int) -> None:
    world, kinds = world_of(seed)
    disturb(world, kinds, FAULTY_SECONDS)
    world.run(FAULTY_SECONDS * 0.8)
    world.idle = seed % 3 == 0  # nobody publishes any more, whatever is wrong at that time
    world.run(FAULTY_SECONDS + CALM_SECONDS)
    require_recovery(world, kinds)
