"""What records leave for people to look at."""

import hashlib

from weightsync.orchestrator.core.records import Committed, Decided, EpochBegan, RoundEnded, encode_record
from weightsync.orchestrator.daemon.admin.history import History, rows_of
from weightsync.orchestrator.daemon.admin.views import HISTORY_ROUNDS, VersionView
from weightsync.orchestrator.daemon.journal import Entry
from weightsync.orchestrator.protocol.names import RoundName, Version


def ended(number: int) -> RoundEnded:
    return RoundEnded(
        round=RoundName(1, number), version=Version(7, 40 + number), attempt=1, engines=("a",), left_out=(),
        outcome="committed", reason="", bytes=0, descriptors=0, times={},
    )  # fmt: skip


def committed(number: int) -> Committed:
    return Committed(round=RoundName(1, number), version=Version(7, 40 + number), sequence=number)


def test_the_newest_commit_counts() -> None:
    history = History()
    assert (history.committed, history.rounds) == (None, ())
    for number in (1, 2):
        assert history.remember(committed(number), 100.0 + number) is None
    assert history.committed == VersionView(step=42, generation=7, sequence=2, unix_time=102.0)
    assert history.rounds == ()


def test_the_newest_commit_has_the_digest_of_its_own_round() -> None:
    history = History()
    history.remember(Decided(round=RoundName(1, 1), version=Version(7, 41), digests={"e/1": "22", "e/0": "11"}), 1.0)
    history.remember(committed(1), 2.0)
    assert history.committed is not None
    assert history.committed.digest == hashlib.sha256(b"e/0=11\ne/1=22\n").hexdigest()
    history.remember(committed(2), 3.0)  # decided by a daemon before, of whose record nothing is left
    assert history.committed.digest == ""


def test_a_round_that_ended_is_a_row_and_only_the_newest_are_kept() -> None:
    history = History()
    assert history.remember(EpochBegan(epoch=1), 1.0) is None
    rows = [history.remember(ended(number), float(number)) for number in range(1, HISTORY_ROUNDS + 3)]
    assert history.rounds == tuple(rows[2:])
    assert (history.rounds[-1].round, history.rounds[-1].unix_time) == ("1.22", 22.0)


def test_rows_of_a_journal_are_of_the_rounds_that_ended() -> None:
    records = [EpochBegan(epoch=1), committed(1), ended(1), ended(2)]
    entries = [
        Entry(number, float(number), type(record).__name__, encode_record(record))
        for number, record in enumerate(records, start=1)
    ]
    assert [(row.round, row.step, row.unix_time) for row in rows_of(entries)] == [("1.1", 41, 3.0), ("1.2", 42, 4.0)]
