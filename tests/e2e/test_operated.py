"""What an operator and a supervisor are told by a real daemon from its start to its end, with no engine there."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet
from ports import HOST
from weightsync.orchestrator.daemon.admin.log_events import EVENTS, FIELDS
from weightsync.orchestrator.release import release

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


class Nobody:
    """In the place of a server: a socket, from which nobody answers."""

    def __init__(self, heard: socket.socket) -> None:
        self.heard, self.url = heard, f"http://{HOST}:{heard.getsockname()[1]}"


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Fleet]:
    with socket.create_server((HOST, 0)) as heard:
        quick = {"deadlines": {"probe_seconds": 1}}
        made = Fleet(tmp_path / "fleet", {"engine": Nobody(heard)}, settings=quick)  # type: ignore[dict-item]
        with contextlib.closing(made):
            yield made


def lines(whole: Fleet) -> list[dict[str, Any]]:
    return [json.loads(line) for line in whole.daemon_log().splitlines()]


def failures(whole: Fleet) -> int:
    return sum(line["event"] == "engine call failed" for line in lines(whole))


def command(whole: Fleet, *words: str) -> "subprocess.CompletedProcess[str]":
    asked = [sys.executable, "-m", "weightsync.orchestrator.cli.main", *words, "--config", str(whole.config)]
    return subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)


def test_each_line_has_its_event_its_run_and_its_level_and_the_end_has_one(whole: Fleet) -> None:
    daemon = whole.start_daemon()
    whole.until(lambda: failures(whole), "the engine to be missed")
    assert daemon.stop() == 0
    said = lines(whole)
    for line in said:
        assert line["event"] in EVENTS
        assert line.keys() <= FIELDS.keys()
        assert line["run"] == whole.run_id
    assert [line["release"] for line in said if line["event"] == "the daemon serves"] == [release()]
    assert {line["level"] for line in said if line["event"] == "engine call failed"} == {"warning"}
    assert "the daemon stops" in [line["event"] for line in said][-2:]


def test_what_runs_is_told_everywhere(whole: Fleet) -> None:
    whole.start_daemon()
    assert whole.status()["release"] == release()
    assert f'release="{release()}"' in whole.ask("/metrics")
    shown = subprocess.run(
        [sys.executable, "-m", "weightsync.orchestrator.cli.main", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"weightsync-orchestrator {release()}\n"


def test_since_when_an_engine_is_away_does_not_depend_on_when_somebody_asks(whole: Fleet) -> None:
    engine = whole.engines["engine"].heard  # type: ignore[attr-defined]
    engine.settimeout(60)
    whole.start_daemon()
    for _ in range(17):  # of several attempts each: a second probe has begun since the first failed
        engine.accept()[0].close()
    asked = time.time()
    first, second = whole.engine("engine"), whole.engine("engine")
    assert first["state"] == second["state"] == "unreachable"
    assert first["since"] < asked
    assert first["since"] == pytest.approx(second["since"], abs=0.05)


def test_a_monitor_and_a_person_hear_of_an_engine_that_is_away(whole: Fleet) -> None:
    whole.start_daemon()
    whole.until(lambda: whole.engine("engine")["state"] == "unreachable", "the engine to be missed")
    checked = command(whole, "status", "--check")
    assert checked.returncode in (1, 2)
    assert "engine" in checked.stdout
    assert "unreachable" in command(whole, "status").stdout
    ready = command(whole, "status", "--ready")
    assert (ready.returncode, ready.stdout) == (0, "ready\n"), "the daemon itself does its work"
    assert whole.ask("/engines/engine/ready") is None, "503"


def test_its_supervisor_is_told_of_its_start_its_work_and_its_end(whole: Fleet) -> None:
    place = whole.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(place))
        supervisor.settimeout(60)
        daemon = whole.start_daemon(env={"NOTIFY_SOCKET": str(place), "WATCHDOG_USEC": "600000"})
        heard = [supervisor.recv(4096).decode()]
        while not any("WATCHDOG=1" in word for word in heard):
            heard.append(supervisor.recv(4096).decode())
        assert "READY=1" in heard[0]
        assert daemon.child is not None
        daemon.child.send_signal(signal.SIGHUP)
        daemon.child.send_signal(signal.SIGTERM)
        while not any("STOPPING=1" in word for word in heard):
            heard.append(supervisor.recv(4096).decode())
        assert daemon.child.wait(20) == 0


def test_names_that_change_without_end_do_not_fill_the_log(whole: Fleet) -> None:
    """Whoever may write the run directory makes the daemon say something new with each of its looks."""
    whole.start_daemon()
    broadcasts = whole.directory / "run" / "broadcasts"
    broadcasts.mkdir()
    strays = [broadcasts / f"stray{number}-0" for number in range(15)]  # more with the same remedy are told as one
    for stray in strays:
        stray.mkdir()

    def is_told() -> bool:
        return f"{strays[-1].name}: wrongly" in str(whole.status()["problems"])

    for turn in range(1, 201):
        strays = [stray.rename(stray.with_name(f"{stray.name.partition('-')[0]}-{turn}")) for stray in strays]
        whole.until(is_told, "a look")
    told = sum(line["event"] == "marker not believed" for line in lines(whole))
    assert 1000 <= told <= 2000, "of 3000, in two of its minutes at the most"


def test_a_pipe_among_the_lists_of_engines_stops_neither_rereading_nor_the_end(whole: Fleet) -> None:
    lists = whole.directory / "lists"
    lists.mkdir()
    whole.settings["engines_from"] = str(lists)
    whole.write_config()
    daemon = whole.start_daemon()
    os.mkfifo(lists / "pipe.yaml")
    whole.until(lambda: "pipe.yaml: cannot be read: it is no plain file" in whole.daemon_log(), "it to be refused")
    (lists / "pipe.yaml").unlink()
    assert daemon.child is not None
    daemon.child.send_signal(signal.SIGHUP)
    whole.until(lambda: "the configuration was read again" in whole.daemon_log(), "it to read again")
    assert daemon.stop() == 0
