"""The soak's stand-in engine, which a test can have stopped in the middle of a round. Arguments: name, port.

A stopped engine begins no round, for the daemon has each engine answer before it; and a round of stand-ins is over
before anybody could stop one. So it stops itself: once, when it has been paused for a round and is told to stand still,
while the file ``NAME.stop`` is in the directory that the environment names.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from standin import Engine
from standin_engine import main

VARIABLE = "WEIGHTSYNC_STOPPING_ENGINES"


class StoppingEngine(Engine):
    """SIGCONT lets it go on where it was."""

    def _perform(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        order = Path(os.environ[VARIABLE], f"{sys.argv[1]}.stop")
        if path == "/update_weights" and order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
        return super()._perform(path, body)


if __name__ == "__main__":
    main(StoppingEngine)
