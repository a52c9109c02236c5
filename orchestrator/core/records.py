"""What the journal holds: each kind of entry, and how it is written and read."""

from typing import Final, Literal

import msgspec
from weightsync.orchestrator.core.errors import JournalUnreadable, RecordUnwritable
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.fields import Count, Spoken
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.limits import MAX_COUNT, MAX_SECONDS
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.protocol.text import clean

RoundKind = Literal["publish", "catch-up", "rollback"]
"""What a round is for: a version that a trainer has published, late engines, or a version that was served before."""


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
    engine: str = ""
    """Of a writer that is an engine's rank."""


class LiveDirty(Record, frozen=True, kw_only=True):
    """Grants may be given from here on: memory of the round's engines that writers reach may hold parts of versions."""

    round: RoundName
    writers: dict[str, Taint]
    """Trainer ranks that are granted."""


class Decided(Record, frozen=True, kw_only=True):
    """Every byte was verified where it is or will be served from; from here only forward. ``digests``: member → hex."""

    round: RoundName
    version: Version
    digests: dict[str, str]


class SlowEdge(msgspec.Struct, frozen=True):
    """An edge that moved less than half of what its link can, and by which transport; both in 10^9 bytes per second."""

    edge: str
    by: str
    gb_per_s: float
    link_gb_per_s: float


class LinkUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a round moved by one kind of link: over how many edges, the longest of which took ``seconds``; ``ways``: by
    which transports. ``slow``: the slowest of ``slow_edges`` that were slower than the link."""

    edges: int
    bytes: int
    seconds: float
    ways: tuple[str, ...] = ()
    slow: tuple[SlowEdge, ...] = ()
    slow_edges: int = 0


class RoundEnded(Record, frozen=True, kw_only=True):
    """The canonical line of a round, as history keeps it. Times in seconds, on the daemon's monotonic clock.

    ``fault`` says which side ``reason`` is the fault of; empty for a round that did not fail, whose ``reason`` is why
    engines were left out of it. ``unclosed``: writers that had not said CLOSED to everybody when it ended. ``modes``:
    how each engine lands; ``stall_seconds``: of each that served on, how long it took no step. ``links``:
    what moved, by kind of link. ``lenders``: engine → the engine that wrote to it in the place of the trainer.
    ``trainer_bytes``: of ``bytes``, what left the trainer.
    ``trace``: context of the publish that it was for.
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
    kind: RoundKind = "publish"
    modes: dict[str, Lands] = msgspec.field(default_factory=dict)
    stall_seconds: dict[str, float] = msgspec.field(default_factory=dict)
    lenders: dict[str, str] = msgspec.field(default_factory=dict)
    links: dict[str, LinkUse] = msgspec.field(default_factory=dict)
    trainer_bytes: int = 0
    trace: str = ""
    spoken = ("reason",)

    def __post_init__(self) -> None:
        # Sums of what agents reported: a wrong one must not keep the row, by which the round is over, from being kept.
        super().__post_init__()
        for field in ("bytes", "trainer_bytes", "descriptors"):
            msgspec.structs.force_setattr(self, field, min(getattr(self, field), MAX_COUNT))
        for field in ("times", "stall_seconds"):
            told = getattr(self, field).items()
            kept = {name: seconds if abs(seconds) <= MAX_SECONDS else 0.0 for name, seconds in told}
            msgspec.structs.force_setattr(self, field, kept)


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


class EngineDrained(Record, frozen=True, kw_only=True):
    """The operator's wish: the engine is to be in no round (``drained``), or may again."""

    engine: str
    drained: bool
    reason: str
    spoken = ("reason",)


class EngineForgotten(Record, frozen=True, kw_only=True):
    """The engine is no member although the configuration names it or it was admitted (``forgotten``), or is again."""

    engine: str
    forgotten: bool
    reason: str
    spoken = ("reason",)


class EngineAdmitted(Record, frozen=True, kw_only=True):
    """An engine that the configuration does not name has made itself a member, or is another than it was."""

    engine: Applicant


class EngineLeft(Record, frozen=True, kw_only=True):
    """An engine that had made itself a member is none any more, until it comes again."""

    engine: str
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
    | EngineDrained
    | EngineForgotten
    | EngineAdmitted
    | EngineLeft
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
