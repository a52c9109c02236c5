"""Bad input, each kind at its real door: what is refused is named, and whoever did nothing wrong is not disturbed."""

import contextlib
import gzip
import json
import math
import os
import re
import resource
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fleet import Fleet, Trainer, fleet
from ports import HOST, free_port
from scripted_trainer import masters
from serving import DEFAULT_PROMPTS, Hammer, VllmServer, answers
from tiny_models import model_shapes, qwen3_config
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from weightsync.agents.link.client import RefusedForGood
from weightsync.agents.link.token import read_token
from weightsync.agents.trainer.agent import PublishError, TrainerAgent
from weightsync.agents.trainer.errors import UnfitTensor, UnreadTensors
from weightsync.agents.trainer.models import model_table
from weightsync.agents.vllm.routes import PUBLIC
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.protocol.codec import decode_from_daemon
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import encode_manifest, manifest
from weightsync.orchestrator.protocol.messages import Welcome
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.proof import (
    ADMIN_HEADER,
    KEY_HEADER,
    NONCE_BYTES,
    NONCE_HEADER,
    Challenge,
    admin_key,
    agent_proof,
    key_of,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CONFIG = qwen3_config()
JOIN_SECONDS = 10


@dataclass(frozen=True)
class Address:
    """In the place of a server where the configuration only needs a URL."""

    url: str


def stable(step: int, *, run: str = "e2e", generation: int = 1) -> bytes:
    return encode_manifest(manifest(run, Version(generation, step)))


def in_process_trainer(whole: Fleet, source: Any = None, **other: Any) -> TrainerAgent:
    """A trainer rank in this process, with its options as ``other`` says."""
    return TrainerAgent(source or masters(model_shapes(CONFIG), 0), model_table(CONFIG), **{
        "hub_url": f"ws://{HOST}:{whole.port}/agents", "token_file": whole.token, "run_id": whole.run_id,
        "run_dir": whole.directory / "run", "connect_seconds": 3.0, **other,
    })  # fmt: skip


def command_line(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "weightsync.orchestrator.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# ------------------------------------------------------------------------------------------------------ a daemon alone
@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A daemon whose one engine does not exist."""
    nobody = {"engine": Address(f"http://{HOST}:{free_port()}")}
    with fleet(tmp_path_factory.mktemp("lonely") / "fleet", nobody) as whole:  # type: ignore[arg-type]
        yield whole


def told(fleet: Fleet) -> list[str]:
    """What ``status`` says is wrong."""
    return [problem["what"] for problem in fleet.status()["problems"]]


def test_bad_markers_are_named_and_harm_nobody(lonely: Fleet) -> None:
    broadcasts = lonely.directory / "run" / "broadcasts"
    outside = lonely.directory / "outside"
    outside.mkdir()
    (outside / "STABLE").write_bytes(stable(8))
    found = {step: broadcasts / f"step_{step}" for step in range(1, 8)}
    for directory in found.values():
        directory.mkdir(parents=True)
    (found[1] / "STABLE").write_bytes(stable(1)[:-20])
    (found[2] / "STABLE").write_bytes(b" " * 70_000)
    (found[3] / "STABLE").symlink_to(outside / "STABLE")
    (found[4] / "STABLE").write_bytes(stable(4, run="another-run"))
    (found[5] / "STABLE").write_bytes(stable(6))
    (found[6] / "stable.json").write_bytes(stable(6))
    (found[7] / "STABLE").mkdir()
    (broadcasts / "step_8").symlink_to(outside)
    (broadcasts / "step_09").mkdir()
    expected = {
        "step_1/STABLE": "no whole manifest",
        "step_2/STABLE": "70000 bytes",
        "step_3/STABLE": "symbolic link",
        "step_4/STABLE": "belongs to run 'another-run'",
        "step_5/STABLE": "speaks of step 6",
        "step_6/stable.json": "name it STABLE",
        "step_7/STABLE": "no regular file",
        "step_8": "symbolic link",
        "step_09": "wrongly named",
    }

    def all_named() -> bool:
        problems = told(lonely)
        return all(any(name in p and why in p for p in problems) for name, why in expected.items())

    lonely.until(all_named, "every problem to be in the status")
    assert lonely.status()["round"] is None


def test_a_marker_that_is_mended_is_believed(lonely: Fleet) -> None:
    marker = lonely.directory / "run" / "broadcasts" / "step_20" / "STABLE"
    marker.parent.mkdir(parents=True)
    marker.write_text("{")
    lonely.until(lambda: any("step_20" in p for p in told(lonely)), "the problem to be seen")
    marker.write_bytes(stable(20))
    lonely.until(lambda: not any("step_20" in p for p in told(lonely)), "the problem to be over")


def test_a_wrong_token_is_what_the_constructor_says(lonely: Fleet, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("not-the-daemons-token")
    token.chmod(0o600)
    with pytest.raises(TimeoutError, match=r"trainer/0: no Welcome .* it rejects the token \(401\)"):
        in_process_trainer(lonely, token_file=token)
    assert lonely.status()["trainers"] == []


def test_another_run_is_refused_for_good(lonely: Fleet) -> None:
    with pytest.raises(RefusedForGood, match="belongs to run 'another-run', this daemon serves run 'e2e'"):
        in_process_trainer(lonely, run_id="another-run")


def test_a_tensor_that_is_no_weight_is_what_the_constructor_says(lonely: Fleet) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    state = masters(model_shapes(CONFIG), 0)
    with pytest.raises(UnfitTensor, match=rf"^'{name}' is int8; .*give a callable that returns it dequantised"):
        in_process_trainer(lonely, lambda: state | {name: state[name].to(torch.int8)})
    adapter = name.replace("weight", "lora_a.weight")
    with pytest.raises(UnreadTensors, match=rf"^1 trained tensors are read by nobody.*: {adapter}\. "):
        in_process_trainer(lonely, state | {adapter: torch.ones(2, 2)})
    with pytest.raises(ValueError, match="nonfinite='ignore'; it is one of refuse, warn, allow"):
        in_process_trainer(lonely, nonfinite="ignore")
    assert lonely.status()["trainers"] == []


def test_nan_and_infinity_are_refused_or_warned_of_or_allowed(lonely: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    state = masters(model_shapes(CONFIG), 0)
    state["model.norm.weight"][:2] = torch.tensor([torch.nan, 3.4e38])  # the second one only in bfloat16
    words = f"model.norm.weight (2 of {state['model.norm.weight'].numel()} values)"
    for option in ("refuse", "warn", "allow"):
        agent = in_process_trainer(lonely, state, nonfinite=option)
        try:
            caplog.clear()
            if option == "refuse":
                with pytest.raises(PublishError, match=rf"NaN or infinity .*: {re.escape(words)}\. .*nonfinite='warn'"):
                    agent.publish_async(30)
                state["model.norm.weight"][:2] = 1.0
                agent.publish_async(30)  # a step that was not staged may be tried again
                state["model.norm.weight"][:2] = torch.tensor([torch.nan, 3.4e38])
                continue
            agent.publish_async(31)
            assert (f"NaN or infinity in {words}" in caplog.text) == (option == "warn")
        finally:
            agent.close()


def test_a_second_daemon_on_the_same_journal_ends_with_75(lonely: Fleet) -> None:
    done = command_line("run", "--config", str(lonely.config))
    assert done.returncode == 75, done.stderr
    assert "journal" in done.stderr
    assert lonely.status() is not None


def test_a_wrong_configuration_ends_with_78_and_says_what_to_do(lonely: Fleet, tmp_path: Path) -> None:
    wrong = tmp_path / "config.yaml"
    wrong.write_text(lonely.config.read_text().replace("rescan_seconds", "rescan_second"))
    done = command_line("run", "--config", str(wrong))
    assert done.returncode == 78, done.stderr
    assert str(wrong) in done.stderr
    assert "rescan_second" in done.stderr


# ------------------------------------------------------------------------------------- agents, names and disks of sorts
HELLO: dict[str, Any] = {
    "type": "Hello", "schema": SCHEMA_VERSION, "run_id": "e2e", "member": ["trainer", "", 0], "world": 1,
    "incarnation": 1, "generation": 9,
}  # fmt: skip
WRONG_HELLOS = [
    {"epoch_seen": 2**64 - 1}, {"epoch_seen": 2**53 + 1}, {"generation": 2**63}, {"member": ["trainer", "", -1]},
    {"member": ["trainer", "x", 0]}, {"member": ["inference", "a/b\n", 0]}, {"trainer": {"staged": [9, 10**18]}},
]  # fmt: skip
WRONG_WORDS: list[dict[str, Any]] = [
    {"type": "Staged", "version": [9, 1], "bytes": 1, "convert_seconds": math.nan, "digest_seconds": 0.0},
    {"type": "Staged", "version": [9, 1], "bytes": 2**64 - 1, "convert_seconds": 0.0, "digest_seconds": 0.0},
    {"type": "Verified", "round": [1, 1], "digest": [-1, 0], "bytes": 1, "apply_seconds": 0, "digest_seconds": 0},
    {"type": "Closed", "round": [1, 1], "peers": [[["inference", "e", 0], 1, 1, math.inf, [0, 0]]]},
    {"type": "Bye", "reason": "x" * 5000},
    {"type": "Announce", "layout": {"tensors": [["w", "float32", [2**63]]], "regions": [[0, 2**64 - 1]], "rows": b""}},
]  # fmt: skip


@contextlib.contextmanager
def knocking(whole: Fleet, token: str) -> Iterator[tuple[ClientConnection, Challenge]]:
    """A connection on which the daemon has proved itself, and its agent has said nothing yet."""
    nonce = secrets.token_hex(NONCE_BYTES)
    headers = {KEY_HEADER: key_of(token), NONCE_HEADER: nonce}
    with connect(f"ws://{HOST}:{whole.port}/agents", additional_headers=headers, compression=None) as socket:
        assert socket.response is not None
        yield socket, Challenge(whole.run_id, nonce, socket.response.headers[NONCE_HEADER], b"")


@contextlib.contextmanager
def agent(whole: Fleet, credential: str = "", **change: Any) -> Iterator[ClientConnection]:
    """The connection of an agent that has said Hello, in bytes of its own. ``credential``: in the place of its own."""
    hello = HELLO | change
    role = credential or ("trainer" if hello["member"][0] == "trainer" else "engine")
    token = read_token(whole.credentials / f"{role}.token")
    with knocking(whole, token) as (socket, challenge):
        frame = msgspec.msgpack.encode(hello)
        socket.send(agent_proof(token, challenge, frame) + frame)
        yield socket


def until_closed(socket: ClientConnection) -> str:
    """The reason with which the daemon closes."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            socket.recv(timeout=20)
    assert socket.close_reason is not None
    return socket.close_reason


def test_no_word_of_an_agent_ends_the_daemon_or_its_journal(lonely: Fleet) -> None:
    for change in WRONG_HELLOS:
        with agent(lonely, **change) as stranger:
            assert "malformed frame" in until_closed(stranger), change
    with agent(lonely, epoch_seen=2**53) as liar:
        assert "no daemon has started so often" in until_closed(liar)
    for word in WRONG_WORDS:
        with agent(lonely) as rude:
            assert decode_from_daemon(rude.recv(timeout=20)).__class__ is Welcome
            rude.send(msgspec.msgpack.encode(word))
            assert "malformed frame" in until_closed(rude), word
        lonely.until(lambda: not lonely.status()["trainers"], "the agent to be gone")
    before = lonely.status()["epoch"]
    lonely.restart_daemon()
    assert lonely.status()["epoch"] == before + 1
    with agent(lonely) as ordinary:
        assert isinstance(decode_from_daemon(ordinary.recv(timeout=20)), Welcome)


# ------------------------------------------------------------------------------------------- strangers at the daemon
ENGINE: dict[str, Any] = {"member": ["inference", "engine", 0], "generation": 0, "engine": {}}
TRAINER: dict[str, Any] = {"trainer": {}}


@pytest.mark.parametrize(
    ("credential", "change", "words"),
    [
        ("trainer", ENGINE, "came with the credential of role trainer; give it the token in engine.token"),
        ("engine", TRAINER, "came with the credential of role engine; give it the token in trainer.token"),
    ],
)
def test_the_credential_of_another_role_is_refused_by_name(
    lonely: Fleet, credential: str, change: dict[str, Any], words: str
) -> None:
    with agent(lonely, credential, **change) as stranger:
        refused = decode_from_daemon(stranger.recv(timeout=20))
        assert words in getattr(refused, "reason", "")
        until_closed(stranger)


@pytest.mark.parametrize("role", ["viewer", "operator"])
def test_a_token_that_is_for_people_makes_no_agent(lonely: Fleet, role: str) -> None:
    with pytest.raises(InvalidStatus, match=r"HTTP 40[13]"), agent(lonely, role):
        pass


def test_what_was_heard_on_one_connection_serves_on_no_other(lonely: Fleet) -> None:
    token = read_token(lonely.token)
    frame = msgspec.msgpack.encode(HELLO | TRAINER)
    with knocking(lonely, token) as (socket, challenge):
        proved = agent_proof(token, challenge, frame) + frame
        socket.send(proved)
        assert isinstance(decode_from_daemon(socket.recv(timeout=20)), Welcome)
        with knocking(lonely, token) as (replaying, _):
            replaying.send(proved)
            assert "does not prove that it holds the token" in until_closed(replaying)
        socket.send(proved)  # nor a second time on its own
        assert "malformed frame" in until_closed(socket)
    lonely.until(lambda: not lonely.status()["trainers"], "the agent to be gone")


def test_what_a_stolen_viewers_token_opens(lonely: Fleet) -> None:
    token = read_token(lonely.credentials / "viewer.token")

    def asks(path: str, data: bytes | None = None, bearer: str = token) -> int:
        headers = {"Authorization": f"Bearer {bearer}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{HOST}:{lonely.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert [asks(path) for path in ("/status", "/metrics", "/rounds")] == [200] * 3
    assert asks("/verbs/hold", b'{"target": "engine", "reason": "x", "by": "y"}') == 403
    assert asks("/status", bearer=read_token(lonely.token)) == 403

    def is_audited() -> bool:
        lines = map(json.loads, (lonely.directory / "state" / "audit.jsonl").read_text().splitlines())
        kept = [line["reason"] for line in lines if line["verb"] == "refused"]
        time.sleep(1.0)  # a stranger's pace
        assert asks("/verbs/hold", b'{"target": "engine", "reason": "x", "by": "y"}') == 403
        return any("this needs the credential of role operator" in reason for reason in kept)

    lonely.until(is_audited, "a refusal in the audit log, which has one of a kind in a minute", 90.0)
    assert command_line("audit", "verify", "--config", str(lonely.config)).returncode == 0


def test_nothing_that_a_stranger_or_an_operator_sends_is_unpacked(lonely: Fleet) -> None:
    packed = gzip.compress(json.dumps({"target": "engine", "reason": "a test", "by": "tests"}).encode())
    bearers = {"": 401, read_token(lonely.credentials / "viewer.token"): 403}
    for token, status in (bearers | {read_token(lonely.credentials / "operator.token"): 400}).items():
        headers = {"Content-Encoding": "gzip"} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(f"{lonely.url}/verbs/release", packed, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code == status
    assert "invalid character" in refused.value.read().decode(), "the bytes as they came"


def test_half_requests_of_a_stranger_cost_nobody_anything(lonely: Fleet) -> None:
    assert lonely.daemon is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    before = len(lonely.daemon.log.read_text().splitlines())
    try:
        with contextlib.ExitStack() as opened:
            for _ in range(1100):
                stranger = opened.enter_context(
                    socket.create_connection((HOST, lonely.port), timeout=20, source_address=("127.0.0.2", 0))
                )
                with contextlib.suppress(ConnectionError):  # of those beyond the places for one address
                    stranger.sendall(b"GET /agents HTTP/1.1\r\nHost: x\r\nX-Half: ")
            assert lonely.status() is not None
            with agent(lonely) as honest:
                assert isinstance(decode_from_daemon(honest.recv(timeout=20)), Welcome)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(lonely.daemon.log.read_text().splitlines()) - before < 100
    lonely.until(lambda: not lonely.status()["trainers"], "the agent to be gone")


def test_a_signal_that_asks_to_read_again_ends_nothing(lonely: Fleet) -> None:
    assert lonely.daemon is not None
    assert lonely.daemon.child is not None
    before = lonely.status()["epoch"]
    lonely.daemon.child.send_signal(signal.SIGHUP)
    lonely.until(lambda: "read again" in lonely.daemon.log.read_text(), "it to read")  # type: ignore[union-attr]
    assert lonely.status()["epoch"] == before


def test_an_address_that_is_taken_ends_with_75(lonely: Fleet, tmp_path: Path) -> None:
    other = tmp_path / "config.yaml"
    other.write_text(lonely.config.read_text().replace(str(lonely.directory / "state"), str(tmp_path / "state")))
    done = command_line("run", "--config", str(other))
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert str(lonely.port) in done.stderr


def test_no_name_below_the_run_directory_ends_it_or_the_next_start(lonely: Fleet) -> None:
    broadcasts = lonely.directory / "run" / "broadcasts"
    broadcasts.mkdir(exist_ok=True)
    for name in (b"step_\xff\xfe", b"step_1\nstep_2", b"\x1b[2J"):
        os.mkdir(os.path.join(os.fsencode(broadcasts), name))
        os.mkdir(os.path.join(os.fsencode(broadcasts), name, b"\xfe"))
    (broadcasts / "loop").symlink_to(broadcasts)
    shown = [
        "step_\\xff\\xfe: wrongly named",
        "step_1 step_2: wrongly named",
        "\\x1b[2J: wrongly named",
        "loop: wrongly named",
    ]

    def all_told() -> bool:
        return all(any(words in problem for problem in told(lonely)) for words in shown)

    for _ in range(2):
        lonely.until(all_told, "every name to be told as text")
        lonely.restart_daemon()
    # Whoever is told of nothing odd is disturbed by nothing.
    (broadcasts / "step_50").mkdir()
    (broadcasts / "step_50" / "STABLE").write_text("{")
    lonely.until(lambda: any("step_50/STABLE" in p for p in told(lonely)), "an ordinary problem")


def test_a_damaged_journal_is_78_and_a_row_that_cannot_be_read_is_none(lonely: Fleet, tmp_path: Path) -> None:
    state = tmp_path / "state"
    config = tmp_path / "config.yaml"
    text = lonely.config.read_text().replace(str(lonely.directory / "state"), str(state))
    config.write_text(text.replace(f"port: {lonely.port}", f"port: {free_port()}"))
    with Journal.open(state / "journal.sqlite") as journal:
        journal.append([("RoundEnded", b'{"type":"RoundEnded","round":[1,1],"version":[1,1],"times":{"wire":null}}')])
        journal.append([("EpochBegan", b'{"type":"EpochBegan","epoch":17}')])
    command = [sys.executable, "-m", "weightsync.orchestrator.cli.main", "run", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        lines = iter(daemon.stderr.readline, "")
        assert any('"epoch": 18' in line for line in lines), "it serves"
        daemon.terminate()
        daemon.communicate(timeout=20)
    assert daemon.returncode == 0
    damaged = sqlite3.connect(state / "journal.sqlite")
    damaged.execute("DROP TRIGGER entries_are_final")
    damaged.execute("UPDATE entries SET body = replace(body, '17', '11')")
    damaged.commit()
    damaged.close()
    done = command_line("run", "--config", str(config))
    assert done.returncode == 78, done.stderr
    assert "its checksum is wrong" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------- engines of sorts
class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Nasty(Quiet):
    """Answers everything with the present one of NASTY."""

    answer: bytes = b""

    def do_GET(self) -> None:
        self.wfile.write(self.answer)
        self.close_connection = True

    do_POST = do_OPTIONS = do_GET


NASTY = {
    "nested": b"HTTP/1.1 500 no\r\n\r\n" + b'{"detail":' + b"[" * 50_000,
    "redirect": b"HTTP/1.1 307 go\r\nLocation: http://h/\xff\xfe\x80\r\n\r\n",
    "page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>Please log in</html>",
    "bytes": b"\xff" * 10_000,
    "long": b'HTTP/1.1 500 no\r\n\r\n{"error": "' + b"y" * 100_000 + b'"}',
}
TOLD = {
    "nested": "answered 500: {\"detail\":[[[", "redirect": "a redirect to http://h/", "page": "Please log in",
    "bytes": "the connection broke", "long": "yyyy",
}  # fmt: skip


def test_whatever_an_engine_answers_is_told_and_it_is_asked_again(tmp_path: Path) -> None:
    server = ThreadingHTTPServer((HOST, 0), Nasty)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = Address(f"http://{HOST}:{server.server_address[1]}")
    quick = {"deadlines": {"probe_interval_seconds": 0.1}}
    try:
        with fleet(tmp_path / "fleet", {"engine": address}, settings=quick) as whole:  # type: ignore[dict-item]
            for what in (*NASTY, *NASTY):
                Nasty.answer = NASTY[what]
                whole.until(lambda words=TOLD[what]: words in whole.engine("engine")["error"], f"{what} to be told")
            assert all(line.isprintable() for line in [whole.engine("engine")["error"]])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class WithoutRoutes(Quiet):
    """A vLLM that was started without VLLM_SERVER_DEV_MODE: it is healthy and has none of the admin routes."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_OPTIONS = do_GET


@contextlib.contextmanager
def engine_without_routes() -> Iterator[Address]:
    server = ThreadingHTTPServer((HOST, 0), WithoutRoutes)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Address(f"http://{HOST}:{server.server_address[1]}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_engine_without_its_routes_is_told_what_to_set(tmp_path: Path) -> None:
    with (
        engine_without_routes() as address,
        fleet(tmp_path / "fleet", {"engine": address}) as whole,  # type: ignore[dict-item]
    ):
        whole.until(lambda: "VLLM_SERVER_DEV_MODE=1" in whole.engine("engine")["error"], "the advice")
        assert "/pause" in whole.engine("engine")["error"]
        assert whole.engine("engine")["state"] == "unreachable"


@contextlib.contextmanager
def silent_engine() -> Iterator[Address]:
    """It accepts connections (the kernel does) and never says a word."""
    with socket.create_server((HOST, 0), backlog=128) as server:
        yield Address(f"http://{HOST}:{server.getsockname()[1]}")


@dataclass
class Served:
    """A real engine beside a silent one, both configured; and the trainer whose version the real one serves."""

    whole: Fleet
    server: VllmServer
    trainer: Trainer
    step: int = 0

    def publish(self) -> dict[str, Any]:
        self.step += 1
        return self.trainer.publish(self.step)


@pytest.fixture(scope="module")
def served(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    env = {"WEIGHTSYNC_ALLOW_CALLS": "look_at_weights,change_weights"}
    meddler = ("--worker-extension-cls", "weightsync_cpu_test_plugin.Meddler")
    server = VllmServer(qwen3, env=env, arguments=meddler, log=directory / "vllm.log").start()
    settings = {"deadlines": {"join_seconds": JOIN_SECONDS}, "commit": {"patience_seconds": 1}}
    try:
        server.wait_ready()
        with (
            silent_engine() as silent,
            fleet(directory / "fleet", {"silent": silent, "engine": server}, settings=settings) as whole,  # type: ignore[dict-item]
        ):
            trainer = whole.start_trainer(qwen3)
            assert trainer.hear()["ready"]
            yield Served(whole, server, trainer)
    finally:
        server.close()


# ----------------------------------------------------------------------------------- strangers at a server that is held
def strangers(served: Served) -> dict[str, dict[str, str]]:
    """What somebody may have instead of the admin key, as headers."""
    tokens = {
        role: read_token(served.whole.credentials / f"{role}.token") for role in ("trainer", "viewer", "operator")
    }
    run, name, engine = served.whole.run_id, "engine", served.server.token
    return {
        "nothing": {},
        **{f"the {role}'s token": {"Authorization": f"Bearer {token}"} for role, token in tokens.items()},
        "the engine's token itself": {"Authorization": f"Bearer {engine}", ADMIN_HEADER: engine},
        "a key of the trainer's token": {ADMIN_HEADER: admin_key(tokens["trainer"], run, name)},
        "another engine's key": {ADMIN_HEADER: admin_key(engine, run, "silent")},
        "another run's key": {ADMIN_HEADER: admin_key(engine, "other", name)},
        "which token it is": {ADMIN_HEADER: key_of(engine)},
    }


def nobody_is_answered(server: VllmServer) -> None:
    """The engine is paused, and a request waits in its queue."""
    assert server.is_paused()
    with pytest.raises(TimeoutError):
        server.complete((5, 6, 7), 2, timeout=1.0)


def test_no_route_but_those_for_clients_answers_a_stranger(served: Served) -> None:
    """Of the server's own list of its routes, each with every other credential that there is."""
    status, document = served.server.request("GET", "/openapi.json", headers={})
    assert status == 200
    paths = {path: sorted(methods) for path, methods in document["paths"].items() if path not in PUBLIC}
    assert paths.keys() >= {"/pause", "/resume", "/collective_rpc", "/sleep", "/wake_up", "/server_info", "/is_paused"}
    for who, headers in strangers(served).items():
        for path, methods in paths.items():
            for method in (*methods, "OPTIONS", "HEAD"):
                asked = path.replace("{", "").replace("}", "")
                status, body = served.server.request(method.upper(), asked, {}, headers=headers)
                assert status == 401, (who, method, path, body)
    assert "asks for the engine's admin key" in str(served.server.request("POST", "/resume", {}, headers={})[1])
    nobody_is_answered(served.server)


ROGUE = {"hub_url": "ws://127.0.0.1:1/agents", "world": 1}
WITH_THE_KEY: dict[str, tuple[str, Any, str]] = {
    "resume": ("/resume", None, "not servable"),
    "wake up": ("/wake_up", None, "not servable"),
    "sleep": ("/sleep?level=1", None, "moves the weights"),
    "another daemon": ("/init_weight_transfer_engine", {"init_info": ROGUE}, "contradicts WEIGHTSYNC_HUB_URL"),
    "a file": ("/init_weight_transfer_engine", {"init_info": {"token_file": "/etc/shadow"}}, "init_info.token_file"),
    "another name": ("/init_weight_transfer_engine", {"init_info": {"engine": "b", "world": 1}}, "WEIGHTSYNC_ENGINE"),
    "no update": ("/update_weights", {"update_info": {}}, "/start_weight_update first"),
    "the agent's end": ("/shutdown_weight_transfer_engine", None, "the daemon needs the agent"),
    "its end by call": ("/collective_rpc", {"method": "shutdown_weight_transfer_engine"}, "the daemon needs the agent"),
    "a load": ("/collective_rpc", {"method": "load_model"}, "it changes the weights"),
    "a reload": ("/collective_rpc", {"method": "reload_weights"}, "it changes the weights"),
    "a change": ("/collective_rpc", {"method": "update_config", "args": ["load_config", {}]}, "update_config is refu"),
    "a reset": ("/weight_checker", {"action": "reset"}, "reset_weights is refused"),
    "who knows": ("/collective_rpc", {"method": "execute_method"}, "nobody knows whether it changes weights"),
    "a resume": (
        "/collective_rpc", {"method": "weightsync_resume", "kwargs": {"incarnations": {"0": 1}}}, "not servable",
    ),
    "a switch": ("/collective_rpc", {"method": "weightsync_switch", "kwargs": {}}, "switch: "),
}  # fmt: skip


@pytest.mark.parametrize("what", WITH_THE_KEY)
def test_a_held_engine_answers_nobody_whoever_has_its_key(served: Served, what: str) -> None:
    path, body, words = WITH_THE_KEY[what]
    status, said = served.server.post(path, body)
    assert status >= 400, said
    assert words in str(said) or words in served.server.log_path.read_text(errors="replace")
    assert served.server.is_paused()


def test_after_all_of_that_the_held_engine_answers_nobody_still(served: Served) -> None:
    nobody_is_answered(served.server)


def test_an_engine_that_never_answers_delays_nobody_beyond_its_deadline(served: Served) -> None:
    """A stale STABLE and a stale COMMITTED of an earlier trainer lie there, too: one line, and no more."""
    broadcasts = served.whole.directory / "run" / "broadcasts"
    (broadcasts / "step_1").mkdir(parents=True)
    (broadcasts / "step_1" / "COMMITTED").write_bytes(stable(1, generation=1))
    (broadcasts / "step_77").mkdir()
    (broadcasts / "step_77" / "STABLE").write_bytes(stable(77, generation=1))
    assert served.publish()["sequence"] == 1
    served.whole.until(lambda: "no answer within" in served.whole.engine("silent")["error"], "the silence to be told")
    assert served.whole.engine("silent")["state"] == "unreachable"
    assert served.whole.engine("engine")["state"] == "serving"
    assert not served.server.is_paused()
    assert served.publish()["sequence"] == 2
    assert served.whole.daemon is not None
    log = served.whole.daemon.log.read_text()
    assert log.count("STABLE of step 77 is of an earlier trainer (1); ignored") == 1
    told = json.loads((broadcasts / "step_1" / "COMMITTED").read_text())
    assert told["generation"] != 1


def test_the_status_and_the_audit_log_name_the_same_digest_of_a_commit(served: Served) -> None:
    served.publish()
    digest = served.whole.status()["committed"]["digest"]
    assert len(digest) == 64

    def is_audited() -> bool:
        lines = map(json.loads, (served.whole.directory / "state" / "audit.jsonl").read_text().splitlines())
        return [line["result"] for line in lines if line["verb"] == "commit"][-1].startswith(f"digests: {digest} of 1:")

    served.whole.until(is_audited, "the line of the commit")


def test_a_second_process_of_a_rank_is_refused_by_name_and_the_first_goes_on(served: Served) -> None:
    before = served.whole.status()["trainers"]
    with pytest.raises(TimeoutError, match="trainer/0 of another trainer start is still connected"):
        in_process_trainer(served.whole)
    assert [rank["pid"] for rank in served.whole.status()["trainers"]] == [rank["pid"] for rank in before]
    assert served.publish()["sequence"] == served.step


# ---------------------------------------------------------------------------------------- strangers at one that serves
@pytest.mark.parametrize(
    ("run_id", "words"), [("e2e", "this engine belongs to"), ("staging", "asks for the engine's admin key")]
)
def test_a_second_daemon_with_copied_tokens_gets_no_engine(
    served: Served, tmp_path: Path, run_id: str, words: str
) -> None:
    """It has its own state and port, as after a copy of the configuration; and the same run, or another one."""
    before = answers(served.server)
    second = Fleet(tmp_path / "second", {"engine": Address(served.server.url)}, run_id=run_id)  # type: ignore[dict-item]
    (second.credentials / "engine.token").write_text(served.server.token)
    try:
        second.start_daemon()
        second.until(lambda: words in second.engine("engine")["error"], "it to be told whose the engine is")
        assert second.engine("engine")["state"] != "serving"
    finally:
        second.close()
    assert answers(served.server) == before
    assert served.publish()["sequence"] == served.step
    assert served.whole.engine("engine")["state"] == "serving"


def test_after_a_call_that_changed_nothing_the_engine_serves_on(served: Served) -> None:
    before = answers(served.server)
    assert served.server.post("/collective_rpc", {"method": "look_at_weights"})[0] == 200
    assert not served.server.is_paused()
    assert answers(served.server) == before


def test_after_a_call_that_changed_weights_nobody_is_answered_until_they_are_mended(served: Served) -> None:
    before = answers(served.server)
    with Hammer(served.server, clients=1, timeout=60.0) as hammer:
        assert hammer.wait_answer()
        assert served.server.post("/collective_rpc", {"method": "change_weights"})[0] == 200
        served.whole.until(lambda: not served.server.is_paused(), "the daemon to mend it")
    assert {answer for _, answer in hammer.answers} == {served.server.complete(DEFAULT_PROMPTS[0], 4)}
    assert answers(served.server) == before
    assert "a call from outside has changed the weights" in served.server.log_path.read_text(errors="replace")
    assert served.publish()["sequence"] == served.step


def test_a_step_names_one_version_for_good(served: Served) -> None:
    again = served.trainer.publish(served.step)
    assert f"step {served.step} is committed already" in again["error"]
    assert not served.server.is_paused()


MISFITS = {
    "shape": (CONFIG | {"intermediate_size": 384}, torch.bfloat16, ["mlp.", "has shape", "384", "256"]),
    "dtype": (CONFIG, torch.float16, ["has dtype float16 at trainer/0 but bfloat16 at engine/0"]),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_trainer_that_does_not_fit_fails_by_name_and_disturbs_nobody(served: Served, qwen3: Path, what: str) -> None:
    """Its version is FAILED with the tensor, both sides and their values; the next trainer that fits is served."""
    config, dtype, words = MISFITS[what]
    before = answers(served.server)
    served.trainer.stop()
    served.whole.until(lambda: not served.whole.status()["trainers"], "the trainer to be gone")
    state = masters(model_shapes(config), 5)
    misfit = TrainerAgent(
        lambda: state, model_table(config, forward_dtype=dtype), hub_url=f"ws://{HOST}:{served.whole.port}/agents",
        token_file=served.whole.token, run_id=served.whole.run_id, run_dir=served.whole.directory / "run",
    )  # fmt: skip
    try:
        served.step += 1
        with pytest.raises(PublishError) as failure:
            misfit.publish(served.step)
    finally:
        misfit.close()
    for word in (*words, "trainer/0", "engine/0"):
        assert word in str(failure.value)
    reason = served.whole.directory / "run" / "broadcasts" / f"step_{served.step}" / "FAILED"
    served.whole.until(reason.exists, "FAILED, which is written beside the answer to the trainer")
    assert words[0] in json.loads(reason.read_text())["reason"]
    assert words[0] in served.whole.engine("engine")["error"]
    assert not served.server.is_paused()
    assert answers(served.server) == before
    served.whole.until(lambda: not served.whole.status()["trainers"], "the misfit to be gone")
    served.trainer = served.whole.start_trainer(qwen3)
    assert served.trainer.hear()["ready"]
    assert "sequence" in served.publish()
    assert answers(served.server) != before
