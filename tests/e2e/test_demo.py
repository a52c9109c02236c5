"""The demo as its user runs it: it says *identical*, and an interrupt leaves no process behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def mark(request: pytest.FixtureRequest) -> str:
    """An environment variable that every descendant of this test's demo carries, whatever its session or parent."""
    return f"WSYNC_DEMO_TEST={os.getpid()}-{request.node.name}"


def marked(mark: str) -> list[int]:
    """Processes (no zombies: those have no environment) that carry the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended while we looked
    return found


@pytest.fixture
def demo(mark: str, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "weightsync.orchestrator.cli.main", "demo", "--versions", "2"]
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [*command, "--directory", str(tmp_path / "run")],
        env={**os.environ, name: value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        process.terminate()
        process.communicate(timeout=60)


def test_the_pushed_engine_answers_as_a_fresh_one(demo: "subprocess.Popen[str]", mark: str, tmp_path: Path) -> None:
    out, _ = demo.communicate()
    assert demo.returncode == 0, out
    assert re.search(r"^identical: ", out, re.MULTILINE), out
    assert "no engine ever answered with unverified weights" in out
    assert re.search(r"engine-0 +copy: stood still for \d+ ms .*, to switch; it served while bytes arrived$", out, re.M)
    assert re.search(r"engine-1 +live: stood still for \d+ ms .*, while bytes arrived$", out, re.M)
    assert "whole, and verified." in out, "the last version has learnt the text"
    assert ", 0 failures" in out
    rows = re.findall(r"^ +(\d+) +(\d+\.\d+) +\d+\.\d MB ", out, re.MULTILINE)
    steps = [int(step) for step, _ in rows]
    assert list(dict.fromkeys(steps)) == [10, 20], "on a busy machine one engine may come after the other"
    assert float(rows[0][1]) > float(rows[1][1]), "the loss goes down"
    assert "\x1b" not in out, "no terminal, no escapes"
    assert all(len(line) <= 100 or str(tmp_path) in line for line in out.splitlines()), out
    assert marked(mark) == []
    assert (tmp_path / "run" / "daemon.log").exists(), "a directory that was asked for is kept"


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "✓ daemon"), (signal.SIGINT, "the engine says")],
    ids=["while-starting", "while-pushing"],
)
def test_an_interrupt_leaves_no_process(
    demo: "subprocess.Popen[str]", mark: str, number: signal.Signals, moment: str
) -> None:
    """While ranks and engine start; and while clients stream and the first version is on its way."""
    assert demo.stdout is not None
    seen = []
    for line in demo.stdout:
        seen.append(line)
        if moment in line:
            break
    assert len(marked(mark)) >= 6, "the demo, the daemon, two ranks and the engines"
    demo.send_signal(number)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 128 + number, "".join(seen) + rest
    assert f"interrupted by {number.name}" in rest
    assert marked(mark) == []
