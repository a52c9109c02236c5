"""Status and history from the journal alone, for when the daemon is down. Reads; never waits for the lock."""

import time
from collections.abc import Iterable

from weightsync.orchestrator.core.records import Committed, Memory, RoundEnded, decode_record, replay
from weightsync.orchestrator.daemon.admin.views import (
    HISTORY_ROUNDS,
    EngineView,
    RoundRow,
    RoundsView,
    StatusView,
    VersionView,
    newest,
    round_row,
    version_view,
)
from weightsync.orchestrator.daemon.journal import Entry, Journal
from weightsync.orchestrator.settings.settings import Settings


def rounds_in(journal: Journal, last: int) -> tuple[RoundRow, ...]:
    """The newest ``last`` rounds, oldest first.

    Raises:
        JournalLost, JournalUnreadable.
    """
    return tuple(_rows(journal.entries(["RoundEnded"], newest=last)))


def _rows(entries: Iterable[Entry]) -> Iterable[RoundRow]:
    for entry in entries:
        record = decode_record(entry.body)
        if isinstance(record, RoundEnded):
            yield round_row(record, entry.unix_time)


def status_from(settings: Settings) -> StatusView:
    """What the journal knows.

    Raises:
        JournalError: there is none, or it cannot be read.
        JournalLost, JournalUnreadable.
    """
    memory = Memory()
    committed: VersionView | None = None
    rows: list[RoundRow] = []
    with Journal.read_only(settings.journal_path) as journal:
        for entry in journal.entries():
            record = decode_record(entry.body)
            replay(memory, record)
            if isinstance(record, Committed):
                committed = version_view(record.version, record.sequence, entry.unix_time)
            elif isinstance(record, RoundEnded):
                rows.append(round_row(record, entry.unix_time))
        epoch, name = journal.epoch, journal.journal_id
    engines = tuple(
        EngineView(name=engine.name, url=engine.url, role=engine.role, state="unknown") for engine in settings.engines
    )
    return StatusView(
        run=settings.run.id,
        state=_sentence(memory),
        epoch=max(epoch, memory.epoch),
        journal_id=name,
        source="journal",
        unix_time=time.time(),
        committed=committed,
        engines=engines,
        rounds=newest(rows, HISTORY_ROUNDS),
    )


def rounds_from(settings: Settings, last: int) -> RoundsView:
    """The history that the journal holds. Raises as ``status_from``."""
    with Journal.read_only(settings.journal_path) as journal:
        return RoundsView(run=settings.run.id, rounds=rounds_in(journal, last), source="journal")


def _sentence(memory: Memory) -> str:
    what = "the daemon is not running"
    if memory.open_rounds:
        opened = next(reversed(memory.open_rounds.values()))
        engines = ", ".join(opened.began.engines)
        state = (
            "had decided it and must finish it"
            if opened.decided
            else "may have torn their live weights"
            if opened.dirty
            else "had not yet written to them"
        )
        return f"{what}; it stopped within round {opened.began.round} on {engines} and {state}: start it again"
    if memory.committed is None:
        return f"{what}; no version was ever committed"
    return f"{what}; {memory.committed} was the last commit and no round was open"
