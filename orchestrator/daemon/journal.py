"""The journal: what the daemon has decided, on local disk, durable before anybody acts on it.

SQLite in WAL mode with ``synchronous=FULL``: each commit returns after an fsync of the log. Any error of SQLite or of
the disk under it leaves the outcome of that commit unknown, so the process must end and read the journal again.
"""

import contextlib
import dataclasses
import fcntl
import os
import secrets
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Final

from weightsync.orchestrator.core.errors import WeightsyncError
from weightsync.orchestrator.protocol.messages import Fault

JOURNAL_SCHEMA: Final = 2
"""Raised when tables or what is folded change; a journal of another schema is refused."""

MAX_ENTRY_BYTES: Final = 16 * 1024 * 1024
"""A decision with the digests of 65,536 ranks has 5 MB."""

LOG_BYTES: Final = 1 << 20
"""From this size on, ``shrink`` carries the write-ahead log over into the database …"""

FULL_LOG_PAGES: Final = 8192
"""… and from this one on (32 MiB) a commit does it, for which somebody waits."""

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, unix_time REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX entries_by_kind ON entries (kind, sequence);
CREATE TRIGGER entries_are_final BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are final'); END;
"""

_RESTORE: Final = "restore it, or start with a new state directory: the engines then catch up"

_FAILURES: Final = (sqlite3.Error, UnicodeDecodeError)
"""Of a damaged file. The second one, where the words of SQLite's own error are the damage."""

_COLUMNS = "sequence, unix_time, CAST(kind AS BLOB), CAST(body AS BLOB), checksum"
"""As bytes: of a damaged entry nothing is sure, not even that its text can be decoded."""


class JournalError(WeightsyncError):
    """The journal cannot be opened as it is. The operator's fault; a retry without a change is useless."""

    fault: ClassVar[Fault] = "config"


class JournalLocked(JournalError):
    """Another daemon holds the journal. ``pid`` is 0 when it did not say which."""

    def __init__(self, path: Path, pid: int) -> None:
        self.path, self.pid = path, pid
        holder = f"process {pid}" if pid else "another process"
        super().__init__(f"{path} is in use by {holder}: one daemon per state directory. Fix: stop that one first")


class JournalLost(WeightsyncError):
    """A commit failed and its outcome is unknown. The disk's fault; the process must end, the next one rereads."""

    fault: ClassVar[Fault] = "config"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One entry. ``sequence`` grows by appending and is never reused; ``body`` is JSON.

    ``intact``: its checksum is right, so that it is what was written.
    """

    sequence: int
    unix_time: float
    kind: str
    body: bytes
    intact: bool = True


class Journal:
    """An open journal. Blocking, and not for two threads at once; ``journal_thread.AsyncJournal`` is for an event loop.

    ``journal_id``: 128 random bits in hex, drawn when the journal was created.
    """

    def __init__(
        self, path: Path, connection: sqlite3.Connection, lock: int | None, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock
        self._clock = clock
        self._lost: str | None = None
        self.journal_id = self._meta("journal_id")

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> "Journal":
        """The journal at ``path``, created with its directory when absent, held exclusively until ``close``.

        Raises:
            JournalLocked: another daemon holds it.
            JournalError: no journal, damaged, of a newer schema, or the directory cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _lock(path)
        except OSError as error:
            raise JournalError(f"{path.parent} cannot hold the journal: {error.strerror or error}") from error
        try:
            # The file before SQLite opens it, because SQLite would give it the umask's permissions.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            # Transactions are ours to begin (isolation_level), and AsyncJournal uses it on a thread of its own.
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                _prepare(path, connection)
                return cls(path, connection, lock, clock)
            except BaseException:
                connection.close()
                raise
        except (*_FAILURES, OSError) as error:
            os.close(lock)
            raise JournalError(f"{path} is no usable journal: {error}") from error
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def read_only(cls, path: Path) -> "Journal":
        """The journal at ``path`` for reading, also while a daemon holds it.

        Raises:
            JournalError: absent, no journal, damaged or of a newer schema.
        """
        if not path.is_file():
            raise JournalError(f"there is no journal at {path}")
        # A directory that we may not write to admits no shared-memory file; without a log the file alone is all.
        modes = ("mode=ro", "mode=ro&immutable=1") if not path.with_name(path.name + "-wal").exists() else ("mode=ro",)
        failure: Exception | None = None
        for mode in modes:
            try:
                connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)
                try:
                    _check_schema(path, connection)
                    return cls(path, connection, None)
                except BaseException:
                    connection.close()
                    raise
            except _FAILURES as error:
                failure = error
        raise JournalError(f"{path} is no readable journal: {failure}") from failure

    def append(self, entries: Sequence[tuple[str, bytes]]) -> list[int]:
        """Makes all entries ``(kind, body)`` durable in one commit, all or none, and returns their sequences.

        Raises:
            ValueError: a body is no UTF-8 or exceeds MAX_ENTRY_BYTES; nothing was written.
            JournalLost: the outcome is unknown; end the process.
        """
        rows = []
        for kind, body in entries:
            if len(body) > MAX_ENTRY_BYTES:
                raise ValueError(f"an entry of {len(body)} bytes exceeds the limit of {MAX_ENTRY_BYTES}")
            now = self._clock()
            rows.append((now, kind, body.decode("utf-8"), _checksum(now, kind.encode(), body)))
        with self._commit("append") as connection:
            insert = "INSERT INTO entries (unix_time, kind, body, checksum) VALUES (?, ?, ?, ?) RETURNING sequence"
            return [int(connection.execute(insert, row).fetchone()[0]) for row in rows]

    def entries(self, kinds: Iterable[str] | None = None, newest: int | None = None) -> Iterator[Entry]:
        """Entries in ascending order: of ``kinds`` only, and only the ``newest`` so many.

        Raises:
            JournalLost: the disk cannot be read.
            JournalError: what is on it makes no sense.
        """
        wanted = None if kinds is None else list(kinds)
        where = "" if wanted is None else f"WHERE kind IN ({', '.join('?' * len(wanted))})"
        # Backwards from the end, so that the newest few cost nothing of the rest; then turned round again.
        latest = f"SELECT {_COLUMNS} FROM entries {where} ORDER BY sequence DESC LIMIT ?"
        query = f"SELECT * FROM ({latest}) ORDER BY sequence"
        return self._read(query, (*(wanted or ()), -1 if newest is None else newest))

    def since(self, kind: str) -> Iterator[Entry]:
        """Entries in ascending order, from the newest one of ``kind`` on; all where there is none.

        What a daemon does to the journal meanwhile is not seen. Raises JournalLost as ``entries``.
        """
        newest = "SELECT max(sequence) FROM entries WHERE kind = ?"
        query = f"SELECT {_COLUMNS} FROM entries WHERE sequence >= coalesce(({newest}), 0) ORDER BY sequence"
        return self._read(query, (kind,))

    def after(self, sequence: int) -> Iterator[Entry]:
        """Entries in ascending order, later than ``sequence``. Raises JournalLost as ``entries``."""
        return self._read(f"SELECT {_COLUMNS} FROM entries WHERE sequence > ? ORDER BY sequence", (sequence,))

    def nth_newest(self, kind: str, n: int) -> int:
        """Sequence of the ``n``-th newest entry of ``kind``, 0 where there are fewer. Raises JournalLost."""
        query = "SELECT sequence FROM entries WHERE kind = ? ORDER BY sequence DESC LIMIT 1 OFFSET ?"
        try:
            row = self._usable().execute(query, (kind, n - 1)).fetchone()
        except sqlite3.Error as error:
            raise self._lose("read", error) from error
        return int(row[0]) if row is not None else 0

    def drop(self, kind: str, before: int, at_most: int) -> int:
        """Drops the oldest entries of ``kind`` that are older than sequence ``before``; returns how many.

        Raises JournalLost as ``append``.
        """
        oldest = "SELECT sequence FROM entries WHERE kind = ? AND sequence < ? ORDER BY sequence LIMIT ?"
        with self._commit("drop") as connection:
            delete = f"DELETE FROM entries WHERE sequence IN ({oldest})"
            return connection.execute(delete, (kind, before, at_most)).rowcount

    def shrink(self, pages: int) -> bool:
        """Gives so many ``pages`` of 4 KiB that hold nothing any more back to the disk; whether there are others.

        Raises JournalLost as ``append``.
        """
        try:
            connection = self._usable()
            before = _free_pages(connection)
            connection.execute(f"PRAGMA incremental_vacuum({int(pages)})").fetchall()
            if _size(self.path.with_name(self.path.name + "-wal")) > LOG_BYTES:
                # PASSIVE waits for no reader; what it could not carry over comes with the next time.
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            return 0 < _free_pages(connection) < before
        except (sqlite3.Error, OSError) as error:
            raise self._lose("shrink", error) from error

    def close(self) -> None:
        """Releases file and lock. Safe to call twice."""
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, query: str, arguments: tuple[str | int, ...]) -> Iterator[Entry]:
        try:
            for row in self._usable().execute(query, arguments):
                yield _entry(*row)
        except sqlite3.OperationalError as error:
            raise self._lose("read", error) from error
        except _FAILURES as error:
            raise JournalError(f"{self.path} is damaged: {error}. Fix: {_RESTORE}") from error

    def _usable(self) -> sqlite3.Connection:
        if self._lost is not None:
            raise JournalLost(self._lost)
        return self._connection

    def _lose(self, doing: str, error: Exception) -> JournalLost:
        self._lost = f"{self.path}: {doing} failed ({error}); its outcome is unknown until the journal is read anew"
        return JournalLost(self._lost)

    @contextlib.contextmanager
    def _commit(self, doing: str) -> Iterator[sqlite3.Connection]:
        connection = self._usable()
        try:
            # IMMEDIATE: a lock that cannot be had fails here, before anything was written.
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except (*_FAILURES, OSError) as error:
            raise self._lose(doing, error) from error
        except BaseException:
            # Not the disk's doing (a bad entry, a cancelled caller): nothing was committed, and that is known.
            connection.execute("ROLLBACK")
            raise

    def _meta(self, name: str) -> str:
        try:
            row = self._usable().execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        except _FAILURES as error:
            raise self._lose(f"reading {name}", error) from error
        if row is None:
            raise JournalError(f"{self.path} is no journal: it names no {name}")
        return str(row[0])


def _checksum(unix_time: float, kind: bytes, body: bytes) -> int:
    return zlib.crc32(b"%s %s " % (kind, struct.pack("<d", unix_time)) + body)


def _entry(sequence: int, unix_time: object, kind: object, body: object, checksum: object) -> Entry:
    """An entry as the file has it, where damage may have made anything of a column."""
    moment = unix_time if isinstance(unix_time, float) else 0.0
    name, text = (value if isinstance(value, bytes) else b"" for value in (kind, body))
    return Entry(sequence, moment, name.decode(errors="replace"), text, _checksum(moment, name, text) == checksum)


def _lock(path: Path) -> int:
    """An exclusive lock beside ``path``; the kernel releases it when the process dies, however that happens."""
    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        text = os.pread(descriptor, 32, 0).strip()
        os.close(descriptor)
        raise JournalLocked(path, int(text) if text.isdigit() else 0) from error
    except BaseException:
        os.close(descriptor)
        raise
    # Only now: until the lock is ours the number in the file is another daemon's.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    # Readers beside the daemon (the command line) may hold the file for a moment.
    connection.execute("PRAGMA busy_timeout = 2000")
    # Of a new file only, and before anything else is in it: what entries leave behind can be given back piece by piece.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    # The mode is part of the file and may be refused; ``synchronous`` is this connection's, FULL an fsync per commit.
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {FULL_LOG_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
    if mode != "wal":
        raise JournalError(f"{path}: the file system does not allow SQLite's WAL mode. Fix: use a local disk")
    if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
        _create(connection)
        # The file's own fsync does not make its name durable.
        _sync_directory(path.parent)
    _check_schema(path, connection)
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise JournalError(f"{path} is damaged: {found}. Fix: {_RESTORE}")


def _create(connection: sqlite3.Connection) -> None:
    # Tables and identity in one transaction: a journal is whole or empty, and an empty one is made anew.
    connection.executescript(f"BEGIN IMMEDIATE;{_TABLES}")
    rows = [("journal_id", secrets.token_hex(16)), ("schema", str(JOURNAL_SCHEMA))]
    connection.executemany("INSERT INTO meta (name, value) VALUES (?, ?)", rows)
    connection.execute("COMMIT")


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    row = connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
    schema = int(row[0]) if row is not None and str(row[0]).isdecimal() else 0
    if schema == 0:
        raise JournalError(f"{path} is no journal of this program")
    if schema != JOURNAL_SCHEMA:
        fix = "run the daemon of that release, or start with a new state directory"
        raise JournalError(f"{path} has schema {schema}, this daemon knows {JOURNAL_SCHEMA}. Fix: {fix}")


def _free_pages(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA freelist_count").fetchone()[0])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
