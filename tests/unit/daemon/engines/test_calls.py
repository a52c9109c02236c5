"""Calls to engines end within their deadline, with one report each, whatever the engine does."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call, CallDone, CallFailed
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.daemon.engines import calls as shell
from weightsync.orchestrator.daemon.engines.calls import Engines, token
from weightsync.orchestrator.daemon.engines.vllm import EngineFacts, EngineLacksRoute, EngineRefused
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.settings import load

NAME, VERSION = RoundName(3, 9), Version(7, 42)


class Client:
    """In the place of an EngineClient: it notes its calls, and does what ``behaviour`` says instead of answering."""

    behaviour: Any = None

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name
        self.calls: list[tuple[Any, ...]] = []
        self.facts: EngineFacts | None = EngineFacts(frozenset(), 4)

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            if self.behaviour is not None and name != "close":
                await self.behaviour()
            return name == "is_paused"

        return call


async def for_ever() -> None:
    await asyncio.Event().wait()


async def refuses() -> None:
    raise EngineRefused("e0", "POST /pause", 500, "out of order")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(shell, "EngineClient", Client)
    monkeypatch.setattr(Client, "behaviour", None)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: glm, directory: {tmp_path}}}
state_directory: {tmp_path / "state"}
listen: {{host: 127.0.0.1, port: 7000, token_file: {tmp_path / "token"}}}
engines: [{{name: e0, url: "http://127.0.0.1:1"}}]
""")
    reports: list[CallDone | CallFailed] = []
    ids = itertools.count(1)
    made = Engines(load(config, {}), lambda: next(ids), reports.append)
    made.reports = reports  # type: ignore[attr-defined]
    return made


async def performed(engines: Any, call: Call, deadline: float = 5.0) -> tuple[CallDone | CallFailed, list[Any]]:
    """The report and the client's calls."""
    engines.call(CallEngine("e0", call, 8, deadline, NAME, VERSION))
    await asyncio.gather(*engines._tasks)
    (report,) = engines.reports
    assert (report.engine, report.call, report.number) == ("e0", call, 8)
    return report, engines.clients["e0"].calls


@pytest.mark.parametrize(
    ("call", "routes", "paused"),
    [
        (Call.PROBE, ["probe", "is_paused"], True),
        (Call.ATTACH, ["init_transfer"], None),
        (Call.PAUSE, ["pause"], True),
        (Call.SWITCH, ["start_update", "update"], True),
        (Call.FINISH, ["finish_update"], True),
        (Call.RESUME, ["resume"], False),
    ],
)
async def test_each_call_asks_its_routes(engines: Any, call: Call, routes: list[str], paused: bool | None) -> None:
    report, calls = await performed(engines, call)
    assert isinstance(report, CallDone)
    assert report.paused is paused
    assert [name for name, *_ in calls] == routes


async def test_agents_are_told_where_to_go(engines: Any) -> None:
    _, ((_, info, _),) = await performed(engines, Call.ATTACH)
    assert info["hub_url"] == "ws://127.0.0.1:7000/agents"
    assert (info["run_id"], info["engine"], info["world"]) == ("glm", "e0", 4)


async def test_the_update_names_the_round_and_ends_before_the_daemon_gives_up(engines: Any) -> None:
    _, (_, (_, info, deadline)) = await performed(engines, Call.SWITCH, 100.0)
    assert info == {
        "token": "3.9", "round_epoch": 3, "round_number": 9, "generation": 7, "step": 42,
        "deadline_seconds": 100.0 * AGENT_SHARE,
    }  # fmt: skip
    assert info["deadline_seconds"] < deadline == 100.0
    assert token(RoundName(3, 9)) != token(RoundName(39, 9)) != token(RoundName(3, 99))


async def test_the_pause_says_what_becomes_of_the_cache(engines: Any) -> None:
    _, (pause,) = await performed(engines, Call.PAUSE)
    assert pause == ("pause", "keep", True, 5.0)


async def test_an_engine_that_refuses_is_a_report(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(refuses))
    report, _ = await performed(engines, Call.PAUSE)
    assert isinstance(report, CallFailed)
    assert "out of order" in report.reason
    assert (report.fault, report.retry) == ("engine", True)


async def test_whose_fault_it_is_and_whether_to_try_again_is_the_errors_own(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lacks_a_route() -> None:
        raise EngineLacksRoute("e0", "probe", "the server has no /pause", "start it otherwise")

    monkeypatch.setattr(Client, "behaviour", staticmethod(lacks_a_route))
    report, _ = await performed(engines, Call.PROBE)
    assert isinstance(report, CallFailed)
    assert (report.fault, report.retry) == ("config", False)


async def test_so_is_one_that_never_answers(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(for_ever))
    report, _ = await performed(engines, Call.PAUSE, 0.01)
    assert isinstance(report, CallFailed)
    assert report.reason == "no answer within 0.01 s"


async def test_closing_gives_up_what_is_under_way(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(for_ever))
    engines.call(CallEngine("e0", Call.PAUSE, 8, 60.0))
    await asyncio.sleep(0)
    await engines.close()
    assert engines.reports == []
    assert engines.clients["e0"].calls[-1] == ("close",)
