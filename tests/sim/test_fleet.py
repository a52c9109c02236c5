"""The core against a simulated fleet: thousands of seconds of faults, judged from the workers' memory.

``WEIGHTSYNC_SIM_SEEDS`` is the number of seeds, 25 by default; a failure names its seed, and the same seed fails again
in the same way (set ``PYTHONHASHSEED`` too, because digests here are hashes).
"""

import os

import pytest
from world import World

SEEDS = range(int(os.environ.get("WEIGHTSYNC_SIM_SEEDS", "25")))
FAULTY_SECONDS = 400.0
CALM_SECONDS = 900.0
"""L1's T: after the faults cease, every deadline of the policy may pass several times over."""


def disturb(world: World, until: float) -> None:
    """Something happens every few seconds."""

    def happen() -> None:
        if world.now >= until:
            return
        kind = world.rng.random()
        if kind < 0.35:
            agents = [*world.trainer_ranks, *world.workers.values()]
            world.disconnect(world.rng.choice(agents))
        elif kind < 0.6 and world.fleet is not None:
            world.crash_daemon()
        elif kind < 0.8:
            world.kill_engine(world.rng.choice(list(world.servers)))
        elif kind < 0.9:
            world.kill_trainer()
        world.later(world.rng.expovariate(1 / 8), happen)

    world.later(5.0, happen)


def serves_one_version(world: World) -> bool:
    """L1: every engine resumed, all at the last committed version."""
    held = {version for worker in world.workers.values() for version in worker.memory.values()}
    return all(not server.paused for server in world.servers.values()) and held == {world.committed[-1]}


def test_without_faults_version_after_version_is_committed() -> None:
    world = World(seed=0)
    world.run(100.0)
    assert len(world.committed) >= 8, world.story()
    assert [v.step for v in world.committed] == sorted(v.step for v in world.committed)
    assert world.finished_versions >= len(world.committed) - 1


@pytest.mark.parametrize("seed", SEEDS)
def test_no_engine_ever_serves_a_mixture_and_all_recover(seed: int) -> None:
    world = World(
        seed,
        engines=1 + seed % 3,
        ranks=1 + seed % 2,
        trainers=1 + seed % 2,
        faults=0.02,
        guarded=seed % 4 < 2,
        paired=seed % 3 > 0 and seed % 5 == 0,
    )
    disturb(world, FAULTY_SECONDS)
    world.run(FAULTY_SECONDS)
    world.faults = 0.0
    settled = world.finished_versions
    world.run(FAULTY_SECONDS + CALM_SECONDS)
    assert world.finished_versions > settled, f"no version ended after the faults ceased\n{world.story()}"
    world.generation += 1  # nobody publishes any more
    world.run(world.now + 120.0)
    assert serves_one_version(world), f"{world.fleet and world.fleet.sentence}\n{world.story()}"


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_that_returns_catches_up_without_a_new_version(seed: int) -> None:
    """From the slots of a trainer that publishes nothing any more, without a commit of its own."""
    world = World(seed, engines=2, guarded=seed % 2 == 0)
    world.run(30.0)
    world.generation += 1
    world.run(60.0)
    committed = list(world.committed)
    world.kill_engine("e1")
    world.run(120.0)
    assert serves_one_version(world), world.story()
    assert set(world.committed) == set(committed)
