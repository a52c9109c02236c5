"""Keeps the journal small while the daemon runs: a snapshot stands for all that was before it, which is then dropped.

Each step is one commit or a few milliseconds of reading, and after each the journal is whole: entries are dropped only
when a snapshot that holds what they say is in the journal before them.
"""

import time
from typing import Final, get_args

import structlog
from weightsync.orchestrator.core.errors import JournalUnreadable, RecordUnwritable
from weightsync.orchestrator.core.memory import Memory, replay, saved
from weightsync.orchestrator.core.records import (
    AnyRecord,
    Committed,
    Decided,
    MemorySaved,
    RoundEnded,
    decode_record,
    encode_record,
)
from weightsync.orchestrator.daemon.journal import Journal, JournalError

log = structlog.get_logger(__name__)

SNAPSHOT_AFTER: Final = 1024
"""Entries. A start folds so many and some more; a snapshot, which has up to some hundred kB, costs less than they."""

KEPT: Final = {RoundEnded.__name__: 10_000, Decided.__name__: 1, Committed.__name__: 1}
"""How many of a kind are kept for people although a snapshot holds what they mean: a week of rounds, one each minute,
of about 1 kB each; the last commit, for when it was, and of what digest."""

FOLD_SECONDS: Final = 0.005
"""Whoever appends meanwhile waits so long, or for one of the commits below."""

DROPPED_AT_ONCE: Final = 64
SHRUNK_PAGES: Final = 128

_KINDS: Final = tuple(kind.__name__ for kind in get_args(AnyRecord))


class Compaction:
    """Of one open journal, on the thread that it belongs to."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._memory = Memory()
        self._folded = 0
        """Sequence of the last entry in ``_memory``."""
        self._snapshot = 0
        """Sequence of the newest snapshot, and how many entries came after it."""
        self._since = 0
        self._dropped_before = 0
        """The snapshot before which nothing is left to drop."""
        self._given_up = False

    def step(self) -> bool:
        """Do one piece of what there is to do; whether there is more.

        Raises:
            JournalLost: the disk; end the process.
        """
        if self._given_up:
            return False
        try:
            return self._step()
        except (JournalError, JournalUnreadable, RecordUnwritable, LookupError, ValueError) as error:
            # Nothing is lost by it: the journal grows until somebody looks.
            log.error("the journal is no longer compacted", reason=str(error))
            self._given_up = True
            return False

    def _step(self) -> bool:
        if not self._fold():
            return True
        if self._since >= SNAPSHOT_AFTER:
            self._save()
            return True
        return self._drop() or self._journal.shrink(SHRUNK_PAGES)

    def _fold(self) -> bool:
        """Read on; whether the end was reached."""
        until = time.monotonic() + FOLD_SECONDS
        unread = self._journal.after(self._folded) if self._folded else self._journal.since(MemorySaved.__name__)
        for entry in unread:
            replay(self._memory, decode_record(entry.body, entry.intact))
            self._folded = entry.sequence
            self._since += 1
            if entry.kind == MemorySaved.__name__:
                self._snapshot, self._since = entry.sequence, 0
            if time.monotonic() > until:
                return False
        return True

    def _save(self) -> None:
        made = encode_record(saved(self._memory))
        # Nobody else appends on this thread: it follows the last entry that is folded into it.
        (self._snapshot,) = self._journal.append([(MemorySaved.__name__, made)])
        self._folded, self._since = self._snapshot, 0

    def _drop(self) -> bool:
        """Drop the oldest entries of one kind; whether there were any."""
        if self._dropped_before == self._snapshot:
            return False
        for kind in _KINDS:
            before = min(self._snapshot, self._journal.nth_newest(kind, KEPT[kind])) if kind in KEPT else self._snapshot
            if self._journal.drop(kind, before, DROPPED_AT_ONCE):
                return True
        self._dropped_before = self._snapshot
        return False
