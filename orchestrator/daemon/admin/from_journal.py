"""Status and history from the journal alone, for when the daemon is down. Reads; never waits for the lock."""

import time

from weightsync.orchestrator.core.memory import Memory, replay
from weightsync.orchestrator.core.records import MemorySaved, RoundEnded, decode_record
from weightsync.orchestrator.daemon.admin.history import SHOWN, History, rows_of
from weightsync.orchestrator.daemon.admin.views import EngineView, ProblemView, RoundsView, StatusView
from weightsync.orchestrator.daemon.engines.kinds import section_of
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.settings.settings import Settings


def status_from(settings: Settings) -> StatusView:
    """What the journal knows.

    Raises:
        JournalError: there is none, or it cannot be read.
        JournalLost, JournalUnreadable.
    """
    memory, history = Memory(), History()
    with Journal.read_only(settings.journal_path) as journal:
        for entry in journal.since(MemorySaved.__name__):
            replay(memory, decode_record(entry.body, entry.intact))
        for kind, newest in SHOWN.items():
            history.recall(journal.entries([kind], newest))
        journal_id = journal.journal_id
    known = [*settings.engines, *(section_of(engine, settings) for engine in memory.admitted.values())]
    engines = tuple(EngineView(name=each.name, url=each.url, role=each.role, state="unknown") for each in known)
    return StatusView(
        run=settings.run.id,
        state=_sentence(memory),
        epoch=memory.epoch,
        journal_id=journal_id,
        source="journal",
        unix_time=time.time(),
        committed=history.committed,
        engines=engines,
        rounds=history.rounds,
        problems=(ProblemView(severity="critical", what=_sentence(memory), fix="start it again"),),
        holds=dict(memory.holds),
        maintenance=memory.maintenance or "",
    )


def rounds_from(settings: Settings, last: int) -> RoundsView:
    """The history that the journal holds. Raises as ``status_from``."""
    with Journal.read_only(settings.journal_path) as journal:
        entries = journal.entries([RoundEnded.__name__], newest=last)
        return RoundsView(run=settings.run.id, rounds=rows_of(entries), source="journal")


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
