"""The demo's child processes, each in a session of its own; at the end all of them have ended.

The demo adopts orphaned descendants (PR_SET_CHILD_SUBREAPER), so that whatever a child starts and leaves behind is
still our descendant, and an empty list of descendants proves that nothing is left.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HOST: Final = "127.0.0.1"

TERM_SECONDS: Final = 10.0
"""Between SIGTERM and SIGKILL: a vLLM takes about one second, the daemon up to its own STOP_SECONDS."""

KILL_SECONDS: Final = 10.0
"""After SIGKILL a process is gone once its memory is freed."""

LOOK_SECONDS: Final = 0.02
"""Between two looks at all of /proc, of which one takes about 10 ms."""

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

_libc: Final = ctypes.CDLL(None)


class Survivors(Exception):
    """Processes that even SIGKILL did not end."""


@dataclass(frozen=True, slots=True)
class Child:
    """One child with the file that takes its output."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def code(self) -> int | None:
        """Its exit code once it has ended."""
        return self.process.poll()

    def tail(self, lines: int) -> list[str]:
        """The last lines of its log that are not empty."""
        return tail(self.log, lines)


def tail(path: Path, lines: int) -> list[str]:
    """The last ``lines`` lines of a file that are not empty; none if there is no file."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * lines))
        found = file.read().decode(errors="replace").splitlines()
        return [line.rstrip() for line in found if line.strip()][-lines:]
    return []


def become_reaper() -> None:
    """From now on orphans among our descendants become our children."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Children:
    """Starts children and ends them, with everything that they have started."""

    def __init__(self) -> None:
        self.all: list[Child] = []

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Child:
        """Start a child. Not a coroutine: no cancellation can fall between its start and its entry in the list."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - the demo has one thread
            )
        child = Child(name, process, log)
        self.all.append(child)
        return child

    def ended(self) -> Child | None:
        """A child that has ended by itself."""
        return next((child for child in self.all if child.code is not None), None)

    async def stop(self, children: Iterable[Child]) -> None:
        """End these children and what they started: SIGTERM, then SIGKILL.

        Raises:
            Survivors: some process outlived SIGKILL.
        """
        chosen = list(children)
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            for pid in _family(chosen):
                _signal(pid, number)
            if await _until_gone(chosen, seconds):
                break
        else:
            raise Survivors(f"processes {sorted(_family(chosen))} outlived SIGKILL")
        self.all = [child for child in self.all if child not in chosen]

    async def close(self) -> None:
        """End every descendant of this process, whoever started it, and reap them all.

        Orphans are among them after ``become_reaper``.

        Raises:
            Survivors: some process outlived SIGKILL.
        """
        await self.stop(self.all)
        deadline = time.monotonic() + KILL_SECONDS
        while left := _descendants(_processes(), {os.getpid()}):
            for pid in left:
                _signal(pid, signal.SIGKILL)
                _reap(pid)
            if time.monotonic() > deadline:
                raise Survivors(f"processes {sorted(left)} outlived SIGKILL")
            await asyncio.sleep(LOOK_SECONDS)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the demo is killed without a chance to clean up."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


async def _until_gone(children: Sequence[Child], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _family(children):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(LOOK_SECONDS)
    return True


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    session: int
    zombie: bool


def _processes() -> dict[int, _Process]:
    """Every process that is there now; the fields are proc(5)'s stat: state, ppid, pgrp, session."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            found[int(entry.name)] = _Process(int(fields[1]), int(fields[3]), fields[0] == "Z")
    return found


def _descendants(processes: Mapping[int, _Process], roots: set[int]) -> set[int]:
    """Children of ``roots``, their children, and so on."""
    found: set[int] = set()
    while True:
        parents = roots | found
        more = {pid for pid, process in processes.items() if process.parent in parents} - found
        if not more:
            return found
        found |= more


def _family(children: Sequence[Child]) -> set[int]:
    """Live processes of these children: themselves, what is in their sessions, and what those have started."""
    for child in children:
        child.process.poll()
    processes = _processes()
    leaders = {child.process.pid for child in children}
    sessions = {pid for pid, process in processes.items() if process.session in leaders}
    family = sessions | _descendants(processes, sessions | {pid for pid in leaders if pid in processes})
    living = set()
    for pid in family:
        if not processes[pid].zombie:
            living.add(pid)
        elif processes[pid].parent == os.getpid() and pid not in leaders:
            _reap(pid)
    return living


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


class BoundPort:
    """A TCP port of the loopback interface that the system gave us and gives to nobody else until ``release``.

    The socket stays bound, without listening: the kernel then lets the server bind it too, because both set
    SO_REUSEADDR, and keeps it out of everybody's choice of a free port.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, 0))
        self.number = int(self._socket.getsockname()[1])

    def release(self) -> None:
        """Give it back."""
        self._socket.close()
