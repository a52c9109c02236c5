"""The running daemon, if there is one: its answer, what it says is wrong, and what its own process can do.

A daemon in a sandbox sees other mounts and other limits than the shell in which ``doctor`` runs; the kernel tells them.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from weightsync.orchestrator.cli.client import Denied, Unreachable, fetch, tls_for, token_for
from weightsync.orchestrator.daemon.access.descriptors import reachable
from weightsync.orchestrator.daemon.admin.views import StatusView
from weightsync.orchestrator.protocol.findings import Finding, Level
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import Settings

FILES_BESIDE: Final = 256
"""Open files of a daemon beside its connections: journal, engines' calls, the run directory."""

PROC: Final = Path("/proc")


async def daemon(settings: Settings, timeout_seconds: float) -> list[Finding]:
    """What the daemon at the configured URL says of itself."""
    url = settings.agents_url
    try:
        data = await fetch(f"{url}/status", token_for(None, settings), timeout_seconds, tls=tls_for(url, settings))
        status = msgspec.json.decode(data, type=StatusView)
    except ConfigError as error:  # of the files config check tells all, and this one may be run by somebody else
        return [Finding("note", f"not asked: {error}", "run doctor as the daemon's user", "daemon")]
    except Denied as error:
        fix = f"is it another run's daemon? It reads {settings.credentials} again whenever that changes"
        return [Finding("error", str(error).partition(". Fix: ")[0], fix, "daemon")]
    except Unreachable as error:
        what, _, fix = str(error).partition(". Fix: ")
        return [Finding("note", f"none runs that could be asked: {what}", fix, "daemon")]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        what = f"{url}/status is not answered as the daemon answers it"
        return [Finding("error", what, "another program has that port, or stands before it: mend url", "daemon")]
    if status.run != settings.run.id:
        what = f"{url} is the daemon of run {status.run!r}, and this configuration is of {settings.run.id!r}"
        return [Finding("error", what, "give each run a listen.port of its own", "daemon")]
    found = [Finding("ok", f"runs, epoch {status.epoch}: {status.state}", check="daemon")]
    for problem in status.problems:
        level: Level = "error" if problem.severity == "critical" else "warning"
        found.append(Finding(level, problem.what, problem.fix, "status"))
    return found


def daemon_pid(settings: Settings) -> int | None:
    """The process that holds the journal; None: nobody, or nobody of whom this user may know."""
    lock = settings.journal_path.with_name(settings.journal_path.name + ".lock")
    try:
        text = lock.read_text().strip()[:32]
    except (OSError, UnicodeDecodeError):
        return None
    pid = int(text) if text.isdecimal() else 0
    return pid if pid and (PROC / str(pid)).exists() and _holds(pid, lock) else None


def _holds(pid: int, lock: Path) -> bool:
    """Whether it has the lock file open: the number of a daemon that has ended may be another process's by now."""
    try:
        wanted = os.stat(lock)
        opened = [os.stat(entry) for entry in (PROC / str(pid) / "fd").iterdir() if entry.exists()]
    except OSError:
        return False
    return any((found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino) for found in opened)


def sandbox(root: Path, directories: dict[str, Path]) -> Iterator[Finding]:
    """Directories (by their keys) that are read-only for a process whose view of the files begins at ``root``.

    ``root``: of a running daemon, /proc/PID/root.
    """
    for key, path in directories.items():
        seen = root / path.relative_to("/")
        try:
            if os.statvfs(seen).f_flag & os.ST_RDONLY:
                what = f"{path} is read-only for the running daemon"
                yield Finding("error", what, f"add ReadWritePaths={path} to its unit, or mount it writable", key)
        except FileNotFoundError:
            what = f"{path} is not there for the running daemon"
            yield Finding("error", what, f"let its unit or container have {path}", key)
        except OSError as error:
            what = f"what the running daemon sees of {path} cannot be looked at ({error.strerror})"
            yield Finding("note", what, "run doctor as the daemon's user", key)


def open_files(limit: int, agents: int, engines: int) -> Iterator[Finding]:
    """Whether so many open files are enough: one for each agent, a few for each engine.

    ``agents``: as far as they are known.
    """
    needed = FILES_BESIDE + agents + 4 * engines
    if 0 <= limit < needed:
        what = f"at most {limit} open files; {agents} agents and {engines} engines need about {needed}"
        yield Finding("error", what, f"LimitNOFILE={max(65536, needed)} in the unit, or ulimit -n", "open files")
    else:
        yield Finding("ok", f"{'no limit' if limit < 0 else limit}; about {needed} are needed", check="open files")


def file_limit(pid: int | None) -> int:
    """The soft limit of open files of a running daemon, -1: there is none; None: of one that would start here."""
    if pid is None:
        return reachable()
    soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    return -1 if soft == resource.RLIM_INFINITY else soft
