"""What systemd is told, over a socket as it gives one."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from weightsync.orchestrator.daemon.notify import MAX_STATUS_CHARS, Supervisor


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.setblocking(False)
        yield heard


def said(heard: socket.socket) -> list[str]:
    """All that was said since the last time."""
    found = []
    while True:
        try:
            found.append(heard.recv(4096).decode())
        except BlockingIOError:
            return found


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(heard: socket.socket, **more: str) -> tuple[Supervisor, Clock]:
    clock = Clock()
    return Supervisor({"NOTIFY_SOCKET": heard.getsockname(), **more}, clock), clock


def test_it_says_when_it_is_ready_and_when_it_ends(systemd: socket.socket) -> None:
    supervisor, _ = told(systemd)
    supervisor.ready("step 3 is committed")
    supervisor.works("not watched, so nothing is said")
    supervisor.stopping("ends")
    assert said(systemd) == ["READY=1\nSTATUS=step 3 is committed", "STOPPING=1\nSTATUS=ends"]


def test_the_watchdog_is_fed_thrice_in_its_time_however_often_work_is_done(systemd: socket.socket) -> None:
    supervisor, clock = told(systemd, WATCHDOG_USEC="60000000", WATCHDOG_PID=str(os.getpid()))
    assert supervisor.watched == 60.0
    for quarter in range(241):
        clock.now = 100.0 + quarter / 4
        supervisor.works(f"at {quarter}")
    assert [line.splitlines() for line in said(systemd)] == [
        ["WATCHDOG=1", f"STATUS=at {quarter}"] for quarter in (0, 80, 160, 240)
    ]


def test_a_status_is_one_line_whatever_peers_had_in_it(systemd: socket.socket) -> None:
    supervisor, _ = told(systemd)
    supervisor.ready("engine e0: \nMAINPID=1\r\n" + "x" * 5000)
    (line,) = said(systemd)
    assert line.startswith("READY=1\nSTATUS=engine e0: MAINPID=1 xxx")
    assert len(line) == len("READY=1\nSTATUS=") + MAX_STATUS_CHARS


def test_a_name_without_a_file() -> None:
    name = f"weightsync-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0{name}")
        heard.setblocking(False)
        Supervisor({"NOTIFY_SOCKET": f"@{name}"}).ready("")
        assert said(heard) == ["READY=1\nSTATUS="]


@pytest.mark.parametrize(
    "environ",
    [
        {"WATCHDOG_USEC": "60000000"},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "-5"},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "9" * 40},
        {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "vsock:2:1234", "WATCHDOG_USEC": "60000000"},
        {},
    ],
)
def test_nobody_watches_this_process(environ: dict[str, str]) -> None:
    assert Supervisor(environ).watched is None


def test_a_supervisor_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    with structlog.testing.capture_logs() as logs:
        supervisor.ready("")
        supervisor.stopping("")
    (line,) = logs
    assert (line["event"], line["socket"]) == ("the supervisor cannot be told", str(tmp_path / "gone"))
