"""The journal: real files, real fsync, real deaths of the process and of the disk."""

import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.journal import (
    JOURNAL_SCHEMA,
    MAX_ENTRY_BYTES,
    Journal,
    JournalError,
    JournalLocked,
    JournalLost,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path, clock=lambda: 12.5) as opened:
        yield opened


def append(journal: Journal, kind: str, body: bytes) -> int:
    return journal.append([(kind, body)])[0]


def spawn(script: str, path: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script, str(path)], text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def test_entries_come_back_in_order(journal: Journal) -> None:
    assert append(journal, "A", b'{"n": 1}') == 1
    assert journal.append([("B", b'{"n": 2}'), ("A", b'{"n": 3}')]) == [2, 3]
    found = list(journal.entries())
    assert [(entry.sequence, entry.kind, json.loads(entry.body)["n"]) for entry in found] == [
        (1, "A", 1), (2, "B", 2), (3, "A", 3),
    ]  # fmt: skip
    assert found[0].unix_time == 12.5
    assert [entry.sequence for entry in journal.entries(["A"])] == [1, 3]
    assert [entry.sequence for entry in journal.entries(newest=2)] == [2, 3]
    assert [entry.sequence for entry in journal.entries(["A", "B"], newest=1)] == [3]
    assert list(journal.entries([])) == []


def test_it_survives_closing(path: Path) -> None:
    with Journal.open(path) as first:
        append(first, "A", b"{}")
        name = first.journal_id
    with Journal.open(path) as second:
        assert second.journal_id == name
        assert len(name) == 32
        assert [entry.kind for entry in second.entries()] == ["A"]
    with Journal.open(path.with_name("other")) as other:
        assert other.journal_id != name


def test_files_are_private(journal: Journal, path: Path) -> None:
    assert path.parent.stat().st_mode & 0o077 == 0
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_commits_are_synchronous(journal: Journal) -> None:
    connection = journal._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_entries_are_final(journal: Journal) -> None:
    append(journal, "A", b"{}")
    with pytest.raises(sqlite3.DatabaseError, match="entries are final"):
        journal._connection.execute("UPDATE entries SET kind = 'B'")


def test_a_second_daemon_is_told_the_pid_of_the_first(journal: Journal, path: Path) -> None:
    with pytest.raises(JournalLocked, match=f"process {os.getpid()}") as caught:
        Journal.open(path)
    assert caught.value.pid == os.getpid()
    journal.close()
    Journal.open(path).close()


HOLD = """
import sys
from pathlib import Path
from weightsync.orchestrator.daemon.journal import Journal
journal = Journal.open(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    print(journal.append([("A", b'{"n": %d}' % number)])[0], flush=True)
    if number == 3:
        sys.stdin.read()
"""


def test_kill_9_loses_no_acknowledged_entry_and_frees_the_lock(path: Path) -> None:
    process = spawn(HOLD, path)
    assert process.stdout is not None
    assert process.stdin is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(3)]
    with pytest.raises(JournalLocked) as caught:
        Journal.open(path)
    assert caught.value.pid == process.pid
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    with Journal.open(path) as journal:
        assert [entry.sequence for entry in journal.entries()] == acknowledged == [1, 2, 3]
        assert append(journal, "B", b"{}") == 4


FULL = """
import resource, signal, sys
from pathlib import Path
from weightsync.orchestrator.daemon.journal import Journal, JournalLost
journal = Journal.open(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
count = 0
try:
    for count in range(1000):
        journal.append([("A", b'{"text": "%s"}' % (b"x" * 2000))])
except JournalLost as error:
    print(count)
    print(error)
try:
    journal.append([("A", b"{}")])
except JournalLost:
    print("stays lost")
"""


def test_a_full_disk_ends_it_and_keeps_what_was_acknowledged(path: Path) -> None:
    process = spawn(FULL, path)
    output, _ = process.communicate(timeout=60)
    count, reason, after = output.splitlines()
    assert 0 < int(count) < 999
    assert "append failed" in reason
    assert "outcome is unknown" in reason
    assert after == "stays lost"
    with Journal.open(path) as journal:
        assert len(list(journal.entries())) >= int(count)
        append(journal, "B", b"{}")


def test_a_failed_commit_is_all_or_nothing(journal: Journal, path: Path) -> None:
    journal._connection.execute("CREATE TRIGGER t BEFORE INSERT ON entries WHEN NEW.kind = 'X' BEGIN SELECT RAISE(ABORT, 'no'); END")  # fmt: skip # noqa: E501
    with pytest.raises(JournalLost):
        journal.append([("A", b"{}"), ("X", b"{}")])
    with pytest.raises(JournalLost):
        list(journal.entries())
    journal.close()
    with Journal.open(path) as reread:
        assert list(reread.entries()) == []


def test_bodies_have_a_limit_and_are_text(journal: Journal) -> None:
    with pytest.raises(ValueError, match="limit"):
        append(journal, "A", b" " * (MAX_ENTRY_BYTES + 1))
    with pytest.raises(UnicodeDecodeError):
        append(journal, "A", b"\xff")
    assert append(journal, "A", b"{}") == 1


@pytest.mark.parametrize("schema", [JOURNAL_SCHEMA - 1, JOURNAL_SCHEMA + 1])
def test_another_schema_is_refused(path: Path, schema: int) -> None:
    with Journal.open(path) as journal:
        journal._connection.execute("UPDATE meta SET value = ? WHERE name = 'schema'", [schema])
    for opened in (Journal.open, Journal.read_only):
        with pytest.raises(JournalError, match=f"has schema {schema}, this daemon knows {JOURNAL_SCHEMA}"):
            opened(path)
    # The lock of the failed attempt is free again.
    with pytest.raises(JournalError, match=f"has schema {schema}"):
        Journal.open(path)


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\x00" + b"\x07" * 5000])
def test_other_files_are_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(JournalError, match="no usable journal"):
        Journal.open(path)
    assert path.read_bytes() == content


def test_another_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(JournalError, match="journal"):
        Journal.open(path)


def test_a_place_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot hold the journal"):
        Journal.open(tmp_path / "file" / "journal.sqlite")


def test_damage_is_noticed(path: Path) -> None:
    with Journal.open(path) as journal:
        journal.append([("A", b'{"text": "%s"}' % (b"x" * 3000))] * 50)
    data = bytearray(path.read_bytes())
    data[4096 * 6 : 4096 * 9] = b"\xa5" * (4096 * 3)
    path.write_bytes(data)
    with pytest.raises(JournalError):
        Journal.open(path)


@pytest.mark.parametrize(
    ("column", "damage"),
    [
        ("body", '{"n": 2}'),
        ("body", b"\xff\xfe"),
        ("body", 5),
        ("kind", "B"),
        ("kind", b"\xff"),
        ("unix_time", 12.25),
        ("unix_time", "text"),
        ("checksum", 0),
    ],
)
def test_an_entry_that_is_not_what_was_written_says_so(journal: Journal, column: str, damage: object) -> None:
    """SQLite's own check sees pages that make no sense, not a digit that is another."""
    journal.append([("A", b'{"n": 1}'), ("A", b'{"n": 1}')])
    journal._connection.execute("DROP TRIGGER entries_are_final")
    journal._connection.execute(f"UPDATE entries SET {column} = ? WHERE sequence = 2", [damage])
    assert [entry.intact for entry in journal.entries()] == [True, False]


def test_no_byte_of_an_entry_changes_unseen(path: Path) -> None:
    """Whichever byte of the file is another one: it is refused, or the entries are what was written or say so."""
    bodies = [b'{"text": "%s%d"}' % (b"x" * 40, number) for number in range(20)]
    with Journal.open(path, clock=lambda: 12.5) as journal:
        journal.append([("A", body) for body in bodies])
    whole, chance, seen = path.read_bytes(), random.Random(3), 0
    for _ in range(300):
        damaged = bytearray(whole)
        at = chance.randrange(len(whole))
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            with Journal.open(path) as journal:
                entries = list(journal.entries())
        except (JournalError, JournalLost):
            seen += 1
            continue
        seen += not all(entry.intact for entry in entries)
        assert [entry.body for entry in entries if entry.intact] == [
            body for body, entry in zip(bodies, entries, strict=False) if entry.intact
        ]
    assert seen > 10


def test_reading_beside_a_daemon_and_after_it(journal: Journal, path: Path) -> None:
    append(journal, "A", b"{}")
    with Journal.read_only(path) as reader:
        assert [entry.kind for entry in reader.entries()] == ["A"]
        assert reader.journal_id == journal.journal_id
        append(journal, "B", b"{}")
        assert [entry.kind for entry in reader.entries()] == ["A", "B"]
        with pytest.raises(JournalLost):
            append(reader, "C", b"{}")
    journal.close()
    with Journal.read_only(path) as reader:
        assert [entry.kind for entry in reader.entries()] == ["A", "B"]
    with pytest.raises(JournalError, match="no journal at"):
        Journal.read_only(path.with_name("absent"))


def test_from_the_newest_of_a_kind_on(journal: Journal) -> None:
    for kind in "ABCABC":
        append(journal, kind, b"{}")
    assert [entry.sequence for entry in journal.since("B")] == [5, 6]
    assert [entry.sequence for entry in journal.since("X")] == [1, 2, 3, 4, 5, 6]
    assert [entry.sequence for entry in journal.after(4)] == [5, 6]
    assert [journal.nth_newest("A", n) for n in (1, 2, 3)] == [4, 1, 0]


def test_the_oldest_of_a_kind_are_dropped_and_no_sequence_comes_again(journal: Journal) -> None:
    for kind in "ABAABA":
        append(journal, kind, b"{}")
    assert [journal.drop("A", before=6, at_most=2) for _ in range(3)] == [2, 1, 0]
    assert [(entry.sequence, entry.kind) for entry in journal.entries()] == [(2, "B"), (5, "B"), (6, "A")]
    assert journal.drop("A", before=7, at_most=9) == 1
    assert append(journal, "A", b"{}") == 7


def test_what_was_dropped_is_given_back_to_the_disk_piece_by_piece(journal: Journal, path: Path) -> None:
    for _ in range(100):
        append(journal, "A", b'{"text": "%s"}' % (b"x" * 20_000))
    assert not journal.shrink(100), "nothing was dropped"
    journal.drop("A", before=100, at_most=100)
    pieces = 1
    while journal.shrink(100):
        pieces += 1
    assert pieces > 4
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert path.stat().st_size < 100_000


def test_a_file_that_cannot_give_anything_back_is_left_as_it_is(journal: Journal, path: Path) -> None:
    """As one that another program has written anew."""
    journal._connection.execute("PRAGMA auto_vacuum = NONE")
    journal._connection.execute("VACUUM")
    append(journal, "A", b'{"text": "%s"}' % (b"x" * 20_000))
    journal.drop("A", before=2, at_most=1)
    assert not journal.shrink(100)
