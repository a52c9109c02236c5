"""What the daemon writes into its audit log by itself: each version that is committed, with its digests, and strangers.

Lines wait in a queue for the disk: nothing that is decided waits for them, since the journal holds it already. What
could not be written is told in the daemon's own log.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

import structlog
from weightsync.orchestrator.core.records import Committed, Decided, Record
from weightsync.orchestrator.daemon.admin.audit import Audit, AuditLine
from weightsync.orchestrator.daemon.admin.history import one_digest
from weightsync.orchestrator.protocol.names import RoundName
from weightsync.orchestrator.protocol.text import clean

log = structlog.get_logger(__name__)

MAX_WAITING: Final = 1024
"""Lines for a disk that is slow: days of commits, or hours of refusals, which are limited before."""

MAX_DECIDED: Final = 16
"""Rounds whose digests are kept until they are committed; of one that never is the core makes another."""

MAX_SHOWN: Final = 64
"""Members whose digests are written out; the hash is over all."""

MAX_CHARS: Final = 1000
"""Of what is said of a refusal."""


class Trail:
    """Belongs to the daemon's loop; ``run`` writes until it is cancelled, and then what waits."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._waiting: asyncio.Queue[AuditLine] = asyncio.Queue(MAX_WAITING)
        self._decided: dict[RoundName, Mapping[str, str]] = {}

    def durable(self, record: Record) -> None:
        """A record that the journal holds from now on."""
        match record:
            case Decided():
                self.decided(record.round, record.digests)
            case Committed():
                self._committed(record)
            case _:
                pass

    def decided(self, name: RoundName, digests: Mapping[str, str]) -> None:
        """The digests of a round that may be committed next: member → hexadecimal digits."""
        self._decided[name] = digests
        while len(self._decided) > MAX_DECIDED:
            del self._decided[next(iter(self._decided))]

    def refused(self, kind: str, fields: Mapping[str, object]) -> None:
        """Somebody was turned away, for a reason of this kind."""
        said = ", ".join(f"{name}: {value}" for name, value in fields.items() if name != "remote")
        self._write("refused", str(fields.get("remote", "")), kind, said, "turned away")

    def _committed(self, record: Committed) -> None:
        why = f"round {record.round}, sequence {record.sequence}"
        self._write("commit", "", str(record.version), why, _digests(self._decided.pop(record.round, {})))

    def _write(self, verb: str, address: str, target: str, reason: str, result: str) -> None:
        line = AuditLine(
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), who="the daemon", address=clean(address, 100),
            credential="", verb=verb, target=clean(target, 200), reason=clean(reason, MAX_CHARS), result=result,
        )  # fmt: skip
        try:
            self._waiting.put_nowait(line)
        except asyncio.QueueFull:
            log.error("the audit log's disk is too slow: a line is lost", verb=verb, target=line.target)

    async def run(self) -> None:
        """Write what comes, in its order."""
        try:
            while True:
                await self._append(await self._waiting.get())
        finally:
            while not self._waiting.empty():
                self._durable(self._waiting.get_nowait())

    async def _append(self, line: AuditLine) -> None:
        writing = asyncio.ensure_future(asyncio.to_thread(self._durable, line))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing  # in its thread it goes on; the lines behind it come after it
            raise

    def _durable(self, line: AuditLine) -> None:
        try:
            head = self._audit.append(line)
        except OSError as error:
            log.error("the audit log cannot be written", verb=line.verb, target=line.target, reason=str(error))
        else:
            log.info("audited", verb=line.verb, target=line.target, audit_hash=head)


def _digests(digests: Mapping[str, str]) -> str:
    """All of them in one hash, and the first ones by name."""
    if not digests:
        return "digests: as the journal has them, decided before this daemon began"
    lines = [f"{member}={digest}" for member, digest in sorted(digests.items())]
    more = f" … {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
    return f"digests: {one_digest(digests)} of {len(lines)}: {' '.join(lines[:MAX_SHOWN])}{more}"
