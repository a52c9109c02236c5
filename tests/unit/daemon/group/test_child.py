"""The daemon's side of ``rendezvous: tcpstore``: with vLLM's own class, and with children that misbehave."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import pytest
from ports import free_port
from weightsync.orchestrator.daemon.group.child import CHILD_MODULE, TcpStoreError, TcpStoreRendezvousServer
from weightsync.orchestrator.protocol import group
from weightsync.orchestrator.protocol.messages import Connect, TcpStoreRendezvous

HERE = Path(__file__).parent
WORLD = 4

ANSWER_ONE_COMMAND = """
import sys
from weightsync.orchestrator.protocol import group
def answer(*messages):
    head = sys.stdin.buffer.read(4)
    sys.stdin.buffer.read(int.from_bytes(head))
    for message in messages:
        sys.stdout.buffer.write(group.packed(message))
    sys.stdout.flush()
"""


def info(port: int = 1, seconds: float = 30.0) -> TcpStoreRendezvous:
    return TcpStoreRendezvous("127.0.0.1", port, 0, WORLD, seconds)


def server_with(script: str, seconds: float = 30.0) -> TcpStoreRendezvousServer:
    """A server whose child runs ``script`` instead of joining a group."""
    child = (sys.executable, "-c", ANSWER_ONE_COMMAND + script)
    return TcpStoreRendezvousServer(info(seconds=seconds), child=child, seconds_over=0.0)


@pytest.mark.e2e
async def test_rounds_and_barrier_over_vllms_own_group() -> None:
    pytest.importorskip("vllm")
    port = free_port()
    server = TcpStoreRendezvousServer(info(port, 60.0))
    agents = await asyncio.create_subprocess_exec(sys.executable, HERE / "spg_agents.py", str(port), str(WORLD))
    try:
        await server.start(WORLD)
        announces = await server.gather_announces()
        assert {rank: announce.endpoint_name for rank, announce in announces.items()} == {
            rank: f"agent {rank}" for rank in range(1, WORLD)
        }
        await server.deliver(
            {
                rank: Connect(fingerprint=f"plan {rank}", root="r", peers=(), copies=b"", expected_bytes=0)
                for rank in range(1, WORLD)
            }
        )
        ready = await server.gather_ready()
        assert {rank: message.fingerprint for rank, message in ready.items()} == {
            rank: f"plan {rank} for {rank}" for rank in range(1, WORLD)
        }
        await server.barrier()
        assert await agents.wait() == 0
    finally:
        await server.close()
        if agents.returncode is None:
            agents.kill()
            await agents.wait()


async def test_a_child_that_fails_is_quoted() -> None:
    server = server_with("answer(group.Failed('no vLLM here'))")
    try:
        with pytest.raises(TcpStoreError, match="no vLLM here"):
            await server.start(WORLD)
    finally:
        await server.close()


async def test_a_child_that_dies_is_an_error_and_not_a_wait() -> None:
    server = server_with("sys.exit(3)")
    try:
        with pytest.raises(TcpStoreError, match="ended during Join"):
            await server.start(WORLD)
    finally:
        await server.close()


async def test_a_silent_child_ends_at_the_deadline_and_is_reaped(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"import os, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); answer(group.Done())"
    server = server_with(script + "; import threading; threading.Event().wait()", seconds=0.5)
    await server.start(WORLD)
    with pytest.raises(TcpStoreError, match="did not carry out Gather in time"):
        await server.gather_announces()
    await server.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ("group.PipePiece(1, b'junk'), group.Done()", "rank 1 of the group sent a malformed message"),
        ("group.Done()", "0 of 3 agents answered"),
        ("*[group.PipePiece(1, b'')] * 9, group.Done()", "more than 4 messages"),
    ],
)
async def test_answers_that_are_none(answers: str, reason: str) -> None:
    server = server_with(f"answer(group.Done()); answer({answers})")
    try:
        await server.start(WORLD)
        with pytest.raises(TcpStoreError, match=reason):
            await server.gather_announces()
    finally:
        await server.close()


async def test_an_oversized_answer_is_not_read() -> None:
    server = server_with(
        "answer(); sys.stdout.buffer.write(b'\\xff' * 64); sys.stdout.flush(); sys.stdin.buffer.read()"
    )
    try:
        with pytest.raises(TcpStoreError, match="exceeds the limit"):
            await server.start(WORLD)
    finally:
        await server.close()


async def test_after_close_nothing_is_asked() -> None:
    server = server_with("answer(group.Done()); sys.stdin.buffer.read()")
    await server.start(WORLD)
    await server.close()
    await server.close()
    with pytest.raises(TcpStoreError, match="closed"):
        await server.barrier()


@pytest.mark.parametrize(
    ("first_bytes", "words"),
    [
        pytest.param(b"", "", id="nothing was asked"),
        pytest.param(group.packed(group.Join("127.0.0.1", 1, 2, 600.0)), "", id="in the middle of a join"),
        pytest.param(b"\0\0\0\1\xc1", "broke the protocol", id="no command"),
        pytest.param(b"\xff\xff\xff\xff", "broke the protocol", id="oversized"),
    ],
)
async def test_the_child_ends_with_the_daemons_end_of_the_pipe(first_bytes: bytes, words: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", CHILD_MODULE, stdin=PIPE, stdout=DEVNULL, stderr=PIPE
    )
    _, errors = await child.communicate(first_bytes)
    assert child.returncode == 0
    assert words in errors.decode()
