"""One engine of several is bad, and stays so: the others are updated and serve, and it comes back when it is healed."""

import pytest
from disturbances import ILLNESSES, make_ill
from moments import CASES, begins
from weightsync.orchestrator.core.policy import FanOut
from weightsync.orchestrator.protocol.layout import Lands
from world import World

BAD = "e2"
LIVE_ONLY = {"update 500", "update hangs", "finish 500", "finish hangs", "pause 500", "pause hangs"}
SHADOW_ONLY = {"switch 500", "switch hangs", "switch", "audit", "audit hangs"}
FLIP_ONLY = {"late audit"}
ILL = [
    (mode, illness)
    for mode in ("live", "copy", "flip")
    for illness in ILLNESSES
    if illness not in (SHADOW_ONLY if mode == "live" else LIVE_ONLY) and (mode == "flip" or illness not in FLIP_ONLY)
]
GOOD_COMMITS = 10
"""Within half a minute, in which a healthy fleet makes thirty and more."""


def everybody(mode: Lands) -> dict[str, Lands]:
    """All engines land in ``mode``."""
    return {f"e{number}": mode for number in range(4)}


def assert_the_others_go_on(world: World, at_least: int = GOOD_COMMITS, *, deaf: bool = False) -> None:
    """New versions are committed and served by the others; the judge measures their pauses all the while.

    ``deaf``: the bad one cannot be told to pause, so it may go on with the version that it has.
    """
    before = len(world.judge.committed)
    world.run(world.now + 30.0)
    assert len(world.judge.committed) >= before + at_least, world.story()
    world.run_until_quiet()
    assert not [line for line in world.judge.behind() if not line.startswith(BAD)], world.story()
    assert deaf or not world.judge.serves_an_older_version(BAD), world.story()


def assert_it_comes_back(world: World) -> None:
    world.run(world.now + 25.0)
    world.run_until_quiet()
    assert not world.judge.behind(), f"{world.judge.behind()}\n{world.story()}"


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize(("mode", "illness"), ILL)
def test_an_engine_that_is_ill(mode: Lands, illness: str, guarded: bool) -> None:
    world = World(1, engines=3, guarded=guarded, lands=everybody(mode))
    world.run(10.0)
    heal = make_ill(world, BAD, illness)
    assert_the_others_go_on(world, deaf="pause" in illness)
    heal()
    assert_it_comes_back(world)


HANGS = [(mode, illness) for mode, illness in ILL if illness.endswith("hangs") or illness == "silent"]


@pytest.mark.parametrize("fan_out", ["trainer", "peers"])
@pytest.mark.parametrize(("mode", "illness"), HANGS)
def test_one_that_catches_up_and_hangs_keeps_no_other_from_catching_up(
    mode: Lands, illness: str, fan_out: FanOut
) -> None:
    """The trainer publishes nothing more, and calls and phases have far longer than the patience."""
    long = {"pause": 600.0, "quiesce": 600.0, "verify": 600.0, "finish": 600.0}
    world = World(8, engines=4, lands=everybody(mode), fan_out=fan_out, **long)
    world.run(10.0)
    world.run_until_quiet()
    ill = world.servers[BAD]
    world.kill_engine(BAD)
    while world.servers[BAD] is ill:
        world.run(world.now + 0.01)
    heal = make_ill(world, BAD, illness)
    world.run(world.now + 1.0)
    world.kill_engine("e1")
    world.run(world.now + world.policy.patience + 3.0)
    assert not [line for line in world.judge.behind() if not line.startswith(BAD)], world.story()
    heal()


@pytest.mark.parametrize("pairs", [(), [("e0", "e1")]], ids=["alone", "beside a pair"])
def test_an_engine_whose_routes_are_dead(pairs: list[tuple[str, str]]) -> None:
    world = World(2, engines=3, pairs=pairs)
    world.run(10.0)
    world.faults.cut.add(BAD)
    end = world.faults.begin([BAD])
    assert_the_others_go_on(world, deaf=True)
    end()
    world.faults.cut.discard(BAD)
    assert_it_comes_back(world)


@pytest.mark.parametrize(("mode", "phase"), CASES)
@pytest.mark.parametrize("waiting_wires", [True, False], ids=["its wires wait", "its memory is written"])
def test_an_engine_that_is_frozen(mode: Lands, phase: str, waiting_wires: bool) -> None:
    world = World(3, engines=4, trainers=1, lands=everybody(mode))
    world.faults.waiting_wires = waiting_wires
    world.run(10.0)
    ends = []

    def freeze() -> None:
        ends.append(world.faults.begin([BAD]))
        world.servers[BAD].stop_all()

    world.when(begins(mode, phase), freeze)
    # A trainer does not convert into slots that a wire still reads; until it is thawed nothing new may be published.
    assert_the_others_go_on(world, at_least=0 if waiting_wires else GOOD_COMMITS)
    ends[0]()
    world.servers[BAD].thaw_all()
    assert_it_comes_back(world)


@pytest.mark.parametrize(("mode", "phase"), CASES)
def test_an_engine_that_dies(mode: Lands, phase: str) -> None:
    world = World(4, engines=3, lands=everybody(mode))
    world.run(10.0)
    world.when(begins(mode, phase), lambda: world.kill_engine(BAD, for_seconds=60.0))
    assert_the_others_go_on(world)
    world.run(80.0)
    assert_it_comes_back(world)


def test_an_engine_that_is_not_there_at_the_start() -> None:
    """Nor at the daemon's next starts: it delays nobody."""
    world = World(5, engines=3, down=[BAD], join=600.0)
    world.faults.begin([BAD])
    world.run(10.0)
    assert len(world.judge.committed) >= 3, world.story()
    world.kill_daemon(for_seconds=0.5)
    assert_the_others_go_on(world)
    world.start_engine(BAD)
    assert_it_comes_back(world)


def test_an_engine_into_which_nothing_can_be_written() -> None:
    world = World(6, engines=3)
    world.run(10.0)
    world.faults.broken_edges.add(BAD)
    end = world.faults.begin([BAD])
    assert_the_others_go_on(world)
    end()
    world.faults.broken_edges.discard(BAD)
    assert_it_comes_back(world)


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("mode", ["live", "copy", "flip"])
def test_an_engine_to_which_a_path_is_gone_for_good(mode: Lands, guarded: bool) -> None:
    """Nothing that was written by it ever ends. Nobody mends it, and the engine comes back by another endpoint."""
    world = World(7, engines=3, trainers=2, guarded=guarded, lands=everybody(mode))
    world.run(10.0)
    ends = []

    def breaks() -> None:
        ends.append(world.faults.begin([BAD]))
        world.faults.gone_paths.update(worker.endpoint for worker in world.servers[BAD].workers)

    world.when(begins(mode, "writing"), breaks)
    assert_the_others_go_on(world)
    assert world.faults.gone_paths.isdisjoint(worker.endpoint for worker in world.servers[BAD].workers)
    assert not world.judge.behind(), f"{world.judge.behind()}\n{world.story()}"
    ends[0]()
    assert_it_comes_back(world)
