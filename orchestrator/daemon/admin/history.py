"""What the journal's records leave for people to look at: the last rounds, and when the last commit was."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from weightsync.orchestrator.core.records import Committed, Decided, Record, RoundEnded, decode_row
from weightsync.orchestrator.daemon.admin.views import HISTORY_ROUNDS, RoundRow, VersionView, round_row, version_view
from weightsync.orchestrator.daemon.journal import Entry

SHOWN: Final = {RoundEnded.__name__: HISTORY_ROUNDS, Decided.__name__: 1, Committed.__name__: 1}
"""Kinds of records that leave something to look at, in the order in which they are recalled, and how many of each."""


def one_digest(digests: Mapping[str, str]) -> str:
    """Of all members' digests: SHA-256 over the sorted lines ``member=digest``, as the audit log has it."""
    lines = (f"{member}={digest}\n" for member, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class History:
    """Fed with every record, in the journal's order; at a start with the newest entries of the kinds in SHOWN.

    ``rounds``: the newest HISTORY_ROUNDS that ended, oldest first. ``committed``: the newest commit, None before one.
    """

    def __init__(self) -> None:
        self.rounds: tuple[RoundRow, ...] = ()
        self.committed: VersionView | None = None
        self._decided: Decided | None = None

    def recall(self, entries: Iterable[Entry]) -> None:
        """Keep what is shown of what is in the journal already. A row that cannot be read says so."""
        for entry in entries:
            self.remember(decode_row(entry.body, entry.intact), entry.unix_time)

    def remember(self, record: Record, unix_time: float) -> RoundRow | None:
        """Keep what is shown of a record that is durable since ``unix_time``; its row, if a round ended with it."""
        if isinstance(record, Decided):
            self._decided = record
        if isinstance(record, Committed):
            decided = self._decided
            of_it = decided is not None and decided.round == record.round
            digest = one_digest(decided.digests) if decided is not None and of_it else ""
            self.committed = version_view(record.version, record.sequence, unix_time, digest)
        if not isinstance(record, RoundEnded):
            return None
        row = round_row(record, unix_time)
        self.rounds = (*self.rounds, row)[-HISTORY_ROUNDS:]
        return row


def rows_of(entries: Iterable[Entry]) -> tuple[RoundRow, ...]:
    """The rows of the rounds that ended, among ``entries`` of a journal. One that cannot be read says so."""
    read = [(decode_row(entry.body, entry.intact), entry.unix_time) for entry in entries]
    return tuple(round_row(record, when) for record, when in read if isinstance(record, RoundEnded))
