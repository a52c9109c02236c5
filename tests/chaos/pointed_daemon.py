"""The daemon, which sends itself a signal at a named point, so that no test has to hit it by chance.

``WEIGHTSYNC_TEST_POINT`` names a file. While it exists, its three words are: ``before RECORD`` (the core has decided it
and the journal does not hold it), ``after RECORD`` (durable, and nothing that follows has been done), ``hearing
MESSAGE`` (an agent has said it, and nobody has listened yet) or ``answered CALL`` (an engine has performed it, and
nobody knows yet); then the signal, SIGKILL, or SIGSTOP for a test that does something else at that point. The file is
removed first, so that it happens once. Records are those of ``core.records``, messages those of ``protocol.messages``,
calls those of ``core.events.Call``.

``WEIGHTSYNC_TEST_SLOW_COMMIT``, if it is there: seconds that each commit of the journal takes longer, on its own
thread, as on a disk that is slow to sync.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from weightsync.orchestrator.cli import main as cli
from weightsync.orchestrator.core.commands import Append
from weightsync.orchestrator.core.events import AgentSaid, CallDone, Event
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.daemon.outbox import Outbox

POINT, SLOW = "WEIGHTSYNC_TEST_POINT", "WEIGHTSYNC_TEST_SLOW_COMMIT"


def arm(point: Path) -> None:
    """Wrap what points are about."""
    append, post = Outbox._append, Inbox.post

    def reached(moment: str, *names: str) -> None:
        if not point.exists():
            return
        when, what, number = point.read_text().split()
        if moment == when and what in names:
            point.unlink()
            os.kill(os.getpid(), signal.Signals[number])

    async def pointed_append(outbox: Outbox, commands: list[Append]) -> None:
        names = [type(command.record).__name__ for command in commands]
        reached("before", *names)
        await append(outbox, commands)
        reached("after", *names)

    def pointed_post(inbox: Inbox, event: Event) -> None:
        if isinstance(event, AgentSaid):
            reached("hearing", type(event.message).__name__)
        if isinstance(event, CallDone):
            reached("answered", event.call.name)
        post(inbox, event)

    Outbox._append = pointed_append  # type: ignore[method-assign]
    Inbox.post = pointed_post  # type: ignore[method-assign]


def slow_down(seconds: float) -> None:
    """Have each commit take so much longer."""
    append = Journal.append

    def slow_append(journal: Journal, entries: Sequence[tuple[str, bytes]]) -> list[int]:
        time.sleep(seconds)  # the fault itself: the disk's, in a thread that waits for nothing else
        return append(journal, entries)

    Journal.append = slow_append  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(Path(os.environ[POINT]))
    if seconds := os.environ.get(SLOW):
        slow_down(float(seconds))
    sys.exit(cli.main())
