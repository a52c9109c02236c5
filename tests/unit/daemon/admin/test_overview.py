"""The state of an engine in one word, and since when."""

import time
from pathlib import Path
from typing import Any

import pytest
from fleets import policy_for
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.records import Committed
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Unclosed
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.overview import Overview, left_out_of
from weightsync.orchestrator.daemon.admin.views import LeftOutView, TrainerView, VersionView
from weightsync.orchestrator.protocol.layout import Layout, LeftOut
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import Announce, EngineStatus, Hello, Staged
from weightsync.orchestrator.protocol.names import Member, RoundName, Version
from weightsync.orchestrator.settings.settings import load

MEMBER, VERSION = Member("inference", "e0", 0), Version(7, 1)
HELLO = Hello(schema=SCHEMA_VERSION, run_id="run", member=MEMBER, world=1, incarnation=1)


def fleet_with(status: EngineStatus | None, **engine: Any) -> Fleet:
    """One engine; ``status`` is its only rank's, None without one."""
    fleet, _ = start(policy_for(["e0"]), "j", [], 0.0)
    if status is not None:
        fleet.enter(ConnectedAgent(MEMBER, 1, HELLO, Announce(layout=Layout((), (), b"")), status=status))
    fleet.memory.committed = VERSION
    for name, value in {"reachable": True, **engine}.items():
        setattr(fleet.engines["e0"], name, value)
    return fleet


SERVING = EngineStatus(applied=VERSION)


# ------------------------------------------------------------------------------------------------------------- status
@pytest.fixture
def overview(tmp_path: Path) -> Overview:
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: run, directory: {tmp_path / "run"}}}
state_directory: {tmp_path / "state"}
credentials: {tmp_path / "credentials"}
engines: [{{name: e0, url: "http://127.0.0.1:1"}}]
""")
    return Overview(load(config, {}), started_unix=5.0)


def test_an_engine_in_the_status(overview: Overview) -> None:
    fleet = fleet_with(SERVING, paused=False, error="it was slow once")
    (engine,) = overview.status(fleet, History(), (), now=0.0).engines
    assert (engine.name, engine.url, engine.role, engine.state) == ("e0", "http://127.0.0.1:1", "both", "serving")
    assert (engine.ranks_connected, engine.ranks_expected, engine.paused, engine.torn) == (1, 1, False, False)
    assert engine.version is not None
    assert (engine.version.step, engine.error) == (VERSION.step, "it was slow once")
    fleet.engines["e0"].misfit = "its layout is another model's"
    assert overview.status(fleet, History(), (), now=0.0).engines[0].error == "its layout is another model's"


def test_who_was_torn_when_it_was_lost_is_so_until_it_says_otherwise(overview: Overview) -> None:
    fleet = fleet_with(EngineStatus(applied=VERSION, torn=True), paused=True)
    fleet.leave(MEMBER)
    assert overview.status(fleet, History(), (), now=0.0).engines[0].torn, "or its alert ends while it is worst"
    fleet.enter(ConnectedAgent(MEMBER, 2, HELLO, status=SERVING))
    assert not overview.status(fleet, History(), (), now=0.0).engines[0].torn


def test_an_engine_shows_how_it_lands_and_why(overview: Overview) -> None:
    fleet = fleet_with(SERVING)
    layout = Layout((), (), b"", lands="copy", lands_because="10 MiB are\nthere")
    fleet.enter(ConnectedAgent(MEMBER, 1, HELLO, Announce(layout=layout), status=SERVING))
    (engine,) = overview.status(fleet, History(), (), now=0.0).engines
    assert (engine.mode, engine.mode_because) == ("copy", "10 MiB are there")


def test_since_when_comes_from_the_core_however_late_somebody_asks(
    overview: Overview, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    fleet = fleet_with(SERVING, paused=False)
    fleet.words = {"e0": ("serving", 20.0)}
    assert overview.status(fleet, History(), (), now=50.0).engines[0].since == 970.0
    fleet.engines["e0"].paused = True
    assert overview.status(fleet, History(), (), now=50.0).engines[0].since == 1000.0, "it is news"


def test_what_a_publish_waits_for(overview: Overview) -> None:
    fleet = fleet_with(SERVING, paused=False)
    fleet.waiting_since[Version(7, 2)] = 3.0
    (waiting,) = overview.status(fleet, History(), (), now=4.0).waiting
    assert (waiting.version.step, waiting.waits_for) == (2, "a trainer: none is connected")


def test_a_round_under_way(overview: Overview) -> None:
    fleet = fleet_with(SERVING, paused=True)
    assert overview.status(fleet, History(), (), now=12.0).round is None
    fleet.round = Round(
        RoundName(1, 4), VERSION, 2, False, {"e0": Progress()}, {MEMBER: 1}, {}, phase=Phase.QUIESCING, began=10.0,
        phase_began=11.0,
    )  # fmt: skip
    progress = overview.status(fleet, History(), (), now=12.5).round
    assert progress is not None
    assert (progress.round, progress.phase, progress.attempt, progress.elapsed_seconds) == ("1.4", "quiescing", 2, 2.5)
    assert (progress.phase_seconds, progress.waits_for) == (1.5, str(MEMBER))
    assert (progress.version.step, progress.version.generation) == (VERSION.step, VERSION.generation)


def test_what_is_committed_is_what_is_durable(overview: Overview) -> None:
    """The core knows of a commit before the journal does; nobody is shown it earlier."""
    fleet, history = fleet_with(SERVING), History()
    assert overview.status(fleet, history, (), now=0.0).committed is None
    history.remember(Committed(round=RoundName(1, 1), version=VERSION, sequence=2), 9.0)
    committed = overview.status(fleet, history, ("a problem",), now=0.0).committed
    assert committed is not None
    assert (committed.step, committed.sequence, committed.unix_time) == (VERSION.step, 2, 9.0)


def test_a_trainer_rank(overview: Overview) -> None:
    fleet, member = fleet_with(SERVING), Member("trainer", "", 3)
    hello = Hello(schema=SCHEMA_VERSION, run_id="run", member=member, world=4, incarnation=2, host="node7", pid=77)
    fleet.enter(ConnectedAgent(member, 2, hello))

    def trainer() -> TrainerView:
        (only,) = overview.status(fleet, History(), (), now=0.0).trainers
        return only

    assert (trainer().rank, trainer().host, trainer().pid, trainer().state) == (3, "node7", 77, "connected")
    fleet.agents[member].staged = Staged(version=VERSION, bytes=0, convert_seconds=0.0, digest_seconds=0.0)
    assert trainer().state == "staged"
    assert trainer().staged == VersionView(step=VERSION.step, generation=VERSION.generation)
    fleet.unclosed[member, RoundName(1, 1)] = Unclosed(2, "", "", {MEMBER: 1})
    assert trainer().state == "writing"


def test_an_error_is_shown_with_whose_fault_it_is(overview: Overview) -> None:
    fleet = fleet_with(SERVING, error="connection refused", fault="network")
    (engine,) = overview.status(fleet, History(), (), now=0.0).engines
    assert (engine.error, engine.fault) == ("connection refused", "network")


def leaves_out(*entries: LeftOut) -> Layout:
    return Layout((), (), b"", left_out=entries)


def test_what_all_ranks_of_an_engine_leave_out() -> None:
    """Expert 1 is on the first rank and expert 0 on the second: the engine needs both, and only the MTP layer not."""
    buffer = LeftOut("unwritten", "a buffer", ("cache",), 1)
    first = leaves_out(buffer, LeftOut("unneeded", "nothing", ("expert.0", "mtp"), 2))
    second = leaves_out(
        buffer, LeftOut("unprobed", "unknown", ("conv",), 7), LeftOut("unneeded", "nothing", ("expert.1", "mtp"), 2)
    )
    assert list(left_out_of([first, second])) == [
        LeftOutView(kind="unwritten", reason="a buffer", names=("cache",), count=1),
        LeftOutView(kind="unneeded", reason="nothing", names=("mtp",), count=1),
        LeftOutView(kind="unprobed", reason="unknown", names=("conv",), count=7),
    ]
    assert list(left_out_of([first, leaves_out(buffer)]))[1:] == []
    assert list(left_out_of([])) == []
