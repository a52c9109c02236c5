"""What is told of a daemon that is down: the journal's word, and no more."""

from pathlib import Path

import pytest
from weightsync.orchestrator.core.errors import JournalUnreadable
from weightsync.orchestrator.core.records import (
    Committed,
    Decided,
    EpochBegan,
    LiveDirty,
    Record,
    RoundBegan,
    RoundEnded,
    encode_record,
)
from weightsync.orchestrator.daemon.admin.from_journal import rounds_from, status_from
from weightsync.orchestrator.daemon.journal import Journal, JournalError
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.settings import Settings, load

VERSION = Version(7, 41)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: glm, directory: {tmp_path / "run"}}}
state_directory: {tmp_path / "state"}
credentials: {tmp_path / "credentials"}
engines: [{{name: a, url: "http://127.0.0.1:1"}}]
""")
    return load(config, {})


def began(number: int) -> RoundBegan:
    return RoundBegan(round=RoundName(3, number), version=VERSION, attempt=1, engines=("a",))


def ended(number: int) -> RoundEnded:
    return RoundEnded(
        round=RoundName(3, number), version=VERSION, attempt=1, engines=("a",), left_out=(), outcome="committed",
        reason="", bytes=0, descriptors=0, times={},
    )  # fmt: skip


def write(settings: Settings, *records: Record) -> None:
    with Journal.open(settings.journal_path, clock=lambda: 12.5) as journal:
        journal.append([(type(record).__name__, encode_record(record)) for record in records])


def test_the_last_commit_and_the_epoch_are_the_records(settings: Settings) -> None:
    commit = Committed(round=RoundName(3, 1), version=VERSION, sequence=8)
    write(settings, EpochBegan(epoch=2), EpochBegan(epoch=3), began(1), commit, ended(1))
    status = status_from(settings)
    assert (status.run, status.source, status.epoch, len(status.journal_id)) == ("glm", "journal", 3, 32)
    assert status.committed is not None
    assert (status.committed.step, status.committed.sequence, status.committed.unix_time) == (41, 8, 12.5)
    assert [(engine.name, engine.state) for engine in status.engines] == [("a", "unknown")]
    assert [row.round for row in status.rounds] == ["3.1"]
    assert "was the last commit and no round was open" in status.state


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([EpochBegan(epoch=3)], "no version was ever committed"),
        ([began(1)], "round 3.1 on a and had not yet written to them"),
        ([began(1), LiveDirty(round=RoundName(3, 1), writers={})], "may have torn their live weights"),
        (
            [
                began(1),
                LiveDirty(round=RoundName(3, 1), writers={}),
                Decided(round=RoundName(3, 1), version=VERSION, digests={}),
            ],
            "had decided it and must finish it",
        ),
    ],
)
def test_where_it_stopped(settings: Settings, records: list[Record], says: str) -> None:
    write(settings, *records)
    assert says in status_from(settings).state


def test_rounds_are_the_newest_oldest_first(settings: Settings) -> None:
    write(settings, *(ended(number) for number in range(1, 6)))
    view = rounds_from(settings, 2)
    assert (view.source, [row.round for row in view.rounds]) == ("journal", ["3.4", "3.5"])


def test_without_a_journal_there_is_nothing_to_tell(settings: Settings) -> None:
    with pytest.raises(JournalError, match="no journal at"):
        status_from(settings)


def test_a_record_of_the_future_is_not_guessed_at(settings: Settings) -> None:
    with Journal.open(settings.journal_path) as journal:
        journal.append([("RoundEnded", b'{"type": "OfTheFuture"}')])
    (row,) = rounds_from(settings, 1).rounds
    assert row.outcome == "unreadable"
    assert "OfTheFuture" in row.reason
    with pytest.raises(JournalUnreadable, match=r"OfTheFuture.* Fix: restore the state directory"):
        status_from(settings)
