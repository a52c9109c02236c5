"""The running daemon's answers: of its state, its journal and its plan."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from credentials import write_credentials
from fleets import policy_for
from weightsync.orchestrator.core.events import Event
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.records import Committed, RoundEnded, encode_record
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.policy import without_policy
from weightsync.orchestrator.daemon.admin.applications import Applications
from weightsync.orchestrator.daemon.admin.audit import Audit
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.live import LiveViews
from weightsync.orchestrator.daemon.admin.verbs import Verbs
from weightsync.orchestrator.daemon.admin.views import LayoutsView
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.daemon.journal_thread import AsyncJournal
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.settings import Settings, load

VERSION = Version(7, 41)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: glm, directory: {tmp_path / "run"}}}
state_directory: {tmp_path / "state"}
credentials: {tmp_path / "credentials"}
engines: [{{name: e0, url: "http://127.0.0.1:1", role: both}}]
""")
    return load(config, {})


class Daemon:
    """What the views look at."""

    def __init__(self, settings: Settings) -> None:
        self.fleet, _ = start(policy_for(["e0"], run_id="glm"), "j", [], 0.0)
        self.history = History()
        self.journal = AsyncJournal(Journal.open(settings.journal_path))
        self.problems: tuple[str, ...] = ()
        self.obstacle = ""
        self.layouts: LayoutsView | None = None
        parts: dict[str, Any] = {
            "markers": self,
            "meters": Meters(),
            "work": lambda: self.obstacle,
            "layouts": lambda run: self.layouts if run == "glm" else None,
        }
        self.asked: list[Event] = []
        self.views = LiveViews(
            settings=settings, fleet=self.fleet, history=self.history, journal=self.journal,
            verbs=Verbs(self.fleet, Audit(settings.state_directory), self.ask, lambda: 1),
            applications=Applications(self.fleet, self.ask, lambda: 1),
            access=Access(write_credentials(settings.credentials), "glm", str), **parts,
        )  # fmt: skip

    async def ask(self, event: Event) -> None:
        self.asked.append(event)


@pytest.fixture
async def daemon(settings: Settings) -> AsyncIterator[Daemon]:
    made = Daemon(settings)
    yield made
    await made.journal.close()


async def test_the_status_is_of_this_moment(daemon: Daemon) -> None:
    daemon.problems = ("step_x: wrongly named",)
    daemon.history.remember(Committed(round=RoundName(1, 1), version=VERSION, sequence=1), 9.0)
    status = await daemon.views.status()
    assert (status.run, status.source, status.journal_id) == ("glm", "daemon", "j")
    assert 0 < status.started <= status.unix_time
    assert status.committed is not None
    assert (status.committed.step, status.committed.unix_time) == (41, 9.0)
    assert "step_x: wrongly named" in [problem.what for problem in status.problems]
    assert [(engine.name, engine.url) for engine in status.engines] == [("e0", "http://127.0.0.1:1")]


async def test_rounds_come_from_the_journal(daemon: Daemon) -> None:
    for number in (1, 2, 3):
        ended = RoundEnded(
            round=RoundName(1, number), version=VERSION, attempt=1, engines=("e0",), left_out=(), outcome="failed",
            reason="r", bytes=0, descriptors=0, times={},
        )  # fmt: skip
        await daemon.journal.append([("RoundEnded", encode_record(ended)), ("Other", b"{}")])
    view = await daemon.views.rounds(2)
    assert (view.run, [row.round for row in view.rounds]) == ("glm", ["1.2", "1.3"])
    assert daemon.history.rounds == ()


async def test_it_is_ready_while_what_is_decided_is_done(daemon: Daemon) -> None:
    assert await daemon.views.obstacle() == ""
    daemon.obstacle = "the disk"
    assert await daemon.views.obstacle() == "the disk"
    daemon.fleet.stopping = True
    assert await daemon.views.obstacle() == "the daemon is stopping"


async def test_metrics_are_of_the_status_and_of_the_meters(daemon: Daemon) -> None:
    text = (await daemon.views.metrics()).decode()
    assert 'weightsync_engine_torn{engine="e0",role="both"} 0.0' in text
    assert "weightsync_loop_lag_seconds_count 0.0" in text


async def test_layouts_are_the_plans(daemon: Daemon) -> None:
    assert await daemon.views.layouts() is None
    daemon.layouts = LayoutsView(run="glm", root="f", parties=())
    assert await daemon.views.layouts() == daemon.layouts


async def test_each_of_their_routes_has_a_policy(daemon: Daemon) -> None:
    app = web.Application()
    daemon.views.add_routes(app)
    assert list(without_policy(app)) == []
    paths = {resource.canonical for resource in app.router.resources()}
    assert paths == {
        "/healthz", "/readyz", "/status", "/rounds", "/metrics", "/plan/layouts", "/engines/{engine}/ready",
        "/verbs/{verb}", "/engines",
    }  # fmt: skip


async def test_whether_an_engine_is_ready(daemon: Daemon) -> None:
    assert await daemon.views.ready("e0") == (False, "joining")
    assert await daemon.views.ready("e9") is None
