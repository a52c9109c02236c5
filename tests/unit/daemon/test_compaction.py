"""A compacted journal says what it said before, at whatever point somebody reads it or the process dies."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from weightsync.orchestrator.core.errors import JournalUnreadable
from weightsync.orchestrator.core.memory import Memory, replay
from weightsync.orchestrator.core.records import (
    Committed,
    Decided,
    EpochBegan,
    LiveDirty,
    MemorySaved,
    Record,
    RoundBegan,
    RoundEnded,
    decode_record,
    encode_record,
)
from weightsync.orchestrator.daemon import compaction
from weightsync.orchestrator.daemon.compaction import Compaction
from weightsync.orchestrator.daemon.journal import Journal, JournalLost
from weightsync.orchestrator.protocol.names import RoundName, Version


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path, clock=lambda: 12.5) as opened:
        yield opened


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test reaches."""
    monkeypatch.setattr(compaction, "SNAPSHOT_AFTER", 16)
    monkeypatch.setattr(compaction, "DROPPED_AT_ONCE", 4)
    monkeypatch.setattr(compaction, "KEPT", {"RoundEnded": 3, "Committed": 1})
    monkeypatch.setattr(compaction, "FOLD_SECONDS", 60.0)


def a_round(number: int, digests: int = 1) -> list[Record]:
    """All that a round leaves; its digests make it as large as wanted."""
    name, version = RoundName(1, number), Version(7, number)
    return [
        RoundBegan(round=name, version=version, attempt=1, engines=("a",)),
        LiveDirty(round=name, writers={}),
        Decided(round=name, version=version, digests={f"a/{rank}": "0" * 32 for rank in range(digests)}),
        Committed(round=name, version=version, sequence=number),
        RoundEnded(
            round=name, version=version, attempt=1, engines=("a",), left_out=(), outcome="committed", reason="",
            bytes=0, descriptors=0, times={},
        ),
    ]  # fmt: skip


def write(journal: Journal, *records: Record) -> None:
    journal.append([(type(record).__name__, encode_record(record)) for record in records])


def fold(journal: Journal) -> Memory:
    memory = Memory()
    for entry in journal.since("MemorySaved"):
        replay(memory, decode_record(entry.body))
    return memory


def kinds(journal: Journal) -> list[str]:
    return [entry.kind for entry in journal.entries()]


def finish(compacting: Compaction) -> int:
    """Until nothing is left to do; how many steps that took."""
    steps = 1
    while compacting.step():
        steps += 1
        assert steps < 10_000
    return steps


def test_a_snapshot_takes_the_place_of_what_it_stands_for(journal: Journal) -> None:
    write(journal, EpochBegan(epoch=1), *(record for number in range(1, 11) for record in a_round(number)))
    before = fold(journal)
    finish(Compaction(journal))
    assert fold(journal) == before
    assert kinds(journal) == ["RoundEnded", "RoundEnded", "Committed", "RoundEnded", "MemorySaved"]
    assert (before.epoch, before.committed, len(before.done)) == (1, Version(7, 10), 10)


def test_a_journal_does_not_grow_while_rounds_come_and_go(journal: Journal) -> None:
    compacting = Compaction(journal)
    whole = Memory()
    for number in range(1, 101):
        for record in a_round(number):
            write(journal, record)
            replay(whole, record)
        finish(compacting)
        assert fold(journal) == whole
        assert len(kinds(journal)) <= 16 + 5 + 3 + 1 + 1
    rounds = [decode_record(entry.body) for entry in journal.entries(["RoundEnded"], newest=3)]
    assert [record.round.number for record in rounds if isinstance(record, RoundEnded)] == [98, 99, 100]


def test_a_round_that_is_open_stays_open(journal: Journal) -> None:
    write(journal, *a_round(1)[:3], *(EpochBegan(epoch=number) for number in range(20)))
    finish(Compaction(journal))
    assert kinds(journal) == ["MemorySaved"]
    (opened,) = fold(journal).open_rounds.values()
    assert (opened.began.round.number, opened.dirty, opened.decided) == (1, True, True)
    write(journal, *a_round(1)[3:])
    assert fold(journal).open_rounds == {}


def test_another_daemon_goes_on_where_this_one_ended(journal: Journal, path: Path) -> None:
    write(journal, *(record for number in range(1, 5) for record in a_round(number)))
    first = Compaction(journal)
    assert first.step(), "a snapshot, and nothing is dropped yet"
    before = fold(journal)
    journal.close()
    with Journal.open(path) as again:
        assert len(kinds(again)) == 21
        finish(Compaction(again))
        assert kinds(again) == ["RoundEnded", "RoundEnded", "Committed", "RoundEnded", "MemorySaved"]
        assert fold(again) == before


def test_the_file_becomes_smaller(journal: Journal, path: Path) -> None:
    compacting = Compaction(journal)
    for number in range(1, 101):
        write(journal, *a_round(number, digests=500))
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = path.stat().st_size
    assert before > 2_000_000
    finish(compacting)
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert path.stat().st_size < before / 3


def test_what_waits_is_not_held_up_by_much(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step reads, drops or gives back more than so much, however much there is."""
    monkeypatch.setattr(compaction, "FOLD_SECONDS", 0.0)
    write(journal, *(record for number in range(1, 11) for record in a_round(number)))
    assert finish(Compaction(journal)) >= 50 + 46 / 4


def test_the_log_is_carried_over_when_nobody_waits(journal: Journal, path: Path) -> None:
    log = path.with_name(path.name + "-wal")
    for number in range(1, 101):
        write(journal, *a_round(number, digests=500))
    assert log.stat().st_size > 2_000_000
    finish(Compaction(journal))
    for _ in range(3):  # the next commits use it again from its beginning
        write(journal, EpochBegan(epoch=1))
    assert log.stat().st_size <= 1 << 20


def test_the_death_of_the_process_between_any_two_statements_costs_nothing(
    journal: Journal, path: Path, tmp_path: Path
) -> None:
    """Each state of the files that a kill could leave is opened by another daemon."""
    write(journal, EpochBegan(epoch=1), *(record for number in range(1, 11) for record in a_round(number)))
    expected, rounds, copies = fold(journal), list(journal.entries(["RoundEnded"], newest=3)), []

    def copy(statement: str) -> None:
        place = tmp_path / f"copy-{len(copies)}"
        place.mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(path.with_name(path.name + suffix), place / (path.name + suffix))
        copies.append((statement, place / path.name))

    journal._connection.set_trace_callback(copy)
    finish(Compaction(journal))
    journal._connection.set_trace_callback(None)
    assert {statement.split()[0] for statement, _ in copies} == {
        "BEGIN",
        "INSERT",
        "DELETE",
        "COMMIT",
        "SELECT",
        "PRAGMA",
    }
    for statement, place in copies:
        with Journal.open(place) as survivor:
            assert fold(survivor) == expected, statement
            assert list(survivor.entries(["RoundEnded"], newest=3)) == rounds, statement
            finish(Compaction(survivor))
            assert fold(survivor) == expected, statement


KILLED = """
import sys
from pathlib import Path
from weightsync.orchestrator.core.records import Committed, RoundBegan, encode_record
from weightsync.orchestrator.daemon import compaction
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.protocol.names import RoundName, Version
compaction.SNAPSHOT_AFTER, compaction.DROPPED_AT_ONCE = 8, 2
journal = Journal.open(Path(sys.argv[1]))
compacting = compaction.Compaction(journal)
number = 0
while True:
    number += 1
    record = Committed(round=RoundName(1, number), version=Version(7, number), sequence=number)
    journal.append([("Committed", encode_record(record))])
    print(number, flush=True)
    compacting.step()
"""


@pytest.mark.parametrize("lines", [50, 63, 120])
def test_kill_9_while_it_compacts_loses_nothing_acknowledged(path: Path, lines: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(lines):
        acknowledged = int(process.stdout.readline())
    process.kill()
    rest = process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    with Journal.open(path) as journal:
        memory = fold(journal)
        assert memory.sequence >= int(rest[-1] if rest else acknowledged)
        assert list(memory.done) == [Version(7, number) for number in range(1, memory.sequence + 1)]
        assert len(kinds(journal)) < memory.sequence


def test_somebody_who_reads_meanwhile_sees_one_state(journal: Journal, path: Path) -> None:
    write(journal, *(record for number in range(1, 11) for record in a_round(number)))
    expected = fold(journal)
    with Journal.read_only(path) as reader:
        reading = reader.since("MemorySaved")
        first = next(reading)
        finish(Compaction(journal))
        memory = Memory()
        for entry in (first, *reading):
            replay(memory, decode_record(entry.body))
        assert memory == expected
        assert fold(reader) == expected


def test_what_cannot_be_saved_stays_as_it_is(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Memory) -> MemorySaved:
        raise JournalUnreadable("a bug")

    monkeypatch.setattr(compaction, "saved", fails)
    write(journal, *(record for number in range(1, 11) for record in a_round(number)))
    compacting = Compaction(journal)
    with structlog.testing.capture_logs() as logs:
        assert [compacting.step(), compacting.step()] == [False, False]
    assert [(line["event"], line["reason"]) for line in logs] == [("the journal is no longer compacted", "a bug")]
    assert len(kinds(journal)) == 50


def test_a_disk_that_fails_is_not_hidden(journal: Journal) -> None:
    write(journal, *(record for number in range(1, 11) for record in a_round(number)))
    journal._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(JournalLost, match="append failed"):
        Compaction(journal).step()


def test_every_kind_of_record_is_dropped_or_kept_on_purpose() -> None:
    assert set(compaction._KINDS) >= {"MemorySaved", *compaction.KEPT}
    assert all(issubclass(kind, Record) for kind in compaction.get_args(compaction.AnyRecord))
