"""Rounds that run ahead of their version's publish: what travels early is served by nobody early, and harms nobody."""

import pytest
from moments import sent
from places import Disk
from weightsync.orchestrator.core.records import LiveDirty, RoundBegan, RoundEnded
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.messages import Grant, Staged
from world import World

MODES: tuple[Lands, ...] = ("copy", "flip")


def world_of(seed: int, mode: Lands, **more: object) -> World:
    world = World(seed, engines=2, lands=dict.fromkeys(("e0", "e1"), mode), **more)  # type: ignore[arg-type]
    world.run(6.0)
    return world


def ended(disk: Disk) -> list[RoundEnded]:
    return [record for record in disk.records() if isinstance(record, RoundEnded)]


def granted_early(world: World) -> list[bool]:
    """Of each grant from now on, as it comes: whether its rank still converts."""
    found: list[bool] = []

    def look() -> None:
        found.append(any(rank.converting is not None for rank in world.job.ranks))
        world.when(sent(Grant), look)

    world.when(sent(Grant), look)
    return found


@pytest.mark.parametrize("mode", [*MODES, "live"])
def test_engines_that_serve_on_are_written_to_while_the_trainer_converts(mode: Lands) -> None:
    world = world_of(41, mode)
    early = granted_early(world)
    before = len(world.judge.committed)
    world.run(world.now + 20.0)
    assert len(world.judge.committed) > before + 8
    assert len(early) > 16
    if mode == "live":
        assert not any(early), "these stand still for a round: it begins when all is there"
    else:
        assert sum(early) > 0.8 * len(early)
    assert {row.outcome for row in ended(world.disk)} == {"committed"}
    assert {row.attempt for row in ended(world.disk)} == {1}


@pytest.mark.parametrize("mode", MODES)
def test_versions_that_are_given_up_cost_no_engine_anything(mode: Lands) -> None:
    world = world_of(42, mode)
    world.gives_up = 0.5
    pauses = len(world.judge.pauses)
    before = len(world.judge.committed)
    world.run(world.now + 40.0)
    failed = [row for row in ended(world.disk) if row.outcome == "failed"]
    assert len(failed) >= 5
    assert {(row.fault, row.left_out) for row in failed} == {("trainer", ())}
    assert len(world.judge.committed) >= before + 5
    assert max(world.judge.pauses[pauses:], default=0.0) < 0.2, "nobody stands longer than a switch takes"
    assert not world.judge.behind()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["trainer", "daemon", "engine", "connection"])
def test_whoever_dies_while_the_trainer_converts(mode: Lands, what: str) -> None:
    world = world_of(43, mode)
    before = len(world.judge.committed)

    def happens() -> None:
        if not any(rank.converting is not None for rank in world.job.ranks):
            world.when(sent(Grant), happens)
        elif what == "trainer":
            world.job.die()
            world.later(1.0, world.start_trainer)
        elif what == "daemon":
            world.kill_daemon()
        elif what == "engine":
            world.kill_engine("e0", 1.0)
        else:
            for rank in world.job.ranks:
                assert rank.link is not None
                rank.link.reset_half()

    world.when(sent(Grant), happens)
    world.run(world.now + 30.0)
    world.run_until_quiet()
    world.run(world.now + 10.0)
    assert not world.judge.behind(), world.story()
    assert len(world.judge.committed) > before + 3


@pytest.mark.parametrize("mode", MODES)
def test_a_conversion_that_never_ends_keeps_nobody_for_ever(mode: Lands) -> None:
    """Its round ends when a staged version would, too, and an engine that came meanwhile is served from elsewhere."""
    world = world_of(44, mode, staged=5.0, fan_out="auto")
    rank = world.job.ranks[0]
    said: list[float] = []
    say = rank.say

    def never_staged(message: object) -> None:
        if not isinstance(message, Staged):
            say(message)  # type: ignore[arg-type]
        else:
            said.append(world.now)

    rank.say = never_staged  # type: ignore[assignment,method-assign]
    world.run(world.now + 3.0)
    assert said
    began = [record for record in world.disk.records() if isinstance(record, RoundBegan)][-1]
    assert [record.round for record in world.disk.records() if isinstance(record, LiveDirty)][-1] == began.round
    world.run(world.now + 10.0)
    [row] = [row for row in ended(world.disk) if row.round == began.round]
    assert (row.outcome, row.fault, row.left_out) == ("failed", "trainer", ())
    assert all(server.serves for server in world.servers.values())
