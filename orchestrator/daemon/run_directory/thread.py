"""The run directory's markers for an event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog
from weightsync.orchestrator.daemon.run_directory.markers import MarkerDirectory, MarkerProblem, Scan
from weightsync.orchestrator.protocol.markers import MarkerKind, manifest
from weightsync.orchestrator.protocol.names import Version

log = structlog.get_logger(__name__)


class MarkerThread:
    """A MarkerDirectory behind one thread of its own: a shared file system may take seconds, the loop has none.

    What is asked of it happens in that order.
    """

    def __init__(self, run_directory: Path, run_id: str) -> None:
        self.directory = MarkerDirectory(run_directory, run_id)
        self._run_id = run_id
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="markers")

    @property
    def problems(self) -> tuple[MarkerProblem, ...]:
        """Everything that the last scan could not believe."""
        return self.directory.problems

    async def scan(self) -> Scan:
        """As ``MarkerDirectory.scan``."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.directory.scan)

    def write(self, kind: MarkerKind, version: Version, facts: dict[str, str | int | float]) -> None:
        """Put a marker of ours in place, later. A failed write is logged, nothing else: the journal is what counts."""
        self._thread.submit(self._write, kind, version, facts)

    def close(self) -> None:
        """Wait for the writes under way."""
        self._thread.shutdown()

    def _write(self, kind: MarkerKind, version: Version, facts: dict[str, str | int | float]) -> None:
        try:
            self.directory.write(kind, manifest(self._run_id, version, **facts))
        except (OSError, ValueError) as error:
            log.error("marker not written", marker=kind, version=str(version), reason=str(error))
