"""Engines that catch up from engines that serve: also where no trainer is left, and whatever happens to the lender."""

import msgspec
import pytest
from contents import GARBAGE, SIZES, memory_digest
from moments import CASES, begins, call, is_a, sent
from simulated_engine import Worker
from simulated_shadow import SPARES
from test_histories import assert_all_serve, everybody
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.messages import Grant, Verify
from weightsync.orchestrator.protocol.names import Member
from world import World

MODES: tuple[Lands, ...] = ("live", "copy", "flip")


def of(*modes: Lands) -> dict[str, Lands]:
    return {f"e{number}": mode for number, mode in enumerate(modes)}


def without_trainer(world: World) -> None:
    """Everybody serves, and no trainer is there any more."""
    world.run(6.0)
    world.run_until_quiet()
    world.jobs[-1].die()
    world.faults.begin(world.servers)
    world.run(world.now + 5.0)


def ended(world: World) -> list[RoundEnded]:
    """The rounds that are over, from what is durable."""
    return [record for record in world.disk.records() if isinstance(record, RoundEnded)]


def lent(world: World) -> list[tuple[str, dict[str, str]]]:
    """How catch-up rounds in which engines lent have ended, and who lent to whom."""
    return [(row.outcome, row.lenders) for row in ended(world) if row.lenders and row.kind == "catch-up"]


@pytest.mark.parametrize("fan_out", ["auto", "peers"])
@pytest.mark.parametrize("borrows", ["live", "copy", "flip"])
@pytest.mark.parametrize("lends", MODES)
def test_an_engine_that_returns_while_no_trainer_is_there_takes_its_bytes_from_a_peer(
    lends: Lands, borrows: Lands, fan_out: str
) -> None:
    world = World(101, engines=2, ranks=2, lands=of(lends, borrows), fan_out=fan_out)
    without_trainer(world)
    world.kill_engine("e1", 1.0)
    assert_all_serve(world, within=15.0)
    assert lent(world) == [("committed", {"e1": "e0"})]


@pytest.mark.parametrize("restart", [True, False])
def test_without_it_nobody_lends(restart: bool) -> None:
    world = World(102, engines=2, lands=of("copy", "copy"))
    without_trainer(world)
    world.kill_engine("e1", 1.0)
    if restart:
        world.kill_daemon(for_seconds=1.0)
    world.run(world.now + 20.0)
    assert world.judge.behind()
    assert lent(world) == []


def test_a_new_engine_takes_from_a_peer_although_the_trainer_could_write() -> None:
    world = World(103, engines=2, fan_out="auto", idle=True)
    world.run(6.0)
    world.bring_applicants("a0")
    assert_all_serve(world, within=15.0)
    assert ("committed", {"a0": "e0"}) in lent(world)


def test_what_no_engine_can_write_the_trainer_does() -> None:
    world = World(104, engines=2, fan_out="auto", idle=True)
    for worker in world.workers():
        worker.announce = msgspec.structs.replace(worker.announce, lends_name="")
    world.run(6.0)
    world.kill_engine("e1", 1.0)
    assert_all_serve(world, within=15.0)
    assert lent(world) == []


def test_after_a_restart_the_daemon_has_lent_what_its_journal_knows() -> None:
    world = World(105, engines=2, fan_out="auto")
    without_trainer(world)
    world.kill_daemon(for_seconds=1.0)
    world.kill_engine("e1", 1.0)
    assert_all_serve(world, within=25.0)
    assert ("committed", {"e1": "e0"}) in lent(world)


def test_a_lender_that_ends_for_good_while_it_writes_is_declared_dead() -> None:
    """No process takes its place that would prove it, and live memory has no spare."""
    world = World(115, engines=3, lands=everybody("live"), fan_out="peers")
    without_trainer(world)
    world.when(sent(Grant), lambda: world.later(0.001, lambda: world.remove_engine("e0")))
    world.kill_engine("e2", 1.0)
    assert_all_serve(world, within=30.0)
    assert lent(world)[-1] == ("committed", {"e2": "e1"})


@pytest.mark.parametrize("trainer", [False, True])
@pytest.mark.parametrize("borrows", ["copy", "flip"])
def test_a_lender_that_ends_for_good_while_it_writes_costs_who_borrows_its_landing(
    borrows: Lands, trainer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it could write to is nobody's any more; another one lends, or the trainer writes."""
    engines = 2 if trainer else 3
    world = World(116, engines=engines, lands=everybody(borrows), fan_out="auto", idle=True)
    if trainer:
        world.run(6.0)
    else:
        without_trainer(world)
    monkeypatch.setattr(world, "declare_dead", lambda members: None)
    world.when(sent(Grant), lambda: world.later(0.001, lambda: world.remove_engine("e0")))
    last = f"e{engines - 1}"
    world.kill_engine(last, 1.0)
    assert_all_serve(world, within=20.0)
    assert [row.lenders for row in ended(world) if row.outcome == "committed"][-1] == ({} if trainer else {last: "e1"})
    assert all(worker.announce.spares == SPARES - 1 for worker in world.servers[last].workers)


@pytest.mark.parametrize("silently", [False, True])
def test_a_lender_that_dies_while_it_writes_is_replaced_by_another_one(silently: bool) -> None:
    world = World(106, engines=3, lands=everybody("copy"), fan_out="auto")
    without_trainer(world)
    world.when(sent(Grant), lambda: world.kill_engine("e0", 5.0, silently=silently))
    world.kill_engine("e2", 1.0)
    # Until e0 is back nobody knows that it writes no more; a spare may be quicker.
    assert_all_serve(world, within=60.0)
    assert ("e2", "e1") in {
        pair for outcome, lenders in lent(world) if outcome == "committed" for pair in lenders.items()
    }


def test_a_lender_that_dies_is_replaced_by_the_trainer_where_there_is_no_other() -> None:
    world = World(107, engines=2, lands=everybody("copy"), fan_out="auto", idle=True)
    world.run(6.0)
    world.when(sent(Grant), lambda: world.kill_engine("e0", 5.0))
    world.kill_engine("e1", 1.0)
    assert_all_serve(world, within=60.0)
    assert [row.outcome for row in ended(world) if not row.lenders][-1] == "committed"


@pytest.mark.parametrize(("mode", "phase"), CASES)
@pytest.mark.parametrize("what", ["dies", "reset", "daemon"])
def test_whatever_happens_in_a_phase_all_serve_in_the_end(mode: Lands, phase: str, what: str) -> None:
    world = World(108, engines=3, ranks=1, lands=everybody(mode), fan_out="peers")
    without_trainer(world)

    def reset() -> None:
        link = world.servers["e0"].workers[0].link
        if link is not None:
            link.reset_half()

    happens = {"dies": lambda: world.kill_engine("e0", 2.0), "reset": reset, "daemon": world.kill_daemon}[what]
    world.when(begins(mode, phase), happens)
    world.kill_engine("e2", 1.0)
    assert_all_serve(world, within=90.0)


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_lender_no_longer_holds_is_never_taken_for_the_version(mode: Lands, honest: bool) -> None:
    """Whether it says itself what it reads, or what it should have read."""
    world = World(109, engines=3, ranks=1, lands=everybody(mode), fan_out="peers")
    without_trainer(world)
    rotten = world.worker(Member("inference", "e0", 0))
    assert isinstance(rotten, Worker)
    rotten.reads = lambda chunk: GARBAGE  # type: ignore[method-assign]
    if honest:
        rotten.owed = lambda target, version: (memory_digest([GARBAGE] * len(SIZES), target), sum(SIZES))  # type: ignore[method-assign]
    world.kill_engine("e2", 1.0)
    assert_all_serve(world, within=30.0)
    world.run(world.now + 1.0)
    assert lent(world) == [("failed", {"e2": "e0"}), ("committed", {"e2": "e1"})]
    reasons = [row.reason for row in ended(world) if row.outcome == "failed" and row.kind == "catch-up"]
    assert ("e0 has lent e2/0 bytes of digest" if honest else "differs from what was lent") in reasons[0]


def test_a_new_version_does_not_wait_for_what_is_lent() -> None:
    world = World(110, engines=3, lands=everybody("copy"), fan_out="auto", idle=True, verify=30.0)
    world.run(6.0)
    before = len(world.judge.committed)
    end = world.faults.begin(["e2"])
    world.kill_engine("e2", 0.5)
    world.run(world.now + 0.6)
    for worker in world.servers["e2"].workers:
        worker.ill = "silent"
    world.when(sent(Verify), world.job.publish_soon)
    world.run(world.now + 12.0)
    assert len(world.judge.committed) == before + 1, world.story()
    for worker in world.servers["e2"].workers:
        worker.ill = ""
    end()
    assert_all_serve(world, within=60.0)


def test_of_a_pair_both_borrow_or_none() -> None:
    world = World(111, engines=4, pairs=[("e2", "e3")], lands=everybody("copy"), fan_out="peers")
    without_trainer(world)
    world.kill_engine("e2", 1.0)
    world.kill_engine("e3", 1.0)
    assert_all_serve(world, within=30.0)
    assert lent(world)[-1] == ("committed", {"e2": "e0", "e3": "e0"})


def test_who_lends_serves_all_the_while() -> None:
    world = World(112, engines=2, lands=everybody("live"), fan_out="peers")
    without_trainer(world)
    calls: list[object] = []
    world.when(lambda what: call(Call.PAUSE, "e0")(what) and not calls.append(what), lambda: None)
    world.kill_engine("e1", 1.0)
    assert_all_serve(world, within=15.0)
    assert lent(world) == [("committed", {"e1": "e0"})]
    assert calls == []
    assert is_a(RoundEnded)(ended(world)[-1])


@pytest.mark.parametrize("mode", MODES)
def test_a_path_that_is_gone_from_a_lender_costs_its_borrower_one_endpoint(mode: Lands) -> None:
    """Nothing that was lent by it ever ends, nobody mends it, and no trainer is there."""
    world = World(113, engines=3, lands=everybody(mode), fan_out="peers")
    without_trainer(world)
    gone = world.faults.gone_paths

    def breaks() -> None:
        gone.update(worker.endpoint for worker in world.servers["e2"].workers)

    world.when(sent(Grant), breaks)
    world.kill_engine("e2", 1.0)
    assert_all_serve(world, within=60.0)
    assert gone, "it was in time"
    assert gone.isdisjoint(worker.endpoint for worker in world.servers["e2"].workers)
    assert not any(worker.open for worker in world.workers())
    assert lent(world)[-1][0] == "committed"
