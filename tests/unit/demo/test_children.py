"""No process of the demo is left, and its ports are its own."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from weightsync.orchestrator.demo.children import HOST, BoundPort, Children, tail
from weightsync.orchestrator.demo.story import DemoFailed

RUNAWAY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""

KEEPER = """
import asyncio, os, sys
from pathlib import Path
from weightsync.orchestrator.demo import children
children.TERM_SECONDS = 0.2

async def main():
    children.become_reaper()
    processes, log = children.Children(), Path(sys.argv[1])
    processes.start("runaway", [sys.executable, "-c", sys.argv[2]], os.environ, log)
    while not log.read_text():
        await asyncio.sleep(0.01)
    await processes.close()
    try:
        os.kill(int(log.read_text()), 0)
    except ProcessLookupError:
        print("gone")
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no child")

asyncio.run(main())
"""


def test_a_grandchild_that_left_its_session_and_ignores_sigterm_is_ended_and_reaped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KEEPER, str(tmp_path / "log"), RUNAWAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split("\n") == ["gone", "no child", ""], done.stderr


async def test_a_child_that_ends_by_itself_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    children = Children()
    script = "import sys; print('a\\n\\nb'); print('no space left on device'); sys.exit(3)"
    child = children.start("child", [sys.executable, "-c", script], os.environ, tmp_path / "log")
    await asyncio.to_thread(child.process.wait)
    assert children.ended() is child
    assert child.tail(2) == ["b", "no space left on device"]
    failure = DemoFailed("it ended", child, "read it")
    assert "disk space" in failure.remedy, "a known sign in the log beats the general advice"
    await children.stop(children.all)
    assert children.all == []
    assert tail(tmp_path / "absent", 3) == []


def test_a_port_is_ours_alone_and_yet_a_server_can_bind_it() -> None:
    first, second = BoundPort(), BoundPort()
    assert first.number != second.number
    with pytest.raises(OSError, match="in use"):
        _bind_without_reuse(first.number)
    with socket.create_server((HOST, first.number)) as server:
        assert server.getsockname()[1] == first.number
    first.release()
    second.release()


def _bind_without_reuse(port: int) -> None:
    with socket.socket() as other:
        other.bind((HOST, port))
