"""Which release of this project runs, for the log, the status, the metrics, the command line and an agent's Hello."""

import functools
import importlib.metadata
from typing import Final

DISTRIBUTION: Final = "weightsync-orchestrator"

UNKNOWN: Final = "of a source tree"


@functools.cache
def release() -> str:
    """The release that is installed, such as ``0.1.0``; UNKNOWN where the code is used without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
