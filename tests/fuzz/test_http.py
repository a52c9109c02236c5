"""Bytes at the port of a real daemon: whatever comes, it serves on, and nothing of ours breaks."""

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
import structlog
from credentials import TOKENS, write_credentials
from fuzzing import SECONDS, corpus, fuzz
from targets import APPLICATION, HELLOS, masked
from weightsync.orchestrator.daemon.runner import Runner
from weightsync.orchestrator.protocol.codec import encode
from weightsync.orchestrator.protocol.proof import KEY_HEADER, NONCE_HEADER, key_of
from weightsync.orchestrator.settings.settings import Settings, load

WAIT_SECONDS = 30.0
QUIET_SECONDS = 0.02
OURS = ("a request broke", "what an agent sent broke its handling", "the daemon ends")
"""Lines of log by which an error of ours would show."""


def request(line: str, *headers: str, token: str = "", body: bytes = b"") -> bytes:
    bearer = [f"Authorization: Bearer {TOKENS[token]}"] if token else []
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *bearer, *length, *headers, "", ""]).encode() + body


UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: " + "A" * 22 + "==",
)
AGENT = (*UPGRADE, f"{KEY_HEADER}: {key_of(TOKENS['trainer'])}", f"{NONCE_HEADER}: {'ab' * 32}")
ENGINE = (*UPGRADE, f"{KEY_HEADER}: {key_of(TOKENS['engine'])}", f"{NONCE_HEADER}: {'ab' * 32}")
ORDER = b'{"target": "e0", "reason": "a test", "by": "ann"}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(ORDER), ORDER)
SEEDS = (
    request("GET /healthz"),
    request("GET /engines/e0/ready"),
    request("GET /rounds?last=5", token="viewer"),
    request("GET /status", token="viewer") + request("GET /metrics", "Connection: close", token="viewer"),
    request("POST /verbs/hold", token="operator", body=ORDER),
    request("POST /verbs/release", "Transfer-Encoding: chunked", token="operator")
    + b"31\r\n"
    + ORDER
    + b"\r\n0\r\n\r\n",
    request("GET /agents", *AGENT) + masked(bytes(32) + encode(HELLOS[0])),
    request("GET /engines", *ENGINE) + masked(bytes(32) + repr(APPLICATION).encode()),
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    write_credentials(tmp_path / "credentials")
    (tmp_path / "run").mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: unit, directory: {tmp_path / "run"}}}
state_directory: {tmp_path / "state"}
credentials: {tmp_path / "credentials"}
engines: [{{name: e0, url: "http://127.0.0.1:1"}}]
engines_admit: {{names: ["a*"], hosts: ["10.0.0.0/8"]}}
""")
    loaded = load(config, {})
    return loaded.model_copy(update={"listen": loaded.listen.model_copy(update={"port": 0})})


def say(port: int, data: bytes, seconds: float = QUIET_SECONDS) -> bytes:
    """What is answered until the daemon ends the connection, or is quiet for so long and waits for more."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), WAIT_SECONDS) as peer:
        peer.sendall(data)
        peer.settimeout(seconds)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while more := peer.recv(65536):
                answer += more
                peer.settimeout(QUIET_SECONDS)
    return answer


@pytest.mark.timeout(180 + 2 * SECONDS)
async def test_whatever_comes_to_its_port_the_daemon_serves_on(settings: Settings) -> None:
    runner = Runner(settings)
    loop = asyncio.get_running_loop()
    broken: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: broken.append(context))
    port: asyncio.Future[int] = loop.create_future()
    task = asyncio.create_task(runner.run(port.set_result))
    known = corpus("http")

    def feed(data: bytes) -> None:
        say(port.result(), data)
        assert say(port.result(), SEEDS[0], WAIT_SECONDS).startswith(b"HTTP/1.1 200 OK")
        assert not task.done()
        assert broken == []
        assert [line for line in logs if line["event"] in OURS] == []
        logs.clear()

    def all_of_it() -> None:
        for data in known:
            feed(data)
        answers = [say(port.result(), data, WAIT_SECONDS)[9:12] for data in SEEDS]
        assert answers == [b"200", b"503", b"200", b"200", b"200", b"200", b"101", b"101"]
        fuzz(feed, [*SEEDS, *known], SECONDS)

    with structlog.testing.capture_logs() as logs:
        await asyncio.wait_for(port, WAIT_SECONDS)
        try:
            await asyncio.to_thread(all_of_it)
        finally:
            runner.inbox.stopped.set()
            await asyncio.wait_for(task, WAIT_SECONDS)
