"""The daemon's life in one process: it starts, is asked, is told to stop, and ends when it must not go on."""

import asyncio
import gc
import json
import os
import signal
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from credentials import TOKENS, Proving, open_agent, write_credentials
from weightsync.orchestrator.core import machine
from weightsync.orchestrator.core.commands import Command
from weightsync.orchestrator.core.errors import InvariantViolation, JournalUnreadable, PeerMisbehaved
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, AgentSaid, Event, MarkersSeen, StableSeen
from weightsync.orchestrator.core.records import Committed, EpochBegan, RoundEnded, encode_record
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon import compaction
from weightsync.orchestrator.daemon import runner as runners
from weightsync.orchestrator.daemon.engines.errors import UnknownEngineKind
from weightsync.orchestrator.daemon.hub.hub import AGENTS_PATH
from weightsync.orchestrator.daemon.journal import Journal, JournalLocked
from weightsync.orchestrator.daemon.runner import Runner
from weightsync.orchestrator.protocol.codec import decode_from_daemon, encode
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import encode_manifest, manifest
from weightsync.orchestrator.protocol.messages import Bye, Hello, Refused, Welcome
from weightsync.orchestrator.protocol.names import Member, RoundName, Version
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import Settings, load

SECONDS = 20.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a daemon whose one engine does not exist."""
    write_credentials(tmp_path / "credentials")
    (tmp_path / "run").mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: glm, directory: {tmp_path / "run"}}}
state_directory: {tmp_path / "state"}
listen: {{host: 127.0.0.1, port: 1}}
credentials: {tmp_path / "credentials"}
engines: [{{name: e0, url: "http://127.0.0.1:1"}}]
rescan_seconds: 1
""")
    loaded = load(config, {})
    return loaded.model_copy(update={"listen": loaded.listen.model_copy(update={"port": 0})})


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[tuple[Runner, int, "asyncio.Task[None]"]]:
    """A daemon in this loop, its port and its task; stopped at the end if it still runs."""
    runner = Runner(settings)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(runner.run(port.set_result))
    await asyncio.wait({task, port}, return_when=asyncio.FIRST_COMPLETED, timeout=SECONDS)
    try:
        yield runner, port.result() if port.done() else 0, task
    finally:
        runner.inbox.stopped.set()
        await asyncio.wait({task}, timeout=SECONDS)


async def answer(port: int, path: str) -> int:
    """The status of the answer."""
    headers = {"Authorization": f"Bearer {TOKENS['operator']}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"http://127.0.0.1:{port}{path}") as got:
        return got.status


async def asked(port: int, path: str) -> Any:
    headers = {"Authorization": f"Bearer {TOKENS['operator']}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"http://127.0.0.1:{port}{path}") as answer,
    ):
        assert answer.status == 200
        return await answer.json()


async def until(holds: Callable[[], Awaitable[Any]]) -> Any:
    """Wait until ``holds`` is true, by looking."""
    async with asyncio.timeout(SECONDS):
        while not (result := await holds()):  # noqa: ASYNC110  (what a client sees has no event)
            await asyncio.sleep(0.01)
    return result


async def test_it_serves_until_it_is_told_to_stop(settings: Settings) -> None:
    async with running(settings) as (_, port, task):
        status = await asked(port, "/status")
        assert (status["run"], status["epoch"], status["round"]) == ("glm", 1, None)
        assert (await asked(port, "/rounds"))["rounds"] == []
        assert await answer(port, "/plan/layouts") == 503
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, SECONDS)


async def test_its_supervisor_hears_of_a_start_of_work_and_of_the_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "30000")

        async def hears(word: str) -> None:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(SECONDS):
                while not (await loop.sock_recv(systemd, 4096)).startswith(word.encode()):
                    pass

        async with running(settings) as (runner, _, task):
            await hears("READY=1\nSTATUS=")
            await hears("WATCHDOG=1\nSTATUS=")
            fed: list[str] = []
            monkeypatch.setattr(runner.supervisor, "works", fed.append)
            monkeypatch.setattr(type(runner.outbox), "obstacle", "the journal's disk has not answered for 9 s")
            runner.inbox.post(MarkersSeen(runner.inbox.next_id(), ()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert fed == [], "a daemon whose disk stands still does not work"
            monkeypatch.setattr(type(runner.outbox), "obstacle", "")
            runner.inbox.post(MarkersSeen(runner.inbox.next_id(), ()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert fed == [runner.fleet.sentence]
            runner.inbox.stopped.set()
            await asyncio.wait_for(task, SECONDS)
        await hears("STOPPING=1")


async def test_each_start_is_an_epoch_of_the_same_journal(settings: Settings) -> None:
    seen = []
    for _ in range(3):
        async with running(settings) as (_, port, task):
            status = await asked(port, "/status")
            seen.append((status["epoch"], status["journal_id"]))
        await task
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert len({journal for _, journal in seen}) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run_id": "other"}, "it belongs to run 'other', this daemon serves run 'glm'"),
        ({"schema": 99}, "it speaks schema 99, the daemon"),
        ({"world": 1}, "rank 3 is outside its world of 1"),
    ],
)
async def test_an_agent_that_does_not_belong_here_is_refused_by_name(
    settings: Settings, change: dict[str, Any], reason: str
) -> None:
    said = {"schema": SCHEMA_VERSION, "run_id": "glm", "member": Member("trainer", "", 3), "world": 4, "incarnation": 1}
    async with running(settings) as (runner, port, _), aiohttp.ClientSession() as session:
        socket = await open_agent(session, f"http://127.0.0.1:{port}{AGENTS_PATH}", TOKENS["trainer"])
        await socket.send_bytes(encode(Hello(**said | change)))
        refused = decode_from_daemon(await socket.receive_bytes(timeout=SECONDS))
        assert isinstance(refused, Refused)
        assert (refused.fault, refused.retry) == ("config", False)
        assert refused.reason.startswith(reason)
        assert (await socket.receive(timeout=SECONDS)).type is aiohttp.WSMsgType.CLOSE
        assert runner.fleet.agents == {}


async def test_markers_become_events(settings: Settings) -> None:
    async with running(settings) as (runner, _, _):
        step = settings.run.directory / "broadcasts" / "step_5"
        step.mkdir(parents=True)
        (step / "STABLE").write_bytes(encode_manifest(manifest("glm", Version(9, 5))))

        async def seen() -> bool:
            return runner.fleet.stable == (StableSeen(5, 9),)

        await until(seen)


async def test_a_look_that_the_core_asked_for_is_answered_even_if_nothing_changed(settings: Settings) -> None:
    async with running(settings) as (runner, _, _):
        runner.fleet.looking = True
        await runner.stable.look(0.0, 5)

        async def answered() -> bool:
            return not runner.fleet.looking

        await until(answered)
        assert runner.fleet.stable == ()


async def test_problems_of_markers_are_in_the_status(settings: Settings) -> None:
    async with running(settings) as (_, port, _):
        (settings.run.directory / "broadcasts" / "step_x").mkdir(parents=True)

        async def told() -> Any:
            return [p["what"] for p in (await asked(port, "/status"))["problems"] if "step_x" in p["what"]]

        assert "wrongly named" in (await until(told))[0]


async def test_a_broken_invariant_ends_it_and_nothing_is_performed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def violated(*_: Any) -> Any:
        raise InvariantViolation("S1: made up")

    async with running(settings) as (runner, _, task):
        performed: list[Any] = []
        monkeypatch.setattr(runners, "step", violated)
        monkeypatch.setattr(runner.outbox, "put", performed.append)
        runner.inbox.post(MarkersSeen(1, ()))
        with pytest.raises(InvariantViolation, match="made up"):
            await asyncio.wait_for(asyncio.shield(task), SECONDS)
        assert performed == []


@asynccontextmanager
async def agent(port: int, rank: int) -> AsyncIterator[Proving]:
    """A trainer rank that was taken in."""
    said = Hello(schema=SCHEMA_VERSION, run_id="glm", member=Member("trainer", "", rank), world=4, incarnation=1)
    async with aiohttp.ClientSession() as session:
        socket = await open_agent(session, f"http://127.0.0.1:{port}{AGENTS_PATH}", TOKENS["trainer"])
        await socket.send_bytes(encode(said))
        assert isinstance(decode_from_daemon(await socket.receive_bytes(timeout=SECONDS)), Welcome)
        yield socket


async def test_an_agent_that_says_what_cannot_be_true_is_sent_away_and_nobody_else(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[list[Event]] = []

    def step(fleet: Fleet, events: list[Event], now: float) -> list[Command]:
        for event in events:
            if isinstance(event, AgentSaid) and isinstance(event.message, Bye):
                raise PeerMisbehaved(event.member, event.connection, "it says good-bye without having said hello")
        decided.append(list(events))
        return machine.step(fleet, events, now)

    async with running(settings) as (runner, port, task), agent(port, 0) as rude, agent(port, 1) as other:
        (connection,) = [a.connection for a in runner.fleet.trainers() if a.member.rank == 0]
        monkeypatch.setattr(runners, "step", step)
        with structlog.testing.capture_logs() as logs:
            await rude.send_bytes(encode(Bye(reason="made up")))
            while (await rude.receive(timeout=SECONDS)).type is not aiohttp.WSMsgType.CLOSE:
                pass  # what it was told before

            async def gone() -> bool:
                return [a.member.rank for a in runner.fleet.trainers()] == [1]

            await until(gone)
        (line,) = [line for line in logs if line["event"] == "an agent is sent away"]
        assert line["agent"] == "trainer/0"
        assert "nothing is committed yet" in line["story"]
        lost = [event for events in decided for event in events if isinstance(event, AgentLost)]
        assert [(event.member.rank, event.connection) for event in lost] == [(0, connection)]
        assert not other.closed
        assert not task.done()


async def test_one_that_is_not_taken_in_yet_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(fleet: Fleet, events: list[Event], now: float) -> list[Command]:
        for event in events:
            if isinstance(event, AgentConnected):
                raise PeerMisbehaved(event.member, event.connection, "it cannot be")
        return machine.step(fleet, events, now)

    said = Hello(schema=SCHEMA_VERSION, run_id="glm", member=Member("trainer", "", 0), world=1, incarnation=1)
    monkeypatch.setattr(runners, "step", step)
    async with running(settings) as (_, port, task), aiohttp.ClientSession() as session:
        socket = await open_agent(session, f"http://127.0.0.1:{port}{AGENTS_PATH}", TOKENS["trainer"])
        await socket.send_bytes(encode(said))
        refused = decode_from_daemon(await socket.receive_bytes(timeout=SECONDS))
        assert refused == Refused(reason="it cannot be", fault="trainer", retry=True)
        assert not task.done()


async def test_a_blame_that_is_about_no_event_is_our_own_bug(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> Any:
        raise PeerMisbehaved(Member("trainer", "", 0), 99, "made up")

    async with running(settings) as (runner, _, task):
        monkeypatch.setattr(runners, "step", step)
        runner.inbox.post(MarkersSeen(1, ()))
        with pytest.raises(PeerMisbehaved):
            await asyncio.wait_for(asyncio.shield(task), SECONDS)


async def test_so_does_a_lost_disk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(*_: Any) -> Any:
        raise OSError("the disk is gone")

    runner = Runner(settings)
    monkeypatch.setattr(runners.AsyncJournal, "append", lost)
    with pytest.raises(OSError, match="the disk is gone"):
        await asyncio.wait_for(runner.run(), SECONDS)


async def test_a_compacted_journal_is_all_that_a_start_needs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SNAPSHOT_AFTER", 8)
    monkeypatch.setitem(compaction.KEPT, "RoundEnded", 5)
    name, version = RoundName(3, 1), Version(7, 41)
    ended = RoundEnded(
        round=name, version=version, attempt=1, engines=("e0",), left_out=(), outcome="committed", reason="", bytes=0,
        descriptors=0, times={},
    )  # fmt: skip
    records = [EpochBegan(epoch=3), Committed(round=name, version=version, sequence=8), *[ended] * 9]
    with Journal.open(settings.journal_path, clock=lambda: 12.5) as journal:
        journal.append([(type(record).__name__, encode_record(record)) for record in records])
    async with running(settings) as (runner, _, _):

        async def compacted() -> bool:
            return [entry.kind for entry in await runner.journal.entries()] == [
                "Committed", *["RoundEnded"] * 5, "MemorySaved",
            ]  # fmt: skip

        await until(compacted)
    async with running(settings) as (runner, port, _):
        status = await asked(port, "/status")
        assert (status["epoch"], status["committed"]["step"], status["committed"]["sequence"]) == (5, 41, 8)
        assert status["committed"]["unix_time"] == 12.5
        assert len((await asked(port, "/rounds"))["rounds"]) == 5
        assert version in runner.fleet.memory.done


async def test_one_daemon_per_journal(settings: Settings) -> None:
    async with running(settings):
        with pytest.raises(JournalLocked):
            await Runner(settings).run()


async def test_a_port_that_is_taken_costs_an_epoch_and_nothing_else(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = settings.listen.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(OSError, match="in use"):
            await asyncio.wait_for(Runner(settings.model_copy(update={"listen": listen})).run(), SECONDS)
    with Journal.read_only(settings.journal_path) as journal:
        assert [entry.kind for entry in journal.entries()] == ["EpochBegan"]


async def test_the_first_record_of_a_life_is_its_epoch(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an agent says while the daemon is still starting."""
    listen = Runner._listen

    async def impatient(runner: Runner) -> int:
        port = await listen(runner)
        runner.inbox.post(MarkersSeen(runner.inbox.next_id(), (StableSeen(5),)))
        await asyncio.sleep(0)
        assert runner.fleet.stable == (StableSeen(5),), "it was decided"
        return port

    monkeypatch.setattr(Runner, "_listen", impatient)
    async with running(settings) as (_, port, _):
        assert (await asked(port, "/status"))["epoch"] == 1
    with Journal.read_only(settings.journal_path) as journal:
        assert next(entry.kind for entry in journal.entries()) == "EpochBegan"


async def test_a_journal_that_it_cannot_read_is_not_guessed_at(settings: Settings) -> None:
    journal = Journal.open(settings.journal_path)
    journal.append([("RoundBegan", json.dumps({"type": "OfTheFuture"}).encode())])
    journal.close()
    with pytest.raises(JournalUnreadable, match="OfTheFuture"):
        await Runner(settings).run()


async def test_a_row_of_history_that_it_cannot_read_stops_no_start(settings: Settings) -> None:
    with Journal.open(settings.journal_path) as journal:
        journal.append([("RoundEnded", b'{"type":"RoundEnded","round":[1,1],"version":[7,1],"times":{"wire":null}}')])
    async with running(settings) as (_, port, _):
        (row,) = (await asked(port, "/status"))["rounds"]
        assert row["outcome"] == "unreadable"
        assert (await asked(port, "/rounds"))["rounds"] == [row]


async def test_damage_to_what_it_decides_by_does(settings: Settings) -> None:
    with Journal.open(settings.journal_path) as journal:
        journal.append([("EpochBegan", b'{"type":"EpochBegan","epoch":17}')])
        journal._connection.execute("DROP TRIGGER entries_are_final")
        journal._connection.execute("UPDATE entries SET body = replace(body, '17', '11')")
    with pytest.raises(JournalUnreadable, match="its checksum is wrong"):
        await Runner(settings).run()


async def test_an_engine_that_nobody_can_talk_to_is_refused_before_anything_is_opened(settings: Settings) -> None:
    odd = settings.engines[0].model_copy(update={"kind": "abacus"})
    with pytest.raises(UnknownEngineKind, match=r"engine e0: unknown engine kind 'abacus'.*one of: vllm"):
        Runner(settings.model_copy(update={"engines": (odd,)}))
    assert not settings.journal_path.exists()


async def test_what_a_rendezvous_built_is_frozen_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    async with running(settings) as (runner, _, _):
        monkeypatch.setattr(runners.gc, "freeze", lambda: frozen.append(runner.fleet.confirmed_plan))
        for plan in (0, 1, 1, 2):
            runner.fleet.confirmed_plan = plan
            runner._decide([])
    assert frozen == [1, 2]


async def test_what_was_frozen_and_has_ended_is_given_back_at_the_next_rendezvous(settings: Settings) -> None:
    """A connection and its task know each other: only the collector ends them, and it does not look at the frozen."""

    class Connection:
        def __init__(self) -> None:
            self.itself = self

    gc.collect()
    connection = Connection()
    ended = weakref.ref(connection)
    try:
        async with running(settings) as (runner, _, _):
            runner.fleet.confirmed_plan = 1
            runner._decide([])
            del connection
            gc.collect()
            assert ended() is not None
            runner.fleet.confirmed_plan = 2
            runner._decide([])
            assert ended() is None
    finally:
        gc.unfreeze()


# ------------------------------------------------------------------------------------------------- verbs and signals
async def order(port: int, verb: str, **body: str) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {TOKENS['operator']}"}
    url = f"http://127.0.0.1:{port}/verbs/{verb}"
    async with aiohttp.ClientSession(headers=headers) as session, session.post(url, json=body) as got:
        return got.status, await got.text()


async def test_a_hold_is_durable_when_it_is_answered_and_outlives_the_daemon(settings: Settings) -> None:
    async with running(settings) as (runner, port, _):
        status, text = await order(port, "hold", target="e0", reason="new driver", by="ann@desk")
        assert (status, json.loads(text)["verb"]) == (200, "hold")
        assert [e.kind for e in await runner.journal.entries()][-1] == "EngineHeld"
        assert await order(port, "hold", target="e9") == (404, "there is no engine 'e9'; engines are: e0\n")
    async with running(settings) as (_, port, _):
        (held,) = [p for p in (await asked(port, "/status"))["problems"] if "new driver" in p["what"]]
        assert held["what"].startswith("e0: held by the operator (ann@desk at 20")
        assert (await order(port, "release", target="e0"))[0] == 200
        assert (await asked(port, "/status"))["holds"] == {}
    lines = [json.loads(line) for line in (settings.state_directory / "audit.jsonl").read_text().splitlines()]
    assert [(line["verb"], line["target"], line["who"]) for line in lines] == [
        ("hold", "e0", "ann@desk"), ("hold", "e9", "127.0.0.1"), ("release", "e0", "127.0.0.1"),
    ]  # fmt: skip
    assert lines[1]["result"].startswith("refused: there is no engine 'e9'")


async def test_sighup_takes_what_may_change_and_keeps_the_rest(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    before = file.read_text()

    def read() -> Settings:
        new = load(file, {})
        return new.model_copy(update={"listen": settings.listen})

    runner = Runner(settings, read)
    served: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(runner.run(served.set_result))
    port = await asyncio.wait_for(served, SECONDS)
    client = runner.engines.clients["e0"]

    async def patience(seconds: float) -> None:
        async def holds() -> bool:
            return runner.fleet.policy.patience == seconds

        await until(holds)

    for bad in ("commit: {patience: 1}", "rescan_seconds: 2\ncommit: {patience_seconds: 1}", "{", "engines: []"):
        file.write_text(before.replace("rescan_seconds: 1", bad))
        with structlog.testing.capture_logs() as said:
            os.kill(os.getpid(), signal.SIGHUP)

            async def told(said: list[Any] = said) -> bool:
                return any("not taken" in line["event"] for line in said)

            await until(told)
        assert runner.fleet.policy.patience == settings.commit.patience_seconds
        assert runner.engines.clients["e0"] is client
    file.write_text(before + "commit: {patience_seconds: 7}\npause: {mode: wait}\n")
    os.kill(os.getpid(), signal.SIGHUP)
    await patience(7)
    assert runner.engines.clients["e0"] is not client
    assert (await asked(port, "/status"))["epoch"] == 1, "it is the same daemon"
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, SECONDS)


def test_a_fleet_that_needs_more_descriptors_than_there_are_does_not_start(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "raise_limit", lambda: 100)
    with pytest.raises(ConfigError, match="this process may open 100 files, and 1 engines and some trainer ranks need"):
        Runner(settings)
