"""The run directory's markers for an event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog
from weightsync.orchestrator.daemon.run_directory.markers import write_marker
from weightsync.orchestrator.daemon.run_directory.mounts import file_system_of, is_network
from weightsync.orchestrator.daemon.run_directory.problems import MarkerProblem
from weightsync.orchestrator.daemon.run_directory.scan import MarkerDirectory, Scan
from weightsync.orchestrator.protocol.markers import MarkerKind, manifest
from weightsync.orchestrator.protocol.names import Version

log = structlog.get_logger(__name__)


class MarkerThread:
    """Markers are read on one thread and written on another: a shared file system may take seconds, the loop has none.

    Scans happen in the order in which they are asked for, and so do writes, which wait for no scan.
    """

    def __init__(self, run_directory: Path, run_id: str) -> None:
        self.directory = MarkerDirectory(run_directory, run_id, network=is_network(file_system_of(run_directory)))
        self._run_id = run_id
        self._scans = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scans")
        self._writes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="markers")

    @property
    def problems(self) -> tuple[MarkerProblem, ...]:
        """Everything that the last scan could not believe."""
        return self.directory.problems

    async def scan(self) -> Scan:
        """As ``MarkerDirectory.scan``."""
        return await self._read(self.directory.scan)

    async def look(self, step: int) -> Scan:
        """As ``MarkerDirectory.look``."""
        return await self._read(partial(self.directory.look, step))

    def write(self, kind: MarkerKind, version: Version, facts: dict[str, str | int | float]) -> None:
        """Put a marker of ours in place, later. A failed write is logged, nothing else: the journal is what counts."""
        self._writes.submit(self._write, kind, version, facts)

    def close(self) -> None:
        """Wait for the writes under way."""
        self._scans.shutdown()
        self._writes.shutdown()

    async def _read(self, work: Callable[[], Scan]) -> Scan:
        return await asyncio.get_running_loop().run_in_executor(self._scans, work)

    def _write(self, kind: MarkerKind, version: Version, facts: dict[str, str | int | float]) -> None:
        try:
            write_marker(self.directory.run_directory, kind, manifest(self._run_id, version, **facts))
        except (OSError, ValueError) as error:
            log.error("marker not written", marker=kind, version=str(version), reason=str(error))
