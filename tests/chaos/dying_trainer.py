"""The scripted trainer, one rank of which kills itself with SIGKILL when it is granted a write.

``WEIGHTSYNC_TEST_DIE`` is the rank. The others write what they are granted, so the engine's memory is a mixture then.
"""

import os
import signal
from typing import Any

import scripted_trainer
from weightsync.agents.trainer.thread_side import TrainerSide
from weightsync.orchestrator.protocol.messages import FromDaemon, Grant

VARIABLE = "WEIGHTSYNC_TEST_DIE"


def arm(rank: int) -> None:
    """Have the process of ``rank`` die at its first grant."""
    heard: Any = TrainerSide.heard

    def dying_heard(side: TrainerSide, message: FromDaemon) -> None:
        if isinstance(message, Grant) and side._member.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        heard(side, message)

    TrainerSide.heard = dying_heard  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(int(os.environ[VARIABLE]))
    scripted_trainer.main()
