"""The trainer's one marker: STABLE, written by rank 0 when every rank has staged."""

import contextlib
import os
from pathlib import Path

from weightsync.orchestrator.protocol.markers import BROADCASTS, KINDS, encode_manifest, manifest, step_name
from weightsync.orchestrator.protocol.names import Version


def write_stable(run_dir: Path, run_id: str, version: Version, restaged: int = 0) -> Path:
    """``broadcasts/step_<N>/STABLE`` by temp file and rename; outputs of an earlier version of that step go first.

    ``restaged``: how often the version was staged before; each time it FAILED.

    Raises:
        OSError: the run directory cannot be written.
    """
    directory = run_dir / BROADCASTS / step_name(version.step)
    directory.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        with contextlib.suppress(FileNotFoundError):
            (directory / kind).unlink()
    temporary = directory / f".STABLE.{os.getpid()}"
    with temporary.open("wb") as file:
        file.write(encode_manifest(manifest(run_id, version, restaged=restaged)))
        file.flush()
        os.fsync(file.fileno())
    return temporary.rename(directory / "STABLE")
