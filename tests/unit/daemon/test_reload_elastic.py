"""Engines come and go while the daemon runs: a real daemon, real sockets, engines and a trainer that stand in."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from credentials import TOKENS
from weightsync.agents.link.applicant import ApplicantThread
from weightsync.orchestrator.daemon.engines import kinds
from weightsync.orchestrator.daemon.runner import Runner
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.markers import encode_manifest, manifest
from weightsync.orchestrator.settings.settings import load

from tests.unit.daemon.engines.test_second_engine import (
    NEW,
    RANK,
    SECONDS,
    VERSION,
    OneProcess,
    OneProcessClient,
    Trainer,
    served,
    settings_for,
)


class Fleet:
    """A daemon whose only engines are those in a file, or by ``more`` of its configuration."""

    def __init__(self, directory: Path, url: str, more: str = "engines_from: engines.yaml") -> None:
        settings_for(directory, url)
        self.credentials = directory / "credentials"
        self.config, self.list, self.url = directory / "config.yaml", directory / "engines.yaml", url
        text = [line for line in self.config.read_text().splitlines() if not line.startswith("engines:")]
        self.config.write_text("\n".join([*text, more, "rescan_seconds: 0.05", ""]))
        self.lists()
        self.start()

    def start(self) -> None:
        self.runner = Runner(load(self.config, {}), lambda: load(self.config, {}))
        self.port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self.runner.run(self.port.set_result))

    def lists(self, *names: str) -> None:
        """The file as something else would replace it."""
        entries = ", ".join(f'{{name: {name}, kind: one-process, url: "{self.url}"}}' for name in names)
        fresh = self.list.with_suffix(".new")
        fresh.write_text(f"engines: [{entries}]\n")
        fresh.replace(self.list)

    async def says(self, method: str, path: str, **body: str) -> Any:
        url = f"http://127.0.0.1:{await asyncio.wait_for(self.port, SECONDS)}{path}"
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKENS['operator']}"}) as session,
            session.request(method, url, json=body or None) as answer,
        ):
            return await answer.json() if answer.content_type == "application/json" else answer.status

    async def until(self, *states: str) -> None:
        """The engines that there are have these states."""
        async with asyncio.timeout(SECONDS):
            while (found := await self.says("GET", "/status"))["engines"] or states:
                if [view["state"] for view in found["engines"]] == list(states):
                    return
                await asyncio.sleep(0.01)

    def is_stable(self) -> None:
        """The trainer's marker of VERSION."""
        step = self.config.parent / "run" / "broadcasts" / "step_5"
        step.mkdir(parents=True)
        (step / "STABLE").write_bytes(encode_manifest(manifest("run", VERSION)))

    async def close(self) -> None:
        self.runner.inbox.stopped.set()
        await asyncio.wait_for(self.task, SECONDS)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OneProcess:
    """Of a server that says whether it is paused."""
    process = OneProcess()
    process.token_file = tmp_path / "credentials" / "engine.token"

    class Telling(OneProcessClient):
        async def is_paused(self, deadline: float) -> bool:
            return process.paused

    monkeypatch.setitem(kinds.CLIENTS, "one-process", Telling)
    return process


async def test_an_engine_joins_gets_a_version_is_drained_forgotten_and_comes_back(
    tmp_path: Path, engine: OneProcess
) -> None:
    async with served(engine) as url:
        fleet = Fleet(tmp_path, url)
        port = await asyncio.wait_for(fleet.port, SECONDS)
        await fleet.until()
        fleet.lists(RANK.engine)
        trainer = Trainer(f"ws://127.0.0.1:{port}/agents", fleet.credentials / "trainer.token", engine)
        fleet.is_stable()
        assert (await asyncio.wait_for(trainer.outcome, SECONDS)).committed
        await fleet.until("serving")
        assert await fleet.says("GET", "/engines/sg/ready") == 200

        assert "until another version is decided" in (await fleet.says("POST", "/verbs/drain", target="sg"))["says"]
        assert await fleet.says("GET", "/engines/sg/ready") == 503
        assert not engine.paused, "it serves what it has"
        assert "goes on serving" in (await fleet.says("POST", "/verbs/forget", target="sg"))["says"]
        await fleet.until()
        assert await fleet.says("GET", "/engines/sg/ready") == 404

        await fleet.says("POST", "/verbs/release", target="sg")
        await fleet.until("serving")
        assert await fleet.says("GET", "/engines/sg/ready") == 200
        fleet.list.write_text("{")
        fleet.lists()
        await fleet.until()
        fleet.lists(RANK.engine)
        await fleet.until("serving")
        await trainer.close()
        await fleet.close()
    assert engine.ran_with == {NEW}
    lines = (await asyncio.to_thread((tmp_path / "state" / "audit.jsonl").read_text)).splitlines()
    assert [json.loads(line)["verb"] for line in lines] == ["commit", "drain", "forget", "release"]


async def test_an_engine_makes_itself_a_member_serves_and_is_known_to_the_next_daemon(
    tmp_path: Path, engine: OneProcess
) -> None:
    async with served(engine) as url:
        fleet = Fleet(tmp_path, url, "engines_admit: {names: [s*], hosts: [127.0.0.0/8]}")
        port = await asyncio.wait_for(fleet.port, SECONDS)
        await fleet.until()
        applicant = Applicant(name=RANK.engine, urls=(url,), kind="one-process")
        thread = ApplicantThread("run", applicant, f"ws://127.0.0.1:{port}/agents", fleet.credentials / "engine.token")
        thread.start()
        trainer = Trainer(f"ws://127.0.0.1:{port}/agents", fleet.credentials / "trainer.token", engine)
        fleet.is_stable()
        assert (await asyncio.wait_for(trainer.outcome, SECONDS)).committed
        await fleet.until("serving")
        assert (await fleet.says("GET", "/status"))["engines"][0]["url"] == url
        await trainer.close()
        await asyncio.to_thread(thread.close)
        await fleet.close()

        fleet.port = asyncio.get_running_loop().create_future()
        fleet.start()
        await asyncio.wait_for(fleet.port, SECONDS)
        assert [view["name"] for view in (await fleet.says("GET", "/status"))["engines"]] == [RANK.engine]
        assert "no member any more" in (await fleet.says("POST", "/verbs/forget", target="sg"))["says"]
        await fleet.until()
        await fleet.close()
    assert engine.ran_with == {NEW}
