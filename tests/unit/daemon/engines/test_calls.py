"""Calls to engines end within their deadline, with one report each, whatever the engine does."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call, CallDone, CallFailed, Event
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.daemon.engines import kinds
from weightsync.orchestrator.daemon.engines.calls import Engines
from weightsync.orchestrator.daemon.engines.errors import EngineMisconfigured, EngineRefused
from weightsync.orchestrator.daemon.engines.interface import EngineSetup, HubAddress, RoundUpdate, Switch, Switched
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.protocol.proof import admin_key
from weightsync.orchestrator.settings.sections import EnginesAdmitSection, PauseSection
from weightsync.orchestrator.settings.settings import load

NAME, VERSION = RoundName(3, 9), Version(7, 42)


class Client:
    """An engine client that notes its calls, and does what ``behaviour`` says instead of answering."""

    behaviour: Any = None

    def __init__(self, setup: EngineSetup) -> None:
        self.name, self.setup = setup.name, setup
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            if self.behaviour is not None and name != "close":
                await self.behaviour()
            return Switched(False, 0.25) if name == "switch" else name == "is_paused"

        return call


async def for_ever() -> None:
    await asyncio.Event().wait()


async def refuses() -> None:
    raise EngineRefused("e0", "POST /pause", 500, "out of order")


async def breaks() -> None:
    raise KeyError("a bug in the client")


class Desk:
    """All engines, one of which there is, and what was reported about it."""

    def __init__(self, config: Path) -> None:
        self.reports: list[Event] = []
        self.inbox = Inbox(self.reports.extend)
        self.tokens = {"e0": ["its-own-0123456789", "any-0123456789"]}
        self.engines = Engines(load(config, {}), self.inbox, tokens=lambda name: self.tokens[name])
        self.client: Any = self.engines.clients["e0"]

    async def performs(self, call: Call, deadline: float = 5.0) -> Any:
        """The report of one call."""
        self.engines.call(CallEngine("e0", call, 8, deadline, NAME, VERSION, ((0, 55), (1, 66))))
        await asyncio.gather(*self.inbox._tasks)
        await asyncio.sleep(0)  # what was posted is decided in a turn of its own
        (report,) = self.reports
        assert isinstance(report, CallDone | CallFailed)
        assert (report.engine, report.call, report.number) == ("e0", call, 8)
        return report


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setitem(kinds.CLIENTS, "vllm", Client)
    monkeypatch.setattr(Client, "behaviour", None)
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: glm, directory: {tmp_path}}}
state_directory: {tmp_path / "state"}
listen: {{host: 127.0.0.1, port: 7000}}
credentials: {tmp_path / "credentials"}
engines: [{{name: e0, url: "http://127.0.0.1:1"}}]
""")
    return Desk(config)


@pytest.mark.parametrize(
    ("call", "methods", "paused"),
    [
        (Call.PROBE, ["probe", "is_paused"], True),
        (Call.ATTACH, ["attach"], None),
        (Call.PAUSE, ["pause"], True),
        (Call.UPDATE, ["update"], True),
        (Call.SWITCH, ["switch"], False),
        (Call.FINISH, ["finish"], True),
        (Call.RESUME, ["resume"], False),
    ],
)
async def test_each_call_asks_its_methods(desk: Desk, call: Call, methods: list[str], paused: bool | None) -> None:
    report = await desk.performs(call)
    assert isinstance(report, CallDone)
    assert report.paused is paused
    assert [name for name, *_ in desk.client.calls] == methods
    assert all(arguments[-1] == 5.0 for _, *arguments in desk.client.calls), "the command's deadline, and no other"


async def test_a_switch_names_the_processes_and_says_how_long_it_took(desk: Desk) -> None:
    report = await desk.performs(Call.SWITCH, 100.0)
    means = {0: 55, 1: 66}
    assert desk.client.calls == [("switch", Switch(NAME, VERSION, means, 100.0 * AGENT_SHARE), 100.0)]
    assert isinstance(report, CallDone)
    assert report.switch_seconds == 0.25


async def test_agents_are_told_where_to_go(desk: Desk, tmp_path: Path) -> None:
    await desk.performs(Call.ATTACH)
    hub = HubAddress("ws://127.0.0.1:7000/agents", "glm")
    assert desk.client.calls == [("attach", hub, 5.0)]


async def test_its_admin_keys_are_of_the_tokens_that_it_may_hold_now(desk: Desk) -> None:
    keys = desk.client.setup.admin_keys
    assert keys() == [admin_key(token, "glm", "e0") for token in ("its-own-0123456789", "any-0123456789")]
    desk.tokens = {"e0": ["new-0123456789"]}
    assert keys() == [admin_key("new-0123456789", "glm", "e0")]


async def test_the_switch_names_the_round_and_ends_before_the_daemon_gives_up(desk: Desk) -> None:
    await desk.performs(Call.UPDATE, 100.0)
    assert desk.client.calls == [("update", RoundUpdate(NAME, VERSION, 100.0 * AGENT_SHARE), 100.0)]
    assert 0 < AGENT_SHARE < 1


async def test_the_engine_is_told_the_version(desk: Desk) -> None:
    await desk.performs(Call.FINISH)
    assert desk.client.calls == [("finish", VERSION, 5.0)]


async def test_the_resume_names_the_processes_that_it_means(desk: Desk) -> None:
    await desk.performs(Call.RESUME)
    assert desk.client.calls == [("resume", {0: 55, 1: 66}, 5.0)]


async def test_the_pause_says_what_becomes_of_the_cache(desk: Desk) -> None:
    assert (desk.client.setup.pause_mode, desk.client.setup.cache) == ("keep", "recompute")


async def test_an_engine_that_refuses_is_a_report(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(refuses))
    report = await desk.performs(Call.PAUSE)
    assert isinstance(report, CallFailed)
    assert "out of order" in report.reason
    assert (report.fault, report.retry) == ("engine", True)


async def test_whose_fault_it_is_and_whether_to_try_again_is_the_errors_own(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lacks_a_route() -> None:
        raise EngineMisconfigured("e0", "probe", "the server has no /pause", "start it otherwise")

    monkeypatch.setattr(Client, "behaviour", staticmethod(lacks_a_route))
    report = await desk.performs(Call.PROBE)
    assert isinstance(report, CallFailed)
    assert (report.fault, report.retry) == ("config", False)


async def test_so_is_one_that_never_answers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(for_ever))
    report = await desk.performs(Call.PAUSE, 0.01)
    assert isinstance(report, CallFailed)
    assert report.reason == "no answer within 0.01 s"


async def test_so_is_a_client_that_breaks_its_contract(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(breaks))
    report = await desk.performs(Call.PAUSE)
    assert isinstance(report, CallFailed)
    assert "a bug in the client" in report.reason
    assert desk.inbox.failure is None


async def gives_up() -> None:
    raise asyncio.CancelledError


async def says_odd_things() -> None:
    raise RuntimeError("\ud800\n" * 9999)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [(gives_up, "gave the call up by itself"), (says_odd_things, "engine e0: pause: RuntimeError")],
)
async def test_whatever_happens_is_one_report_that_can_be_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, behaviour: Any, reason: str
) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(behaviour))
    report = await desk.performs(Call.PAUSE)
    assert isinstance(report, CallFailed)
    assert reason in report.reason
    assert (report.fault, report.retry) == ("daemon", True)
    assert len(report.reason.encode()) <= MAX_REASON_CHARS + 2
    assert desk.inbox.failure is None


async def test_closing_gives_up_what_is_under_way(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "behaviour", staticmethod(for_ever))
    desk.engines.call(CallEngine("e0", Call.PAUSE, 8, 60.0))
    await asyncio.sleep(0)
    await desk.inbox.close()
    await desk.engines.close()
    assert desk.reports == []
    assert desk.client.calls[-1] == ("close",)


async def test_an_engine_that_was_admitted_is_called_where_it_is_now(desk: Desk, tmp_path: Path) -> None:
    admitted = {"a0": Applicant(name="a0", urls=("http://127.0.0.1:2",))}
    desk.engines._admitted = lambda: admitted
    made: list[Any] = []

    async def probed() -> Event:
        desk.reports.clear()
        desk.engines.call(CallEngine("a0", Call.PROBE, 8, 5.0))
        await asyncio.gather(*desk.inbox._tasks)
        await asyncio.sleep(0)
        made.append(desk.engines._of_admitted["a0"][1] if "a0" in desk.engines._of_admitted else None)
        return desk.reports[0]

    assert isinstance(await probed(), CallDone)
    assert isinstance(await probed(), CallDone)
    assert made[0] is made[1]
    admitted["a0"] = Applicant(name="a0", urls=("http://127.0.0.1:3",))
    assert isinstance(await probed(), CallDone)
    assert [client.setup.url for client in made[1:]] == ["http://127.0.0.1:2", "http://127.0.0.1:3"]
    assert made[1].calls[-1] == ("close",)
    settings = desk.engines._settings.model_copy(update={"pause": PauseSection(mode="wait")})
    await desk.engines.replace({}, settings)
    assert made[2].calls[-1] == ("close",)
    assert isinstance(await probed(), CallDone)
    assert made[3].setup.pause_mode == "wait"
    admitted.clear()
    gone = await probed()
    assert isinstance(gone, CallFailed)
    assert "it is no member any more" in gone.reason
    assert made[4] is None
    await desk.engines.close()
    assert made[3].calls[-1] == ("close",)


async def test_a_key_of_admitted_engines_that_cannot_be_read_is_a_report(desk: Desk, tmp_path: Path) -> None:
    section = EnginesAdmitSection(names=("a*",), hosts=("h",), api_key_file=tmp_path / "absent")
    desk.engines._settings = desk.engines._settings.model_copy(update={"engines_admit": section})
    desk.engines._admitted = lambda: {"e1": Applicant(name="e1", urls=("http://127.0.0.1:2",))}
    desk.engines.call(CallEngine("e1", Call.PROBE, 8, 5.0))
    await asyncio.gather(*desk.inbox._tasks)
    await asyncio.sleep(0)
    (report,) = desk.reports
    assert isinstance(report, CallFailed)
    assert ("absent" in report.reason, report.fault) == (True, "config")
