"""A second kind of engine takes part in a whole round, and nothing outside this file knows of it.

It is unlike vLLM in all that the seam leaves open: scheduler and rank are one process and one thread, the routes are
others, its pause has other modes, is acknowledged before it holds and cannot be asked for, and only the server knows
the version's name. The daemon (journal, hub, planner, markers), the HTTP and the control connections are the real ones;
bytes are moved by assignment.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from ports import free_port
from weightsync.agents.link.client import ControlClient
from weightsync.orchestrator.core.records import Committed, decode_record
from weightsync.orchestrator.daemon.engines import kinds
from weightsync.orchestrator.daemon.engines.errors import EngineMisconfigured
from weightsync.orchestrator.daemon.engines.http import EngineHttp
from weightsync.orchestrator.daemon.engines.interface import (
    EngineFacts,
    EngineSetup,
    HubAddress,
    RoundUpdate,
    Switch,
    Switched,
)
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.daemon.runner import Runner
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Lands, Layout, Region, Tensor, row
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import decode_manifest, encode_manifest, manifest
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Closed,
    Commit,
    Connect,
    EngineStatus,
    Expose,
    Exposed,
    FromDaemon,
    Grant,
    Hello,
    Left,
    Outcome,
    Quiesced,
    Ready,
    Staged,
    TrainerStatus,
    Verified,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName, Version
from weightsync.orchestrator.settings.settings import Settings, load

SECONDS = 20.0
"""Nothing here takes so long; a test that would wait for ever fails by it."""

RANK, TRAINER = Member("inference", "sg", 0), Member("trainer", "", 0)
VERSION = Version(9, 5)
INCARNATION = 2**62 + 1
OLD, NEW = b"\x01" * 128, bytes(range(128))


def layout(base: int, lands: Lands = "live") -> Layout:
    """One tensor of 8 × 8 bfloat16, dense, at address ``base``; in mode ``copy`` with 64 KiB for what arrives."""
    box = row(0, 0, 0, (0, 0), (8, 8), (16, 2))
    rows = np.asarray([box], dtype="<i8").tobytes()
    tensors, weights = (Tensor("w", "bfloat16", (8, 8)),), Region(base, len(NEW))
    if lands == "live":
        return Layout(tensors, (weights,), rows)
    return Layout(tensors, (weights, Region(base + (1 << 20), 1 << 16)), rows, staging=1, lands=lands)


def digest(data: bytes) -> Digest:
    found = hashlib.sha256(data).digest()
    return int.from_bytes(found[:8]), int.from_bytes(found[8:16])


# ---------------------------------------------------------------------------------------------------------- the engine
class OneProcess:
    """A server whose scheduler is its only rank. Held from its start; it runs steps while ``paused`` is false.

    In mode ``copy`` what arrives lands beside its weights, and is what stands by until the server is asked to switch.
    """

    def __init__(self, lands: Lands = "live") -> None:
        self.lands = lands
        self.landing = b""
        self.standby: Version | None = None
        self.paused, self.weights, self.weight_version = True, OLD, "default"
        self.token_file = Path()
        """In the engine's own configuration: nobody says over the wire where it is."""
        self.asked: list[tuple[str, Any]] = []
        self.ran_with: set[bytes] = set()
        self.applied: Version | None = None
        self.window: RoundName | None = None
        self.left: asyncio.Future[bool] | None = None
        self.agent: ControlClient | None = None
        self.running: asyncio.Task[None] | None = None

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, body))
        loop = asyncio.get_running_loop()
        match request.path:
            case "/server_info":
                return web.json_response({"version": "0.5.15", "tp_size": 1})
            case "/pause_generation":
                loop.call_soon(setattr, self, "paused", True)  # the answer says "sent", not "done"
            case "/continue_generation":
                assert body == {"incarnation": INCARNATION}, "another process is meant"
                self.paused = False
                self.ran_with.add(self.weights)
            case "/update_weight_version":
                self.weight_version = body["new_version"]
            case "/weightsync/attach":
                if self.agent is None:
                    self.agent = ControlClient(body["url"], self.token_file, self.hello, self.hear)
                    self.running = asyncio.create_task(self.agent.run())
            case "/weightsync/update":
                assert self.agent is not None
                assert self.paused, "a window opens between two steps"
                self.window, self.left = RoundName(*body["round"]), loop.create_future()
                self.agent.send(Quiesced(round=self.window))
                return web.Response(status=200 if await self.left else 500)
            case "/weightsync/switch":
                assert self.agent is not None
                assert self.standby == VERSION
                self.weights, self.applied, self.standby = self.landing, self.standby, None
                self.weight_version = body["step"]
                self.agent.send(Left(round=RoundName(*body["round"]), status=self.status))
                return web.json_response({"paused": self.paused, "seconds": 0.001})
        return web.json_response({"status": "sent"})

    @property
    def status(self) -> EngineStatus:
        told = digest(self.landing) if self.standby is not None else NO_BYTES
        return EngineStatus(self.applied, self.window, standby=self.standby, standby_digest=told)

    def arrives(self, data: bytes) -> None:
        """A write."""
        if self.lands == "copy":
            self.landing = data
        else:
            assert self.paused
            self.weights = data

    def hello(self) -> Hello:
        return Hello(
            schema=SCHEMA_VERSION, run_id="run", member=RANK, world=1, incarnation=INCARNATION, engine=self.status
        )

    def hear(self, message: FromDaemon) -> None:
        assert self.agent is not None
        match message:
            case Welcome():
                self.agent.send(Announce(layout=layout(1 << 30, self.lands), endpoint_name="sg"))
            case Connect():
                self.agent.send(Ready(fingerprint=message.fingerprint))
            case Expose():
                self.agent.send(Exposed(round=message.round))
            case Verify():
                found, size = digest(self.landing or self.weights), len(NEW)
                self.standby = message.version if self.lands == "copy" else None
                self.agent.send(
                    Verified(round=message.round, digest=found, bytes=size, apply_seconds=0.0, digest_seconds=0.0)
                )
            case Commit() | Abort():
                assert self.left is not None
                self.applied = message.version if isinstance(message, Commit) else self.applied
                self.window = None
                self.agent.send(Left(round=message.round, status=EngineStatus(self.applied)))
                self.left.set_result(isinstance(message, Commit))

    async def close(self) -> None:
        if self.agent is not None and self.running is not None:
            await self.agent.close()
            await self.running


class OneProcessClient:
    """Its side of the seam; see ``interface.EngineClient``."""

    MODES = {"keep": "in_place", "abort": "abort"}  # noqa: RUF012

    def __init__(self, setup: EngineSetup) -> None:
        self.name, self._setup = setup.name, setup
        self._http = EngineHttp(setup.name, setup.url, setup.api_key)

    async def probe(self, deadline: float) -> EngineFacts:
        if self._setup.pause_mode not in self.MODES:
            what = f"it cannot pause with mode {self._setup.pause_mode}"
            raise EngineMisconfigured(self.name, "probe", what, "set pause.mode to keep or abort")
        info = json.loads(await self._http.exchange("GET", "/server_info", deadline, idempotent=True))
        return EngineFacts(f"one process {info['version']}", info["tp_size"])

    async def attach(self, hub: HubAddress, deadline: float) -> None:
        await self._post("/weightsync/attach", deadline, {"url": hub.url})

    async def pause(self, deadline: float) -> None:
        await self._post("/pause_generation", deadline, {"mode": self.MODES[self._setup.pause_mode]})

    async def update(self, update: RoundUpdate, deadline: float) -> None:
        body = {"round": [update.round.epoch, update.round.number], "step": update.version.step}
        await self._post("/weightsync/update", deadline, body)

    async def switch(self, switch: Switch, deadline: float) -> Switched:
        body = {"round": [switch.round.epoch, switch.round.number], "step": switch.version.step}
        answer = await self._http.exchange("POST", "/weightsync/switch", deadline, body=body, idempotent=True)
        return Switched(**json.loads(answer))

    async def landing(self, deadline: float) -> tuple[str, ...]:
        return ()

    async def finish(self, version: Version, deadline: float) -> None:
        await self._post("/update_weight_version", deadline, {"new_version": str(version.step)})

    async def resume(self, incarnations: Mapping[int, int], deadline: float) -> None:
        await self._post("/continue_generation", deadline, {"incarnation": incarnations[0]})

    async def is_paused(self, deadline: float) -> bool | None:
        return None

    async def close(self) -> None:
        await self._http.close()

    async def _post(self, path: str, deadline: float, body: dict[str, object]) -> None:
        await self._http.exchange("POST", path, deadline, body=body, idempotent=False)


# ------------------------------------------------------------------------------------------------------- around it
class Trainer:
    """The one rank of a trainer, which stages VERSION as soon as it is connected."""

    def __init__(self, url: str, token: Path, engine: OneProcess) -> None:
        self.engine = engine
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.agent = ControlClient(url, token, self.hello, self.hear)
        self.running = asyncio.create_task(self.agent.run())

    def hello(self) -> Hello:
        return Hello(
            schema=SCHEMA_VERSION, run_id="run", member=TRAINER, world=1, incarnation=2, generation=VERSION.generation,
            trainer=TrainerStatus(),
        )  # fmt: skip

    def hear(self, message: FromDaemon) -> None:
        match message:
            case Welcome():
                self.agent.send(Announce(layout=layout(1 << 20), endpoint_name="trainer"))
            case Connect():
                self.agent.send(Ready(fingerprint=message.fingerprint))
                self.agent.send(Staged(version=VERSION, bytes=len(NEW), convert_seconds=0.0, digest_seconds=0.0))
            case Grant():
                assert message.members == (RANK,)
                self.engine.arrives(NEW)
                moved = PeerTransfer(RANK, len(NEW), 1, 0.001, digest(NEW))
                self.agent.send(Closed(round=message.round, peers=(moved,)))
            case Outcome():
                self.outcome.set_result(message)

    async def close(self) -> None:
        await self.agent.close()
        await self.running


def settings_for(directory: Path, url: str, mode: str = "keep") -> Settings:
    write_credentials(directory / "credentials")
    (directory / "run").mkdir(exist_ok=True)
    config = directory / "config.yaml"
    config.write_text(f"""
run: {{id: run, directory: {directory / "run"}}}
state_directory: {directory / "state"}
listen: {{host: 127.0.0.1, port: {free_port()}}}
credentials: {directory / "credentials"}
engines: [{{name: sg, kind: one-process, url: "{url}"}}]
pause: {{mode: {mode}}}
""")
    return load(config, {})


@contextlib.asynccontextmanager
async def served(engine: OneProcess) -> AsyncIterator[str]:
    """The engine's URL."""
    app = web.Application()
    for path in ("/pause_generation", "/continue_generation", "/update_weight_version", "/weightsync/{what}"):
        app.router.add_post(path, engine.handle)
    app.router.add_get("/server_info", engine.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await engine.close()
        await runner.cleanup()


@contextlib.asynccontextmanager
async def daemon(settings: Settings) -> AsyncIterator[int]:
    """A daemon with ``settings``; its port."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    runner = Runner(settings)
    task = asyncio.create_task(runner.run(port.set_result))
    try:
        yield await asyncio.wait_for(port, SECONDS)
    finally:
        runner.inbox.stopped.set()
        await asyncio.wait_for(task, SECONDS)


async def engine_view(port: int, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The engine in ``/status``, once it is as ``holds`` says."""

    async def look(session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get(f"http://127.0.0.1:{port}/status") as answer:
            found: dict[str, Any] = (await answer.json())["engines"][0]
            return found

    async with (
        asyncio.timeout(SECONDS),
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKENS['operator']}"}) as session,
    ):
        while not holds(view := await look(session)):  # noqa: ASYNC110  (what a client sees has no event)
            await asyncio.sleep(0.01)
    return view


@pytest.fixture
def _second_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.CLIENTS, "one-process", OneProcessClient)


# ---------------------------------------------------------------------------------------------------------- the proof
@pytest.mark.usefixtures("_second_kind")
async def test_a_version_lands_beside_the_weights_of_another_engine(tmp_path: Path) -> None:
    engine = OneProcess("copy")
    engine.token_file = tmp_path / "credentials" / "engine.token"
    async with served(engine) as url, daemon(settings_for(tmp_path, url)) as port:
        trainer = Trainer(f"ws://127.0.0.1:{port}/agents", tmp_path / "credentials" / "trainer.token", engine)
        step = tmp_path / "run" / "broadcasts" / "step_5"
        step.mkdir(parents=True)
        (step / "STABLE").write_bytes(encode_manifest(manifest("run", VERSION)))
        outcome = await asyncio.wait_for(trainer.outcome, SECONDS)
        view = await engine_view(port, lambda view: view["state"] == "serving")
        await trainer.close()
    assert (outcome.version, outcome.committed, outcome.sequence) == (VERSION, True, 1)
    assert (view["version"]["step"], view["paused"], view["mode"], view["standby"]) == (5, False, "copy", None)
    told = [path for path, _ in engine.asked if path not in ("/server_info", "/weightsync/attach")]
    assert told == ["/pause_generation", "/weightsync/switch", "/continue_generation"]
    assert (engine.weights, engine.weight_version, engine.ran_with) == (NEW, 5, {NEW})


@pytest.mark.usefixtures("_second_kind")
async def test_a_version_is_committed_on_another_engine(tmp_path: Path) -> None:
    engine = OneProcess()
    engine.token_file = tmp_path / "credentials" / "engine.token"
    async with served(engine) as url:
        settings = settings_for(tmp_path, url)
        async with daemon(settings) as port:
            trainer = Trainer(f"ws://127.0.0.1:{port}/agents", tmp_path / "credentials" / "trainer.token", engine)
            step = tmp_path / "run" / "broadcasts" / "step_5"
            step.mkdir(parents=True)
            (step / "STABLE").write_bytes(encode_manifest(manifest("run", VERSION)))
            outcome = await asyncio.wait_for(trainer.outcome, SECONDS)
            view = await engine_view(port, lambda view: view["state"] == "serving")
            await trainer.close()
    assert (outcome.version, outcome.committed, outcome.sequence) == (VERSION, True, 1)
    assert (view["version"]["step"], view["paused"], view["error"]) == (5, False, "")
    told = [entry for entry in engine.asked if entry[0] not in ("/server_info", "/weightsync/attach")]
    assert told == [
        ("/pause_generation", {"mode": "in_place"}),
        ("/weightsync/update", {"round": [1, 1], "step": 5}),
        ("/update_weight_version", {"new_version": "5"}),
        ("/continue_generation", {"incarnation": INCARNATION}),
    ]
    assert (engine.weights, engine.weight_version, engine.applied) == (NEW, "5", VERSION)
    assert engine.ran_with == {NEW}, "no step was taken with anything else"
    committed = decode_manifest((step / "COMMITTED").read_bytes())
    assert committed is not None
    assert committed.version == VERSION
    with Journal.read_only(settings.journal_path) as journal:
        (record,) = [decode_record(entry.body) for entry in journal.entries(["Committed"])]
    assert record == Committed(round=RoundName(1, 1), version=VERSION, sequence=1)


@pytest.mark.usefixtures("_second_kind")
async def test_settings_that_it_cannot_serve_are_said_by_its_probe(tmp_path: Path) -> None:
    async with served(OneProcess()) as url, daemon(settings_for(tmp_path, url, mode="wait")) as port:
        view = await engine_view(port, lambda view: bool(view["error"]))
    assert view["state"] == "unreachable"
    assert "it cannot pause with mode wait. Fix: set pause.mode to keep or abort" in view["error"]
