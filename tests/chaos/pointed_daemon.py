"""The daemon, which sends itself a signal at a named point, so that no test has to hit it by chance.

``WEIGHTSYNC_TEST_POINT`` names the point in two words: ``before RECORD`` (the core has decided it, the journal does not
hold it), ``after RECORD`` (durable, and nothing that follows has been done), or ``hearing MESSAGE`` (an agent has said
it, and nobody has listened yet). Records are those of ``core.records``, messages those of ``protocol.messages``.
``WEIGHTSYNC_TEST_SIGNAL`` is SIGKILL, or SIGSTOP for a test that does something else at that point; it is sent once.
"""

import os
import signal
import sys

from weightsync.orchestrator.core.commands import Append
from weightsync.orchestrator.core.events import AgentSaid, Event
from weightsync.orchestrator.shell import cli
from weightsync.orchestrator.shell.outbox import Outbox
from weightsync.orchestrator.shell.runner import Runner

POINT, SIGNAL = "WEIGHTSYNC_TEST_POINT", "WEIGHTSYNC_TEST_SIGNAL"


def arm(point: str, number: signal.Signals) -> None:
    """Wrap what the point is about."""
    when, what = point.split()
    append, post = Outbox._append, Runner.post
    left = [number]

    def reached(moment: str, *names: str) -> None:
        if moment == when and what in names and left:
            os.kill(os.getpid(), left.pop())

    async def pointed_append(outbox: Outbox, commands: list[Append]) -> None:
        names = [type(command.record).__name__ for command in commands]
        reached("before", *names)
        await append(outbox, commands)
        reached("after", *names)

    def pointed_post(runner: Runner, event: Event) -> None:
        if isinstance(event, AgentSaid):
            reached("hearing", type(event.message).__name__)
        post(runner, event)

    Outbox._append = pointed_append  # type: ignore[method-assign]
    Runner.post = pointed_post  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(os.environ[POINT], signal.Signals[os.environ[SIGNAL]])
    sys.exit(cli.main())
