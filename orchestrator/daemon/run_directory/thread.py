"""The run directory's markers for an event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from weightsync.orchestrator.daemon.run_directory.markers import write_marker
from weightsync.orchestrator.daemon.run_directory.mounts import file_system_of, is_network
from weightsync.orchestrator.daemon.run_directory.problems import MarkerProblem
from weightsync.orchestrator.daemon.run_directory.scan import MarkerDirectory, Scan
from weightsync.orchestrator.protocol.markers import BROADCASTS, MarkerKind, manifest, step_name
from weightsync.orchestrator.protocol.names import Version

log = structlog.get_logger(__name__)

Facts = dict[str, str | int | float]

MAX_OWED: Final = 64
"""Versions whose marker could not be written and is tried again; those before them are marked by the next start."""

RETRY_SECONDS: Final = 1.0
"""Between two tries at what is owed: each try changes the directory, which asks for a scan, and each scan for a try."""


class MarkerThread:
    """Markers are read on one thread and written on another: a shared file system may take seconds, the loop has none.

    Scans happen in the order in which they are asked for, and so do writes, which wait for no scan.
    """

    def __init__(self, run_directory: Path, run_id: str) -> None:
        self.directory = MarkerDirectory(run_directory, run_id, network=is_network(file_system_of(run_directory)))
        self._run_id = run_id
        self._scans = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scans")
        self._writes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="markers")
        self._owed: dict[Version, tuple[MarkerKind, Facts]] = {}
        """The newest marker of each version that the file system refused; belongs to the thread that writes."""
        self._unwritten: tuple[MarkerProblem, ...] = ()
        self._tried = 0.0

    @property
    def problems(self) -> tuple[MarkerProblem, ...]:
        """Everything that the last scan could not believe, and what cannot be written."""
        return (*self._unwritten, *self.directory.problems)

    async def scan(self) -> Scan:
        """As ``MarkerDirectory.scan``; before it, what could not be written is tried again."""
        now = asyncio.get_running_loop().time()
        if self._unwritten and now >= self._tried + RETRY_SECONDS:
            self._tried = now
            self._writes.submit(self._write_owed)
        return await self._read(self.directory.scan)

    async def look(self, step: int) -> Scan:
        """As ``MarkerDirectory.look``."""
        return await self._read(partial(self.directory.look, step))

    def write(self, kind: MarkerKind, version: Version, facts: Facts) -> None:
        """Put a marker of ours in place, later. What the file system refuses is a problem, and tried again with each
        scan; nobody waits for it: the journal is what counts.
        """
        self._writes.submit(self._write, kind, version, facts)

    def close(self) -> None:
        """Wait for the writes under way."""
        self._scans.shutdown()
        self._writes.shutdown()

    async def _read(self, work: Callable[[], Scan]) -> Scan:
        return await asyncio.get_running_loop().run_in_executor(self._scans, work)

    def _write(self, kind: MarkerKind, version: Version, facts: Facts) -> None:
        owed = self._owed.pop(version, None)
        reason = self._refused(kind, version, facts)
        if reason and (owed is None or owed[0] != kind):
            log.error("marker not written", marker=kind, version=str(version), reason=reason)
        elif owed is not None and not reason:
            log.info("marker written after all", marker=kind, version=str(version))
        self._tell(reason)

    def _refused(self, kind: MarkerKind, version: Version, facts: Facts) -> str:
        """Write it; why that failed, if it did, and then it is owed where that may get better."""
        try:
            write_marker(self.directory.run_directory, kind, manifest(self._run_id, version, **facts))
        except OSError as error:
            self._owed[version] = kind, facts
            if len(self._owed) > MAX_OWED:
                del self._owed[next(iter(self._owed))]
            return str(error)
        except ValueError as error:
            return str(error)
        return ""

    def _write_owed(self) -> None:
        for version, (kind, facts) in list(self._owed.items()):
            self._write(kind, version, facts)

    def _tell(self, reason: str) -> None:
        """Of what is owed, the newest stands for all."""
        if not self._owed:
            self._unwritten = ()
        elif reason:
            version, (kind, _) = next(reversed(self._owed.items()))
            more = f", nor {len(self._owed) - 1} more markers" if len(self._owed) > 1 else ""
            fix = "make room in the run directory, and let the daemon write there: it tries again by itself"
            path = f"{BROADCASTS}/{step_name(version.step)}/{kind}"
            self._unwritten = (MarkerProblem(path, f"cannot be written: {reason}{more}", fix),)
