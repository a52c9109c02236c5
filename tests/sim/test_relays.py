"""Rounds in which engines take the version from another one of the round, before anybody serves it."""

import os
from collections.abc import Callable
from typing import Any, Final

import pytest
from contents import GARBAGE, SIZES
from disturbances import disturb
from moments import sent
from test_fleet import CALM_SECONDS, FAULTY_SECONDS, require_recovery, world_of
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.messages import Grant
from weightsync.orchestrator.protocol.names import Member
from world import World

NAMES: Final = ("e0", "e1", "e2")
SEEDS = range(int(os.environ.get("WEIGHTSYNC_SIM_SEEDS", "150" if os.environ.get("CI") else "10")))


def fleet(seed: int, *lands: Lands, **more: Any) -> World:
    return World(seed, engines=3, ranks=2, lands=dict(zip(NAMES, lands, strict=True)), fan_out="peers", **more)


def published(world: World) -> list[RoundEnded]:
    """The rounds that are over, from what is durable, but those by which engines catch up."""
    rows = [record for record in world.disk.records() if isinstance(record, RoundEnded)]
    return [row for row in rows if row.kind == "publish"]


@pytest.mark.parametrize("lands", [("copy",) * 3, ("flip",) * 3, ("flip", "copy", "copy")])
def test_the_trainer_writes_each_version_once(lands: tuple[Lands, ...]) -> None:
    world = fleet(1, *lands)
    world.run(15.0)
    rows = published(world)
    assert len(rows) >= 8
    for row in rows:
        assert (row.outcome, row.attempt, row.lenders) == ("committed", 1, {"e1": "e0", "e2": "e0"})
        assert world.judge.left[row.round] == {"e0": 2 * sum(SIZES)}
        assert row.bytes == 3 * 2 * sum(SIZES), "all of it has arrived at all of them"
    assert not world.judge.behind()


def test_with_an_engine_that_stands_still_meanwhile_the_trainer_writes_to_all() -> None:
    world = fleet(2, "copy", "live", "copy")
    world.run(15.0)
    assert [row.lenders for row in published(world)] == [{}] * len(published(world))
    assert len(published(world)) >= 8


def granted_to(name: str) -> Callable[[object], bool]:
    """The moment at which a rank of this engine is granted to write."""
    grant = sent(Grant)
    return lambda what: grant(what) and getattr(what, "member", None) == Member("inference", name, 0)


@pytest.mark.parametrize("silently", [True, False])
@pytest.mark.parametrize("who", ["e0", "e1"])
def test_one_that_dies_while_it_is_relayed_costs_nobody_a_pause(who: str, silently: bool) -> None:
    """The one that writes, or one that is written to."""
    world = fleet(3, "copy", "copy", "copy")
    world.run(5.0)
    died: list[int] = []

    def dies() -> None:
        died.append(len(world.judge.committed))
        world.faults.begin([who])
        world.servers[who].die_all(silently=silently)
        world.later(3.0, lambda: world.start_engine(who))

    world.when(granted_to("e0"), dies)
    world.run(20.0)
    world.run_until_quiet()
    world.run(world.now + 10.0)
    assert not world.judge.behind(), world.story()
    assert len(world.judge.committed) > died[0]


def test_what_a_seed_does_not_write_right_is_taken_from_the_trainer() -> None:
    """Its standby rots behind its own digest: what it reads is nothing that anybody verified."""
    world = fleet(4, "copy", "copy", "copy")
    world.run(5.0)
    before = len(world.judge.committed)
    rotten = world.worker(Member("inference", "e0", 0))
    assert rotten is not None
    rotten.reads = lambda chunk: GARBAGE  # type: ignore[method-assign]
    world.run(9.0)
    rows = published(world)
    failed = [row for row in rows if row.outcome == "failed"]
    assert failed, world.story()
    assert len(world.judge.committed) > before
    assert [row.lenders for row in rows if row.version == failed[0].version and row.outcome == "committed"] == [{}]


@pytest.mark.parametrize("engines", [2, 3])
def test_a_seed_that_writes_nothing_costs_an_attempt_and_blames_nobody(engines: int) -> None:
    """Its GPU hangs, say, while its agents answer. They close when the attempt is over."""
    world = World(5, engines=engines, lands=dict.fromkeys(NAMES, "copy"), fan_out="peers")
    world.run(5.0)
    before = len(world.judge.committed)
    [seed] = {lender for row in published(world) for lender in row.lenders.values()}
    for worker in world.servers[seed].workers:
        worker.may_post = lambda *_: False  # type: ignore[method-assign]
    world.run(30.0)
    rows = published(world)
    [failed, *_] = [row for row in rows if row.outcome == "failed"]
    [again] = [row for row in rows if row.version == failed.version and row.outcome == "committed"]
    assert seed not in again.lenders.values()
    assert world.daemon is not None
    assert not any(engine.failures for engine in world.daemon.fleet.engines.values()), world.story()
    assert len(world.judge.committed) > before + 3, world.story()
    assert not world.judge.behind(), world.story()


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_goes_wrong_no_engine_serves_a_mixture_and_all_recover(seed: int) -> None:
    world, kinds = world_of(seed + 10_000, "peers")
    disturb(world, kinds, FAULTY_SECONDS)
    world.run(FAULTY_SECONDS + CALM_SECONDS)
    require_recovery(world, kinds)
