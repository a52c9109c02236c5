"""What the journal holds, and the pure fold that a restarted daemon begins with."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, TypeVar

import msgspec
from weightsync.orchestrator.core.errors import JournalUnreadable, RecordUnwritable
from weightsync.orchestrator.protocol.fields import Count, Spoken
from weightsync.orchestrator.protocol.limits import MAX_COUNT, MAX_SECONDS
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.protocol.text import clean

K = TypeVar("K")
V = TypeVar("V")


class Record(Spoken, frozen=True, tag=True, kw_only=True):
    """Base; the tag is the entry's kind."""


class EpochBegan(Record, frozen=True, kw_only=True):
    epoch: Count


class RoundBegan(Record, frozen=True, kw_only=True):
    """Engines will be paused from here on; whoever finds this round open must resume or repair them."""

    round: RoundName
    version: Version
    attempt: Count
    engines: tuple[str, ...]


class Taint(msgspec.Struct, frozen=True):
    """A writer's process that may still write, and the inference ranks that it can reach → their incarnations.

    A newer process on the same ``host`` and ``boot`` proves this one dead; nothing else that we hear does.
    """

    incarnation: int
    host: str
    boot: str
    targets: dict[str, int]


class LiveDirty(Record, frozen=True, kw_only=True):
    """Grants may be given from here on: live memory of the round's engines may be torn."""

    round: RoundName
    writers: dict[str, Taint]
    """Trainer ranks that are granted."""


class Decided(Record, frozen=True, kw_only=True):
    """Every byte was verified in live memory; from here only forward. ``digests``: member → hex of its live digest."""

    round: RoundName
    version: Version
    digests: dict[str, str]


class RoundEnded(Record, frozen=True, kw_only=True):
    """The canonical line of a round, as history keeps it. Times in seconds, on the daemon's monotonic clock.

    ``fault`` says which side ``reason`` is the fault of; empty for a round that did not fail. ``unclosed``: writers
    that had not said CLOSED to everybody when it ended.
    """

    round: RoundName
    version: Version
    attempt: Count
    engines: tuple[str, ...]
    left_out: tuple[str, ...]
    outcome: str
    reason: str
    fault: Fault = ""
    bytes: int
    descriptors: int
    times: dict[str, float]
    unclosed: dict[str, Taint] = msgspec.field(default_factory=dict)
    spoken = ("reason",)

    def __post_init__(self) -> None:
        # Sums of what agents reported: a wrong one must not keep the row, by which the round is over, from being kept.
        super().__post_init__()
        msgspec.structs.force_setattr(self, "bytes", min(self.bytes, MAX_COUNT))
        msgspec.structs.force_setattr(self, "descriptors", min(self.descriptors, MAX_COUNT))
        times = {name: seconds if abs(seconds) <= MAX_SECONDS else 0.0 for name, seconds in self.times.items()}
        msgspec.structs.force_setattr(self, "times", times)


class GrantOver(Record, frozen=True, kw_only=True):
    """A grant that outlived its round is over: its writer has said CLOSED, or is dead as ``reason`` says."""

    round: RoundName
    writer: str
    reason: str
    spoken = ("reason",)


class EngineHeld(Record, frozen=True, kw_only=True):
    """The operator's wish: the engine is not to serve (``held``), or may again."""

    engine: str
    held: bool
    reason: str
    spoken = ("reason",)


class Maintenance(Record, frozen=True, kw_only=True):
    """The operator's wish: no round begins (``on``), or they may again."""

    on: bool
    reason: str
    spoken = ("reason",)


class Committed(Record, frozen=True, kw_only=True):
    """``version`` is the fleet's. ``sequence`` is the order of versions."""

    round: RoundName
    version: Version
    sequence: Count


class VersionFailed(Record, frozen=True, kw_only=True):
    version: Version
    reason: str
    spoken = ("reason",)


class TrainerBegan(Record, frozen=True, kw_only=True):
    """A trainer of another start than before was taken in: earlier ones have been replaced, for good."""

    generation: int


class StagedAgain(Record, frozen=True, kw_only=True):
    """A trainer staged ``version``, which had FAILED, once more; it did so ``restaged`` times by now."""

    version: Version
    restaged: Count


class MemorySaved(Record, frozen=True, kw_only=True):
    """The fold of everything before it: whoever reads the journal begins at the newest one.

    ``memory``: a Memory in msgpack, because keys in JSON are text only.
    """

    memory: bytes


AnyRecord = (
    EpochBegan
    | RoundBegan
    | LiveDirty
    | Decided
    | RoundEnded
    | GrantOver
    | EngineHeld
    | Maintenance
    | Committed
    | VersionFailed
    | TrainerBegan
    | StagedAgain
    | MemorySaved
)

_decoder: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)


UNREADABLE: Final = "unreadable"
"""In the place of ``RoundEnded.outcome`` where that cannot be read."""


class _Over(msgspec.Struct, tag=RoundEnded.__name__):
    """Of a RoundEnded, what the fold asks for; the rest is for people."""

    round: RoundName
    engines: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    outcome: str = UNREADABLE
    unclosed: dict[str, Taint] = msgspec.field(default_factory=dict)


_over: msgspec.json.Decoder[_Over] = msgspec.json.Decoder(_Over)


def encode_record(record: Record) -> bytes:
    """A record as JSON, tried out: what could not be read back is never written.

    Raises:
        RecordUnwritable: it would not be read back as it is.
    """
    try:
        body = msgspec.json.encode(record)
        read = _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, TypeError) as error:
        raise RecordUnwritable(f"{type(record).__name__} is not written, it could not be read back: {error}") from error
    if read != record:
        raise RecordUnwritable(f"{type(record).__name__} is not written, it would be read back as another: {read}")
    return body


def decode_record(body: bytes, intact: bool = True) -> AnyRecord:
    """The record in a journal entry. A RoundEnded of which only the particulars cannot be read is one without them.

    Args:
        body: JSON.
        intact: whether the entry's checksum is right.

    Raises:
        JournalUnreadable: it is none, or not what was written.
    """
    try:
        if not intact:
            raise JournalUnreadable(_unreadable(body, "it is damaged: its checksum is wrong"))
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        try:
            return _without_particulars(_over.decode(body), str(error))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise JournalUnreadable(_unreadable(body, str(error))) from error


def decode_row(body: bytes, intact: bool = True) -> AnyRecord:
    """As ``decode_record``, of an entry that is only shown: one that is none is a RoundEnded that says so."""
    try:
        return decode_record(body, intact)
    except JournalUnreadable as error:
        return _without_particulars(_Over(RoundName(0, 0)), str(error))


def _unreadable(body: bytes, why: str) -> str:
    fix = "restore the state directory, or start with a new one: the engines then catch up"  # as daemon.journal says
    return f"an entry of the journal cannot be read ({clean(why, 500)}): {body[:200]!r}. Fix: {fix}"


def _without_particulars(over: _Over, why: str) -> RoundEnded:
    return RoundEnded(
        round=over.round, version=Version(0, 0), attempt=0, engines=over.engines, left_out=over.left_out,
        outcome=over.outcome, reason=f"this row of the journal cannot be read: {why}", fault="config", bytes=0,
        descriptors=0, times={}, unclosed=over.unclosed,
    )  # fmt: skip


@dataclass(slots=True)
class OpenRound:
    """What the journal saw of a round after its beginning."""

    began: RoundBegan
    dirty: bool = False
    decided: bool = False
    writers: dict[str, Taint] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """By member, of those that the decision is about."""


REMEMBERED_ROUNDS: Final = 64
"""Ended rounds whose end is kept for workers that come back from inside one; each engine can be inside one only."""

REMEMBERED_VERSIONS: Final = 10_000
"""Committed versions that are known by name: asked for are those that a trainer has staged or whose marker is missing.
Of older ones it is known how far their trainer had come."""

REMEMBERED_FAILURES: Final = 1000
"""FAILED versions, each with a reason of up to 4000 characters."""

REMEMBERED_GENERATIONS: Final = 1000
"""Trainers whose oldest versions are no longer known by name."""

REMEMBERED_MEMBERS: Final = 65_536
"""Inference ranks whose last digest is known; engines that come and go have ever new names."""


@dataclass(slots=True)
class Memory:
    """The fold of all records.

    ``ended``: the newest rounds that are over, oldest first. ``held``: by member, the version that was last decided in
    its memory, and its digest. ``unclosed``: grants that outlived their round. ``live``: engines of the last commit.
    ``holds``: engines that the operator holds, and why. ``maintenance``: why no round begins.
    """

    epoch: int = 0
    round_number: int = 0
    sequence: int = 0
    committed: Version | None = None
    failed: dict[Version, str] = field(default_factory=dict)
    restaged: dict[Version, int] = field(default_factory=dict)
    """How often a version was staged again after it had FAILED; those that never were are not in it."""
    done: dict[Version, None] = field(default_factory=dict)
    """Versions that were committed, the newest last."""
    forgotten: dict[int, int] = field(default_factory=dict)
    """Generation → the highest step whose version is no longer in ``done`` or ``failed``."""
    open_rounds: dict[RoundName, OpenRound] = field(default_factory=dict)
    ended: dict[RoundName, OpenRound] = field(default_factory=dict)
    held: dict[str, tuple[Version, str]] = field(default_factory=dict)
    unclosed: dict[tuple[str, RoundName], Taint] = field(default_factory=dict)
    live: frozenset[str] = frozenset()
    generations: dict[int, None] = field(default_factory=dict)
    """Of trainers that were taken in, the newest last."""
    holds: dict[str, str] = field(default_factory=dict)
    maintenance: str | None = None

    def was_replaced(self, generation: int) -> bool:
        """It is of a trainer that another one has followed."""
        return generation in self.generations and generation != next(reversed(self.generations))

    def settled(self, version: Version) -> bool:
        """It is known to be committed, or FAILED."""
        return version in self.done or version in self.failed

    def forgot(self, version: Version) -> bool:
        """It may have been settled before the oldest version of its trainer that is remembered."""
        return not self.settled(version) and version.step <= self.forgotten.get(version.generation, -1)


_packed: msgspec.msgpack.Decoder[Memory] = msgspec.msgpack.Decoder(Memory)


def keep_newest(mapping: dict[K, V], key: K, value: V, limit: int) -> list[K]:
    """Put ``value`` under ``key`` as the newest entry of ``mapping``; returns the keys that ``limit`` has no room for.

    Its order is that of the last putting, oldest first.
    """
    mapping.pop(key, None)
    mapping[key] = value
    gone = []
    while len(mapping) > limit:
        gone.append(next(iter(mapping)))
        del mapping[gone[-1]]
    return gone


def saved(memory: Memory) -> MemorySaved:
    """The record that stands for all that ``memory`` is the fold of.

    Raises:
        RecordUnwritable: it would not be read back as it is; a bug, and no reason to lose what is readable.
    """
    made = MemorySaved(memory=msgspec.msgpack.encode(memory))
    if _packed.decode(made.memory) != memory:
        raise RecordUnwritable("the snapshot of the journal's fold does not read back as it was")
    return made


def replay(memory: Memory, record: Record) -> None:
    """Fold one record into ``memory``."""
    match record:
        case EpochBegan(epoch=epoch):
            memory.epoch = max(memory.epoch, epoch)
        case RoundBegan(round=name) as began:
            memory.round_number = max(memory.round_number, name.number)
            memory.open_rounds[name] = OpenRound(began)
        case LiveDirty(round=name, writers=writers):
            opened = memory.open_rounds[name]
            opened.dirty = True
            opened.writers = writers
        case Decided(round=name, version=version, digests=digests):
            memory.open_rounds[name].decided = True
            memory.open_rounds[name].digests = digests
            for member, digest in digests.items():
                keep_newest(memory.held, member, (version, digest), REMEMBERED_MEMBERS)
        case RoundEnded(round=name) as ended:
            _end(memory, ended)
        case GrantOver(round=name, writer=writer):
            memory.unclosed.pop((writer, name), None)
        case EngineHeld(engine=engine, held=held, reason=reason):
            memory.holds.pop(engine, None)
            if held:
                memory.holds[engine] = reason
        case Maintenance(on=on, reason=reason):
            memory.maintenance = reason if on else None
        case Committed(version=version, sequence=sequence):
            if version != memory.committed:
                memory.live = frozenset()  # those of its round follow with the round's end
            memory.committed = version
            memory.sequence = sequence
            _forget(memory, memory.done, keep_newest(memory.done, version, None, REMEMBERED_VERSIONS))
        case VersionFailed(version=version, reason=reason):
            _forget(memory, memory.failed, keep_newest(memory.failed, version, reason, REMEMBERED_FAILURES))
        case TrainerBegan(generation=generation):
            keep_newest(memory.generations, generation, None, REMEMBERED_GENERATIONS)
        case StagedAgain(version=version, restaged=restaged):
            memory.failed.pop(version, None)
            keep_newest(memory.restaged, version, restaged, REMEMBERED_FAILURES)
        case MemorySaved(memory=packed):
            _restore(memory, packed)


def _end(memory: Memory, record: RoundEnded) -> None:
    memory.unclosed |= {(writer, record.round): taint for writer, taint in record.unclosed.items()}
    if record.outcome == "committed":
        memory.live |= frozenset(record.engines) - frozenset(record.left_out)
    ended = memory.open_rounds.pop(record.round, None)
    if ended is not None:
        # Kept for who was in it, and for how it ended; those that may still write are in ``unclosed``.
        ended.writers, ended.digests = {}, dict.fromkeys(ended.digests, "")
        keep_newest(memory.ended, record.round, ended, REMEMBERED_ROUNDS)
        while len(memory.ended) > 1 and sum(len(each.digests) for each in memory.ended.values()) > REMEMBERED_MEMBERS:
            del memory.ended[next(iter(memory.ended))]


def _forget(memory: Memory, kept: Mapping[Version, object], gone: list[Version]) -> None:
    """Of versions that no longer have a place in ``kept``, remember how far their trainer had come."""
    for version in gone:
        oldest = next(iter(kept))
        # One far ahead of those that came after it says nothing about them.
        if oldest.generation != version.generation or oldest.step > version.step:
            furthest = max(version.step, memory.forgotten.get(version.generation, 0))
            keep_newest(memory.forgotten, version.generation, furthest, REMEMBERED_GENERATIONS)


def _restore(memory: Memory, packed: bytes) -> None:
    try:
        read = _packed.decode(packed)
    except msgspec.MsgspecError as error:
        raise JournalUnreadable(f"a snapshot in the journal cannot be read ({error})") from error
    for each in fields(Memory):
        setattr(memory, each.name, getattr(read, each.name))
