"""The scripted trainer, one rank of which signals itself when it is granted a write, at most once in its life.

``WEIGHTSYNC_TEST_HARM`` is "<rank> <signal>". The other ranks write what they are granted, so the engines' memory is a
mixture then. ``WEIGHTSYNC_TEST_HOST``, if it is there: the name of the host that this rank says it runs on.
"""

import os
import signal
import socket
from typing import Any

import scripted_trainer
from weightsync.agents.trainer.thread_side import TrainerSide
from weightsync.orchestrator.protocol.messages import FromDaemon, Grant

HARM, ELSEWHERE = "WEIGHTSYNC_TEST_HARM", "WEIGHTSYNC_TEST_HOST"


def arm(rank: int, number: int) -> None:
    """Have the process of ``rank`` send itself ``number`` at its first grant."""
    heard: Any = TrainerSide.heard
    waiting = [number]

    def harmed_heard(side: TrainerSide, message: FromDaemon) -> None:
        if isinstance(message, Grant) and side._memory is not None and side._memory.member.rank == rank and waiting:
            os.kill(os.getpid(), waiting.pop())
        heard(side, message)

    TrainerSide.heard = harmed_heard  # type: ignore[method-assign]


if __name__ == "__main__":
    if harm := os.environ.get(HARM):
        which, name = harm.split()
        arm(int(which), signal.Signals[name])
    if elsewhere := os.environ.get(ELSEWHERE):
        socket.gethostname = lambda: elsewhere
    scripted_trainer.main()
