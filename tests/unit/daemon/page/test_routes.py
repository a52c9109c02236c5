"""The page's routes behind the guard; who may use which is walked in ``access/test_policy.py``."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from fleets import policy_for
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.policy import without_policy
from weightsync.orchestrator.daemon.admin.audit import NAME, Audit, AuditLine
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.views import StatusView
from weightsync.orchestrator.daemon.page import stream as streams
from weightsync.orchestrator.daemon.page.routes import Page
from weightsync.orchestrator.daemon.page.timeline import EdgeRate, Timeline


async def status() -> StatusView:
    return StatusView(run="glm", state="well")


class Served:
    def __init__(self, directory: Path) -> None:
        self.directory, self.plan = directory, None
        fleet, _ = start(policy_for(["e0"]), "j", [], 0.0)
        self.page = Page(
            fleet=fleet, history=History(), timeline=Timeline(), status=status, plan=lambda: self.plan,
            directory=directory,
        )  # fmt: skip
        self.app = web.Application()
        Access(write_credentials(directory / "credentials"), "glm", str).guard.install(self.app)
        self.page.add_routes(self.app)
        self.url = ""

    async def get(self, path: str, role: str = "viewer") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {TOKENS[role]}"}
        async with aiohttp.ClientSession() as session, session.get(self.url + path, headers=headers) as answer:
            return answer.status, await (answer.json() if answer.content_type == "application/json" else answer.text())


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path)
    runner = web.AppRunner(made.app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    made.page.stream.end()
    await runner.cleanup()


def test_each_has_a_policy(tmp_path: Path) -> None:
    assert list(without_policy(Served(tmp_path).app)) == []


@pytest.mark.parametrize(("role", "acts"), [("viewer", False), ("operator", True)])
async def test_the_stream_says_whether_the_credential_may_act(served: Served, role: str, acts: bool) -> None:
    headers = {"Authorization": f"Bearer {TOKENS[role]}"}
    async with aiohttp.ClientSession() as session, session.get(served.url + "/stream", headers=headers) as answer:
        assert await answer.content.readline() == b"event: viewer\n"
        said = f'data: {{"credential":"{role}","acts":{str(acts).lower()}}}\n'
        assert await answer.content.readline() == said.encode()


async def test_one_page_too_many_is_told_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_PAGES", 0)
    assert await served.get("/stream") == (503, "0 pages are open already; close some\n")


async def test_the_plan_and_its_rates(served: Served, plan: Any) -> None:
    assert await served.get("/plan/explanation") == (
        404, "there is no plan yet: it is made when trainer and engines have met\n",
    )  # fmt: skip
    served.plan = plan
    code, found = await served.get("/plan/explanation")
    assert (code, found["root"]) == (200, plan.root)
    assert await served.get("/plan/rates") == (200, {"edges": []})


async def test_rates_are_put_together_once_for_each_round(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = served.page._timeline
    times = []
    monkeypatch.setattr(timeline, "rates", lambda: times.append(1) or (EdgeRate("trainer/0", "e0/0", len(times), 1.0),))
    for _ in range(3):
        assert await served.get("/plan/rates") == (200, {"edges": [["trainer/0", "e0/0", 1, 1.0]]})
    timeline.ended += 1
    assert await served.get("/plan/rates") == (200, {"edges": [["trainer/0", "e0/0", 2, 1.0]]})


async def test_the_audit_log(served: Served) -> None:
    assert await served.get("/audit") == (200, {"lines": []})
    line = AuditLine(
        time="t", who="<b>ann</b>", address="::1", credential="operator", verb="hold", target="e0", reason="r",
        result="ok",
    )  # fmt: skip
    await asyncio.to_thread(Audit(served.directory).append, line)
    code, found = await served.get("/audit")
    assert (code, [(one["number"], one["who"]) for one in found["lines"]]) == (200, [(1, "<b>ann</b>")])
    (served.directory / NAME).unlink()
    (served.directory / NAME).mkdir()
    code, text = await served.get("/audit")
    assert code == 503
    assert text.startswith("the audit log cannot be read: ")
