"""The pure fold of the journal's records, which a restarted daemon begins with; what it remembers is bounded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, TypeVar

import msgspec
from weightsync.orchestrator.core.errors import JournalUnreadable, RecordUnwritable
from weightsync.orchestrator.core.records import (
    Committed,
    Decided,
    EngineAdmitted,
    EngineDrained,
    EngineForgotten,
    EngineHeld,
    EngineLeft,
    EpochBegan,
    GrantOver,
    LiveDirty,
    Maintenance,
    MemorySaved,
    Record,
    RoundBegan,
    RoundEnded,
    StagedAgain,
    Taint,
    TrainerBegan,
    VersionFailed,
)
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.names import RoundName, Version

K = TypeVar("K")
V = TypeVar("V")


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

HELD_VERSIONS: Final = 2
"""Of each member: what it serves, and what it may have in its standby, the next version or the one before."""

REMEMBERED_WISHES: Final = 4096
"""Engines that the operator holds, drains or has forgotten, of each as many: names of those that come by themselves
never end."""

REMEMBERED_MEMBERS: Final = 65_536
"""Inference ranks whose last digests are known; engines that come and go have ever new names."""


@dataclass(slots=True)
class Memory:
    """The fold of all records.

    ``ended``: the newest rounds that are over, oldest first. ``held``: by member, the versions that were last decided
    in its memory, newest first, each with its digest. ``unclosed``: grants that outlived their round. ``live``: engines
    of the last commit. ``holds``, ``drains``: engines that the operator holds or drains, and why. ``maintenance``: why
    no round begins. ``admitted``: engines that have made themselves members, in the order in which they came.
    ``forgotten_engines``: those that are no members although the configuration names them or they were admitted, and
    why.
    """

    epoch: int = 0
    round_number: int = 0
    sequence: int = 0
    committed: Version | None = None
    failed: dict[Version, str] = field(default_factory=dict)
    restaged: dict[Version, int] = field(default_factory=dict)
    """How often a version was staged again after it had FAILED; those that never were are not in it."""
    done: dict[Version, int] = field(default_factory=dict)
    """Versions that were committed, the newest last, each with the sequence number of its last commit."""
    forgotten: dict[int, int] = field(default_factory=dict)
    """Generation → the highest step whose version is no longer in ``done`` or ``failed``."""
    open_rounds: dict[RoundName, OpenRound] = field(default_factory=dict)
    ended: dict[RoundName, OpenRound] = field(default_factory=dict)
    held: dict[str, tuple[tuple[Version, str], ...]] = field(default_factory=dict)
    unclosed: dict[tuple[str, RoundName], Taint] = field(default_factory=dict)
    live: frozenset[str] = frozenset()
    generations: dict[int, None] = field(default_factory=dict)
    """Of trainers that were taken in, the newest last."""
    holds: dict[str, str] = field(default_factory=dict)
    drains: dict[str, str] = field(default_factory=dict)
    admitted: dict[str, Applicant] = field(default_factory=dict)
    forgotten_engines: dict[str, str] = field(default_factory=dict)
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
                before = (each for each in memory.held.get(member, ()) if each[0] != version)
                kept = ((version, digest), *before)[:HELD_VERSIONS]
                keep_newest(memory.held, member, kept, REMEMBERED_MEMBERS)
        case RoundEnded(round=name) as ended:
            _end(memory, ended)
        case GrantOver(round=name, writer=writer):
            memory.unclosed.pop((writer, name), None)
        case EngineHeld(engine=engine, held=held, reason=reason):
            memory.holds.pop(engine, None)
            if held:
                keep_newest(memory.holds, engine, reason, REMEMBERED_WISHES)
        case EngineDrained(engine=engine, drained=drained, reason=reason):
            memory.drains.pop(engine, None)
            if drained:
                keep_newest(memory.drains, engine, reason, REMEMBERED_WISHES)
        case EngineForgotten(engine=engine, forgotten=forgotten, reason=reason):
            memory.forgotten_engines.pop(engine, None)
            if forgotten:
                _forget_engine(memory, engine, reason)
        case EngineAdmitted(engine=applicant):
            memory.admitted[applicant.name] = applicant
        case EngineLeft(engine=engine):
            memory.admitted.pop(engine, None)
            memory.live -= {engine}
        case Maintenance(on=on, reason=reason):
            memory.maintenance = reason if on else None
        case Committed(version=version, sequence=sequence):
            if version != memory.committed:
                memory.live = frozenset()  # those of its round follow with the round's end
            memory.committed = version
            memory.sequence = sequence
            _forget(memory, memory.done, keep_newest(memory.done, version, sequence, REMEMBERED_VERSIONS))
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


def _forget_engine(memory: Memory, engine: str, reason: str) -> None:
    for oldest in keep_newest(memory.forgotten_engines, engine, reason, REMEMBERED_WISHES):
        memory.admitted.pop(oldest, None)
    for wishes in (memory.holds, memory.drains):
        wishes.pop(engine, None)
    memory.live -= {engine}


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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise JournalUnreadable(f"a snapshot in the journal cannot be read ({error})") from error
    for each in fields(Memory):
        setattr(memory, each.name, getattr(read, each.name))
