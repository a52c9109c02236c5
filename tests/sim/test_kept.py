"""Attempts that fail: an engine that keeps all of the version is written to no more, and serves no mixture."""

import os
import random
from collections.abc import Callable
from typing import Final

import pytest
from contents import GARBAGE, SIZES
from disturbances import KINDS, disturb
from moments import PHASES
from simulated_shadow import ShadowWorker
from test_fleet import CALM_SECONDS, FAULTY_SECONDS, require_recovery
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.protocol.layout import Lands
from world import World

MODES: Final[tuple[Lands, ...]] = ("copy", "flip")
WHOLE: Final = 2 * sum(SIZES)
"""Bytes of a version for one engine."""
SEEDS = range(int(os.environ.get("WEIGHTSYNC_SIM_SEEDS", "150" if os.environ.get("CI") else "10")))


def fleet(mode: Lands, engines: int = 2, **more: object) -> World:
    """Without any of its engines nothing is committed."""
    names = [f"e{number}" for number in range(engines)]
    wanted = {"min_engines": engines, "lands": dict.fromkeys(names, mode), **more}
    world = World(51, engines=engines, **wanted)  # type: ignore[arg-type]
    world.run(6.0)
    return world


def rounds(world: World) -> list[RoundEnded]:
    """Those that end from now on, as they do."""
    rows: list[RoundEnded] = []

    def note(what: object) -> bool:
        if isinstance(what, RoundEnded):
            rows.append(what)
        return False

    world.when(note, lambda: None)
    return rows


def fails(what: object) -> bool:
    """The end of a failed attempt is journaled."""
    return isinstance(what, RoundEnded) and what.outcome == "failed"


def dies_at(world: World, phase: str, name: str = "e0") -> list[RoundEnded]:
    """An engine dies where that phase begins: the rounds that begin afterwards, once nothing is published any more."""
    rows = rounds(world)
    world.when(PHASES[phase], lambda: world.kill_engine(name, 1.0))
    world.run(world.now + 10.0)
    world.run_until_quiet()
    assert not world.judge.behind(), world.story()
    return rows


def drops(world: World) -> None:
    for worker in world.servers["e1"].workers:
        assert isinstance(worker, ShadowWorker)
        worker.renew(spare=worker.lands == "copy")  # a spare takes the place of what has landed
        worker.beside[:] = [GARBAGE] * len(SIZES)
        worker.say(worker.announce)


def cut_off(world: World, seconds: float) -> None:
    """Nobody hears the trainer for a while, so that it has nothing staged and engines that are behind catch up."""
    rank = world.job.ranks[0]
    assert rank.link is not None
    world.later(seconds, world.faults.begin(world.servers))
    rank.unreachable_until = world.now + seconds
    rank.link.closed_by_agent("connection reset")


def left(world: World, row: RoundEnded) -> dict[str, int]:
    """Bytes that left the trainer in this round."""
    return dict(world.judge.left.get(row.round, {}))


@pytest.mark.parametrize("mode", MODES)
def test_what_has_arrived_at_one_engine_is_not_sent_again_for_the_other(mode: Lands) -> None:
    world = fleet(mode)
    first, second = dies_at(world, "verifying")[:2]
    assert (first.outcome, second.outcome, first.version) == ("failed", "committed", second.version)
    assert left(world, first) == {"e0": WHOLE, "e1": WHOLE}
    assert left(world, second) == {"e0": WHOLE}, world.story()


@pytest.mark.parametrize("mode", MODES)
def test_what_has_arrived_before_it_was_asked_for_is_looked_at_then(mode: Lands) -> None:
    """The path to one engine is gone in mid write; the other one was written to by then."""
    world = fleet(mode)
    rows = rounds(world)
    ends = {worker.endpoint for worker in world.servers["e0"].workers}
    world.when(PHASES["writing"], lambda: world.faults.gone_paths.update(ends))
    world.when(fails, lambda: world.kill_engine("e0", 1.0))
    world.run(world.now + 10.0)
    world.run_until_quiet()
    first, second = rows[:2]
    assert (first.outcome, second.outcome, first.version) == ("failed", "committed", second.version)
    assert left(world, second) == {"e0": WHOLE}, world.story()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "happens",
    [
        lambda world: world.kill_engine("e1", 0.5),
        lambda world: world.kill_daemon(for_seconds=0.5),
        drops,
    ],
    ids=["its process", "the daemon", "its memory"],
)
def test_what_is_lost_between_two_attempts_is_written_again(mode: Lands, happens: Callable[[World], None]) -> None:
    world = fleet(mode, backoff=1.5)
    world.when(fails, lambda: happens(world))
    first, *others = dies_at(world, "verifying")
    again = next(row for row in others if (row.version, row.outcome) == (first.version, "committed"))
    assert left(world, again) == {"e0": WHOLE, "e1": WHOLE}, world.story()


def test_who_lends_what_it_serves_keeps_nothing_where_that_is_packed() -> None:
    world = fleet("copy", backoff=3.0, fan_out="auto")
    world.when(fails, lambda: cut_off(world, 5.0))
    first, lent, again = dies_at(world, "verifying")[:3]
    assert (lent.kind, lent.outcome, lent.lenders) == ("catch-up", "committed", {"e0": "e1"}), world.story()
    assert (again.version, again.outcome) == (first.version, "committed")
    assert left(world, again) == {"e0": WHOLE, "e1": WHOLE}


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_goes_wrong_where_every_engine_is_needed(seed: int) -> None:
    rng = random.Random(f"kept {seed}")
    engines = rng.choice((2, 3))
    one = rng.choice((*MODES, ""))
    world = World(
        seed,
        engines=engines,
        ranks=rng.choice((1, 2)),
        min_engines=engines,
        lands={f"e{number}": one or rng.choice(MODES) for number in range(engines)},
        fan_out=rng.choice(("trainer", "auto", "peers")),
    )
    kinds = rng.sample(KINDS, rng.choice((1, 2, 3, 4)))
    disturb(world, kinds, FAULTY_SECONDS)
    world.run(FAULTY_SECONDS + CALM_SECONDS)
    require_recovery(world, kinds)
