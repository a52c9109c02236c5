"""The round under way in time: when each phase began, and when each engine and each rank had done what is waited for.

The core keeps what decisions need, which are states and no moments. The moments are taken here, from the same events;
nothing is decided by them.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from weightsync.orchestrator.core.events import AgentSaid, CallDone, Event
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.views import VersionView
from weightsync.orchestrator.protocol.messages import Closed, Exposed, Left, Quiesced, Verified
from weightsync.orchestrator.protocol.names import Member

MAX_LANES: Final = 256
"""Ranks, and writers, of one view: those that are behind come first. Some 80 bytes each, for every open page."""

MAX_RATES: Final = 16_384
"""Edges whose last transfer is told."""

KEPT_ROUNDS: Final = 2
"""Whose transfers are kept: a round that brings one late engine says nothing of the edges to the others."""

_WORDS: Final = {Quiesced: "quiesced", Exposed: "exposed", Closed: "closed", Verified: "verified", Left: "left"}


class TimeLane(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine, rank or writer. ``marks``: what it had done → seconds since the round began.

    ``bytes`` and ``seconds``: of a writer, what it moved and how long its slowest edge took. ``trouble``: why the round
    goes on without it, or why it could not go on.
    """

    name: str
    engine: str = ""
    lands: str = ""
    marks: dict[str, float]
    bytes: int = 0
    seconds: float = 0.0
    trouble: str = ""


class RoundLanes(msgspec.Struct, frozen=True, kw_only=True):
    """A round in lanes. Times in seconds since it began, which was at ``began`` in unix time.

    ``phases``: name and beginning of each so far. ``over``: it has ended, after ``elapsed``. ``more``: ranks and
    writers that are not shown.
    """

    round: str
    version: VersionView
    kind: str
    attempt: int
    began: float
    elapsed: float
    phase: str
    phases: tuple[tuple[str, float], ...]
    engines: tuple[TimeLane, ...]
    ranks: tuple[TimeLane, ...]
    writers: tuple[TimeLane, ...]
    over: bool
    decided: bool
    reason: str
    more: int


class EdgeRate(msgspec.Struct, frozen=True, array_like=True):
    """What an edge moved in the last round that used it: bytes, and seconds from the first post to the last DONE."""

    source: str
    target: str
    bytes: int
    seconds: float


@dataclass(slots=True)
class _Trail:
    round: Round
    unix_began: float
    phases: list[tuple[str, float]] = field(default_factory=list)
    engines: dict[str, dict[str, float]] = field(default_factory=dict)
    members: dict[Member, dict[str, float]] = field(default_factory=dict)
    moved: dict[Member, tuple[int, float]] = field(default_factory=dict)
    """By each writer that has closed: bytes, and seconds of its slowest edge."""
    ended: float | None = None


class Timeline:
    """Belongs to the daemon's loop. ``changes`` grows whenever a view would show something new, ``ended`` with each
    round that ends."""

    def __init__(self) -> None:
        self.changes = self.ended = 0
        self._trail: _Trail | None = None
        self._kept: deque[Round] = deque(maxlen=KEPT_ROUNDS)
        self._flows: Mapping[tuple[Member, Member], int] = {}

    def happened(self, fleet: Fleet, events: Iterable[Event], now: float) -> None:
        """``events`` have been decided ``now``, by the core's clock; ``fleet`` is what it is since then."""
        trail, current = self._trail, fleet.round
        if trail is not None and trail.ended is None:
            for event in events:
                self._mark(trail, event, now)
            if current is not trail.round:
                trail.ended = now - trail.round.began
                self._kept.append(trail.round)
                self.ended += 1
                self._flows = fleet.plan.flows if fleet.plan is not None else {}
                self.changes += 1
        if current is None:
            return
        if trail is None or trail.round is not current:
            trail = self._trail = _Trail(current, time.time() - (now - current.began))
        if not trail.phases or trail.phases[-1][0] != current.phase.value:
            trail.phases.append((current.phase.value, _ms(now - current.began)))
            self.changes += 1

    def _mark(self, trail: _Trail, event: Event, now: float) -> None:
        at = _ms(now - trail.round.began)
        if isinstance(event, CallDone) and event.engine in trail.round.engines:
            trail.engines.setdefault(event.engine, {}).setdefault(event.call.value, at)
        elif isinstance(event, AgentSaid) and getattr(event.message, "round", None) == trail.round.name:
            word = _WORDS.get(type(event.message))
            if word is None or (isinstance(event.message, Closed) and not event.message.final):
                return
            trail.members.setdefault(event.member, {}).setdefault(word, at)
            if isinstance(event.message, Closed):
                done = trail.round.closed.get(event.member, {}).values()
                slowest = max((moved.seconds for moved in done), default=0.0)
                trail.moved[event.member] = (sum(moved.bytes for moved in done), slowest)
        else:
            return
        self.changes += 1

    # --------------------------------------------------------------------------------------------------- what is shown
    def rates(self) -> tuple[EdgeRate, ...]:
        """Of each edge of the plan, its last transfer that ended well. Put together here, where nobody waits for it."""
        found: dict[tuple[Member, Member], tuple[int, float]] = {}
        for ended in self._kept:
            for writer, done in ended.closed.items():
                for peer, moved in done.items():
                    if (writer, peer) in self._flows and not moved.error:
                        found[writer, peer] = (moved.bytes, moved.seconds)
        told = itertools.islice(found.items(), MAX_RATES)
        return tuple(EdgeRate(str(a), str(b), size, seconds) for (a, b), (size, seconds) in told)

    def view(self, now: float) -> RoundLanes | None:
        """The round under way, or the last one; None before the first."""
        trail = self._trail
        if trail is None:
            return None
        it = trail.round
        elapsed = trail.ended if trail.ended is not None else now - it.began
        ranks = sorted(_ranks(trail), key=_progress)
        writers = sorted(_writers(trail), key=_progress)
        return RoundLanes(
            round=str(it.name),
            version=VersionView(step=it.version.step, generation=it.version.generation),
            kind="rollback" if it.rollback else "catch-up" if it.catch_up else "publish",
            attempt=it.attempt,
            began=trail.unix_began,
            elapsed=_ms(elapsed),
            phase=it.phase.value,
            phases=tuple(trail.phases),
            engines=tuple(_engines(trail)),
            ranks=tuple(itertools.islice(ranks, MAX_LANES)),
            writers=tuple(itertools.islice(writers, MAX_LANES)),
            over=trail.ended is not None,
            decided=it.decided,
            reason=it.reason,
            more=max(0, len(ranks) - MAX_LANES) + max(0, len(writers) - MAX_LANES),
        )


def _engines(trail: _Trail) -> Iterator[TimeLane]:
    for name, progress in trail.round.engines.items():
        marks = dict(trail.engines.get(name, {}))
        if progress.paused_at:
            marks["asked"] = _ms(progress.paused_at - trail.round.began)
        if progress.served_at:
            marks["serves"] = _ms(progress.served_at - trail.round.began)
        yield TimeLane(name=name, lands=progress.lands, marks=marks, trouble=progress.left_out)


def _ranks(trail: _Trail) -> Iterator[TimeLane]:
    for member in trail.round.ranks:
        told = trail.round.verified.get(member)
        trouble = told.error if told is not None else ""
        yield TimeLane(name=str(member), engine=member.engine, marks=trail.members.get(member, {}), trouble=trouble)


def _writers(trail: _Trail) -> Iterator[TimeLane]:
    for writer in trail.round.writers:
        size, slowest = trail.moved.get(writer, (0, 0.0))
        failed = trail.round.failed.get(writer)
        yield TimeLane(
            name=str(writer),
            marks=trail.members.get(writer, {}),
            bytes=size,
            seconds=slowest,
            trouble="" if failed is None else failed.reason,
        )


def _progress(lane: TimeLane) -> tuple[int, float]:
    """Sorts whoever is behind first."""
    return len(lane.marks), -max(lane.marks.values(), default=0.0)


def _ms(seconds: float) -> float:
    return round(seconds, 3)
