"""What is wrong, worst first, with names, times, reasons and fixes; judged from fleets as the core keeps them."""

from typing import Any

from fleets import ANNOUNCE, policy_for, rank, trainer
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.records import LinkUse, SlowEdge
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Unclosed
from weightsync.orchestrator.daemon.admin.problems import MAX_PROBLEMS, PUBLISH_FIRST, REACH_IT, SLOW_LINKS, problems
from weightsync.orchestrator.daemon.admin.views import ProblemView
from weightsync.orchestrator.protocol.edges import RATES
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import EngineStatus, Hello, Staged
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

VERSION, NEXT, NAME = Version(7, 1), Version(7, 2), RoundName(3, 4)
NOW, UNIX = 1000.0, 50_000.0
SERVING, HELD = EngineStatus(applied=VERSION), EngineStatus()


def fleet_of(*names: str, committed: Version | None = VERSION, status: EngineStatus = SERVING) -> Fleet:
    """Engines of one rank each, all of which serve ``committed``."""
    fleet, _ = start(policy_for(names), "j", [], 0.0)
    fleet.memory.committed = committed
    for name in names:
        fleet.engines[name].reachable, fleet.engines[name].paused = True, False
        enter(fleet, rank(name), status=status)
    return fleet


def enter(fleet: Fleet, member: Member, world: int = 1, **state: Any) -> ConnectedAgent:
    hello = Hello(
        schema=SCHEMA_VERSION, run_id="unit", member=member, world=world, incarnation=1,
        generation=7 if member.role == "trainer" else 0,
    )  # fmt: skip
    agent = ConnectedAgent(member, 1, hello, ANNOUNCE, **state)
    fleet.enter(agent)
    return agent


def change(fleet: Fleet, name: str, since: float = 900.0, word: str = "", **state: Any) -> None:
    for key, value in state.items():
        setattr(fleet.engines[name], key, value)
    fleet.words[name] = (word, since)


def found(fleet: Fleet, *markers: str, now: float = NOW) -> tuple[ProblemView, ...]:
    return problems(fleet, markers, now, UNIX)


def test_nothing_is_wrong_with_a_fleet_that_serves() -> None:
    assert found(fleet_of("e0", "e1")) == ()


def test_nor_in_a_round() -> None:
    fleet = fleet_of("e0")
    fleet.round = Round(NAME, NEXT, 1, False, {"e0": Progress()}, {rank("e0"): 1}, {})
    fleet.engines["e0"].paused = True
    assert found(fleet) == ()


def test_a_phase_that_has_taken_half_of_its_time_names_whom_it_waits_for() -> None:
    """A process that is stopped is not lost before its heartbeats are missed, and holds the round up meanwhile."""
    fleet = fleet_of("e0", "e1")
    both, ranks = {"e0": Progress(), "e1": Progress()}, {rank("e0"): 1, rank("e1"): 1}
    fleet.round = Round(
        NAME, NEXT, 1, False, both, ranks, {}, phase=Phase.QUIESCING, phase_began=990.0, deadline=1010.0
    )
    fleet.round.quiesced.add(rank("e0"))
    assert found(fleet) == ()
    (problem,) = found(fleet, now=1001.0)
    assert problem.what == "round 3.4 is quiescing, for which it has 20 s at most, and waits for e1/0"
    assert problem.since == UNIX - 11
    assert problem.fix.startswith("look at that process")


def test_before_the_first_commit_somebody_has_to_publish() -> None:
    fleet = fleet_of("e0", "e1", committed=None, status=HELD)
    for name in ("e0", "e1"):
        change(fleet, name, 400.0, "held")
    nobody, held = found(fleet)
    assert nobody == ProblemView(
        severity="critical", what="no engine serves: nothing is committed yet", fix=PUBLISH_FIRST, since=UNIX - 600
    )
    assert held == ProblemView(
        severity="degraded", what="e0, e1: answers nobody: nothing is committed yet", fix=PUBLISH_FIRST,
        about=("e0", "e1"), count=2, since=UNIX - 600,
    )  # fmt: skip


def test_a_daemon_that_has_just_started_does_not_cry() -> None:
    fleet = fleet_of("e0")
    change(fleet, "e0", reachable=False, paused=None)
    assert {problem.severity for problem in found(fleet, now=1.0)} == {"degraded"}
    assert found(fleet, now=60.0)[0].severity == "critical"


def test_an_engine_that_came_back_after_its_trainer_went_needs_a_publish() -> None:
    fleet = fleet_of("e0", "e1")
    fleet.agents[rank("e1")].status = HELD
    (problem,) = found(fleet)
    assert problem.what == f"e1: answers nobody: it holds nothing, and no trainer holds {VERSION} any more"
    assert problem.fix == PUBLISH_FIRST
    staged = Staged(version=VERSION, bytes=0, convert_seconds=0.0, digest_seconds=0.0)
    enter(fleet, trainer(), staged=staged)
    fleet.memory.done[VERSION] = 1
    fleet.generation = 7
    (problem,) = found(fleet)
    assert problem.what.startswith(f"e1: answers nobody: it has not got {VERSION} yet, and waits for ")
    assert problem.fix == ""


def test_torn_comes_first_with_what_tore_it() -> None:
    fleet = fleet_of("e0", "e1")
    change(fleet, "e0", 900.0, "unreachable", reachable=False, error="refused")
    fleet.agents[rank("e1")].status = EngineStatus(applied=VERSION, torn=True)
    change(fleet, "e1", 950.0, "torn", paused=True, torn_by=NEXT)
    nobody, torn, lost = found(fleet)
    assert nobody.what == f"no engine serves {VERSION}"
    assert torn.what == f"e1: torn by {NEXT}, paused until a round has written all of it; waits for the next version"
    assert (torn.severity, torn.since, torn.fix) == (
        "critical", UNIX - 50, "publish: no trainer holds a version that could repair it",
    )  # fmt: skip
    assert (lost.what, lost.since) == ("e0: unreachable: refused", UNIX - 100)


def test_what_the_operator_wants_is_shown_with_the_command_that_ends_it() -> None:
    fleet = fleet_of("e0", "e1")
    fleet.memory.holds["e0"] = "ann@desk at noon: new driver"
    fleet.memory.maintenance = "bob: new switch"
    fleet.engines["e0"].paused = True
    maintenance, hold = found(fleet)
    assert maintenance.what == "maintenance: no round begins (bob: new switch)"
    assert maintenance.fix == "weightsync-orchestrator maintenance off"
    assert hold.what == "e0: held by the operator (ann@desk at noon: new driver)"
    assert hold.fix == "weightsync-orchestrator release e0"


def test_who_taints_whom_and_what_to_type() -> None:
    fleet = fleet_of("e0", "e1")
    fleet.unclosed[trainer(1), NAME] = Unclosed(5, "node3", "boot", {rank("e0"): 1}, outlived=True)
    fleet.unclosed[trainer(0), NAME] = Unclosed(6, "node3", "boot", {rank("e1"): 1})
    (problem,) = found(fleet)
    assert problem.what == "trainer/1 of round 3.4 may still write into e0: no round takes place there"
    assert problem.fix == ("end that process on node3; once it is dead: weightsync-orchestrator declare-dead trainer/1")


def test_who_is_left_out_why_how_often_and_until_when() -> None:
    fleet = fleet_of("e0", "e1")
    change(
        fleet, "e1", 990.0, "serving", failures=3, retry_at=NOW + 12, blamed_at=980.0, blame=Trouble("digest differs")
    )
    (problem,) = found(fleet)
    assert problem.what == "e1: left out of rounds, 3 times in a row, tried again in 12 s: digest differs"
    assert problem.since == UNIX - 20
    change(fleet, "e1", failures=1, blame=Trouble("e1: digest differs"))
    (problem,) = found(fleet)
    assert problem.what == "e1: left out of rounds, once, tried again in 12 s: digest differs"


def test_an_engine_that_cannot_be_reached_is_one_problem_with_what_to_do() -> None:
    """That rounds leave it out goes without saying, and to try at once would not help."""
    fleet = fleet_of("e0", "e1")
    refused = "engine e1: OPTIONS /pause: http://h:1 cannot be reached: Connection refused"
    change(fleet, "e1", 990.0, "unreachable", reachable=False, error=refused, failures=1, blame=Trouble("it is gone"))
    (problem,) = found(fleet)
    assert problem.what == "e1: unreachable: OPTIONS /pause: http://h:1 cannot be reached: Connection refused"
    assert problem.fix == REACH_IT
    change(fleet, "e1", error="it asks for a key. Fix: engines_admit.api_key_file")
    (problem,) = found(fleet)
    assert problem.fix == "", "it says so itself"


def test_why_an_engine_is_paused() -> None:
    fleet = fleet_of("e0", "e1")
    change(fleet, "e1", 990.0, "paused", paused=True, error="/resume: 500")
    (problem,) = found(fleet)
    assert problem.what == "e1: paused: to be resumed; its last call failed: /resume: 500"
    fleet.agents[rank("e1")].status = EngineStatus(applied=NEXT)
    assert f"paused: it holds {NEXT}, not {VERSION}" in found(fleet)[0].what


def test_what_else_keeps_versions_from_an_engine() -> None:
    fleet = fleet_of("e0", "e1", "e2", "e3")
    fleet.engines["e1"].misfit = "another model"
    fleet.leave(rank("e2"))
    fleet.agents[rank("e3")].dead_edges = {trainer(): "no route"}
    assert [problem.what for problem in found(fleet)] == [
        "e1: in no plan, its layout does not fit: another model",
        "e2: joining, 0 of ? ranks are here",
        "e3: in no round: e3/0 cannot be reached by trainer/0: no route",
    ]


def test_the_trainers_side() -> None:
    fleet = fleet_of("e0")
    enter(fleet, trainer(0), world=2)
    fleet.waiting_since[NEXT] = 900.0
    assert [problem.what for problem in found(fleet)] == [
        "1 of 2 trainer ranks are connected: no version can be staged",
        f"the publish of {NEXT} waits for not STAGED by trainer/0, trainer/1",
    ]
    fleet = fleet_of("e0")
    fleet.memory.failed[NEXT] = "too late"
    enter(fleet, trainer(), staged=Staged(version=NEXT, bytes=0, convert_seconds=0.0, digest_seconds=0.0))
    (problem,) = found(fleet)
    assert (problem.what, problem.fix) == (f"{NEXT} FAILED: too late", "publish it again, or another step")


def test_markers_that_are_not_believed() -> None:
    assert [problem.what for problem in found(fleet_of("e0"), "step_x: wrongly named")] == ["step_x: wrongly named"]


def test_a_thousand_engines_with_one_trouble_are_one_problem() -> None:
    names = [f"e{number}" for number in range(1000)]
    fleet = fleet_of("serves", *names)
    for name in names:
        change(fleet, name, reachable=False, error="refused")
    (problem,) = found(fleet)
    assert problem.what == "e0, e1, e2, e3, e4, e5, e6, e7 and 992 more: unreachable: refused"
    assert (problem.count, len(problem.about)) == (1000, 8)


def test_and_a_thousand_troubles_are_bounded() -> None:
    names = [f"e{number}" for number in range(1000)]
    fleet = fleet_of("serves", *names)
    for name in names:
        change(fleet, name, reachable=False, error=f"{name} " * 1000)
    views = found(fleet)
    assert len(views) == MAX_PROBLEMS
    assert views[-1].what == f"{1000 - MAX_PROBLEMS + 1} more"
    assert max(len(view.what) for view in views) < 600


def test_an_edge_that_is_slower_than_its_link_is_named_with_both_rates_and_what_to_look_at() -> None:
    fleet = fleet_of("e0")
    slow = SlowEdge("trainer/3 → e0/1", "rc_mlx5/mlx5_3:1", 1.2, 44.3)
    fleet.links = {
        "nvlink": LinkUse(edges=2, bytes=1, seconds=1.0),
        "nic": LinkUse(edges=64, bytes=1, seconds=1.0, slow=(slow,), slow_edges=5),
    }
    [problem] = found(fleet)
    assert problem.severity == "degraded"
    assert problem.what == (
        "trainer/3 → e0/1 moves 1.2 GB/s over nic (rc_mlx5/mlx5_3:1), which does 44.3, and 4 more of 64 edges are slow"
    )
    assert problem.fix == SLOW_LINKS["nic"]


def test_every_kind_of_link_that_can_be_slow_has_its_advice() -> None:
    assert SLOW_LINKS.keys() == RATES.keys()
