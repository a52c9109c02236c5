"""What the journal holds, and the pure fold that a restarted daemon begins with."""

from dataclasses import dataclass, field
from typing import Final

import msgspec
from weightsync.orchestrator.core.errors import JournalUnreadable
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import RoundName, Version


class Record(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base; the tag is the entry's kind."""


class EpochBegan(Record, frozen=True, kw_only=True):
    epoch: int


class RoundBegan(Record, frozen=True, kw_only=True):
    """Engines will be paused from here on; whoever finds this round open must resume or repair them."""

    round: RoundName
    version: Version
    attempt: int
    engines: tuple[str, ...]


class LiveDirty(Record, frozen=True, kw_only=True):
    """Grants may be given from here on: live memory of the round's engines may be torn."""

    round: RoundName
    writers: dict[str, int]
    """Trainer ranks that are granted → their incarnation."""
    ranks: dict[str, int] = {}
    """Inference ranks that they may write to → theirs."""


class Decided(Record, frozen=True, kw_only=True):
    """Every byte was verified in live memory; from here only forward. ``digests``: member → hex of its live digest."""

    round: RoundName
    version: Version
    digests: dict[str, str]


class RoundEnded(Record, frozen=True, kw_only=True):
    """The canonical line of a round, as history keeps it. Times in seconds, on the daemon's monotonic clock.

    ``fault`` says which side ``reason`` is the fault of; empty for a round that did not fail.
    """

    round: RoundName
    version: Version
    attempt: int
    engines: tuple[str, ...]
    evicted: tuple[str, ...]
    outcome: str
    reason: str
    fault: Fault = ""
    bytes: int
    descriptors: int
    times: dict[str, float]


class Committed(Record, frozen=True, kw_only=True):
    """``version`` is the fleet's. ``sequence`` is the order of versions."""

    round: RoundName
    version: Version
    sequence: int


class VersionFailed(Record, frozen=True, kw_only=True):
    version: Version
    reason: str


AnyRecord = EpochBegan | RoundBegan | LiveDirty | Decided | RoundEnded | Committed | VersionFailed

_decoder: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)


def encode_record(record: Record) -> bytes:
    """A record as JSON."""
    return msgspec.json.encode(record)


def decode_record(body: bytes) -> AnyRecord:
    """The record in a journal entry.

    Raises:
        JournalUnreadable: it is none.
    """
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise JournalUnreadable(f"journal entry cannot be read ({error}): {body[:200]!r}") from error


@dataclass(slots=True)
class OpenRound:
    """What the journal saw of a round after its beginning."""

    began: RoundBegan
    dirty: bool = False
    decided: bool = False
    writers: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)


REMEMBERED_ROUNDS: Final = 64
"""Ended rounds whose end is kept for workers that come back from inside one; each engine can be inside one only."""


@dataclass(slots=True)
class Memory:
    """The fold of all records. ``ended``: the newest rounds that are over, oldest first. ``held``: by member, the
    version that was last decided in its memory, and its digest."""

    epoch: int = 0
    round_number: int = 0
    sequence: int = 0
    committed: Version | None = None
    failed: dict[Version, str] = field(default_factory=dict)
    done: set[Version] = field(default_factory=set)
    open_rounds: dict[RoundName, OpenRound] = field(default_factory=dict)
    ended: dict[RoundName, OpenRound] = field(default_factory=dict)
    held: dict[str, tuple[Version, str]] = field(default_factory=dict)


def replay(memory: Memory, record: Record) -> None:
    """Fold one record into ``memory``."""
    match record:
        case EpochBegan(epoch=epoch):
            memory.epoch = max(memory.epoch, epoch)
        case RoundBegan(round=name) as began:
            memory.round_number = max(memory.round_number, name.number)
            memory.open_rounds[name] = OpenRound(began)
        case LiveDirty(round=name, writers=writers, ranks=ranks):
            opened = memory.open_rounds[name]
            opened.dirty = True
            opened.writers = writers
            opened.ranks = ranks
        case Decided(round=name, version=version, digests=digests):
            memory.open_rounds[name].decided = True
            memory.held |= {member: (version, digest) for member, digest in digests.items()}
        case RoundEnded(round=name):
            _end(memory, name)
        case Committed(version=version, sequence=sequence):
            memory.committed = version
            memory.sequence = sequence
            memory.done.add(version)
        case VersionFailed(version=version, reason=reason):
            memory.failed[version] = reason


def _end(memory: Memory, name: RoundName) -> None:
    ended = memory.open_rounds.pop(name, None)
    if ended is not None:
        memory.ended[name] = ended
    while len(memory.ended) > REMEMBERED_ROUNDS:
        del memory.ended[next(iter(memory.ended))]
