"""What a round moved by each kind of link, and which edges were slower than their links have shown to be.

An edge alone says little: sixteen senders share the port of one receiver. So an edge counts as slow when the traffic of
neither of its ends came to half of what an end of such a link has carried before, or of what the slowest hardware of
its kind does.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from weightsync.orchestrator.core.records import LinkUse, SlowEdge
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.protocol.edges import RATES, LinkKind, PeerTransfer
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.limits import MAX_COUNT
from weightsync.orchestrator.protocol.names import Member, Role

JUDGED_BYTES: Final = 64 << 20
"""Of an end in one round: with less, the waits around a write count for more than the link."""

SLOW_SHARE: Final = 0.5
"""Of the link's rate."""

MAX_SLOW: Final = 8
"""Edges that a round names as slow; the rest are counted."""

MAX_WAYS: Final = 4
"""Transports that are named of one kind of link."""

GB: Final = 10**9

Seen = dict[tuple[LinkKind, Lands], float]
"""Bytes per second that an end of such a link has carried at most. By how the engine lands, too: what passes a landing
within one GPU costs three passes over its memory where a straight write costs one."""


@dataclass(slots=True)
class _End:
    """The traffic of one member in one wave of a round; ``seconds`` of its longest edge."""

    bytes: int = 0
    seconds: float = 0.0

    def add(self, moved: PeerTransfer) -> None:
        self.bytes += moved.bytes
        self.seconds = max(self.seconds, moved.seconds)

    @property
    def rate(self) -> float:
        return self.bytes / self.seconds if self.seconds > 0 and self.bytes >= JUDGED_BYTES else 0.0


@dataclass(slots=True)
class _Link:
    """All edges of one kind of link."""

    edges: list[tuple[Member, PeerTransfer]] = field(default_factory=list)
    ends: defaultdict[tuple[Role, Member], _End] = field(default_factory=lambda: defaultdict(_End))
    """By the role of who writes, too: what an engine writes on comes after what it was written."""

    def add(self, writer: Member, moved: PeerTransfer) -> None:
        self.edges.append((writer, moved))
        self.ends[writer.role, writer].add(moved)
        self.ends[writer.role, moved.peer].add(moved)


def used(current: Round, seen: Seen) -> dict[str, LinkUse]:
    """By kind of link, what the round moved so far. ``seen`` is raised by what its ends have carried."""
    links: defaultdict[tuple[LinkKind, Lands], _Link] = defaultdict(_Link)
    for writer, closed in current.closed.items():
        for moved in closed.values():
            if moved.bytes and moved.peer in current.ranks:
                links[moved.link, current.engines[moved.peer.engine].lands].add(writer, moved)
    for key, link in links.items():
        seen[key] = max(seen.get(key, 0.0), *(end.rate for end in link.ends.values()))
    found: dict[str, LinkUse] = {}
    for kind in dict.fromkeys(kind for kind, _ in links):
        alike = {lands: link for (name, lands), link in links.items() if name == kind}
        edges = [edge for link in alike.values() for edge in link.edges]
        slow = [edge for lands, link in alike.items() for edge in _slow(link, kind, seen[kind, lands])]
        slow.sort(key=lambda edge: edge.gb_per_s)
        found[kind] = LinkUse(
            edges=len(edges),
            bytes=min(sum(moved.bytes for _, moved in edges), MAX_COUNT),
            seconds=round(max(moved.seconds for _, moved in edges), 6),
            ways=_ways(moved.by for _, moved in edges),
            slow=tuple(slow[:MAX_SLOW]),
            slow_edges=len(slow),
        )
    return found


def measured(seen: Seen) -> dict[str, float]:
    """The most that an end of each kind of link has carried, in 10^9 bytes per second; without those unknown."""
    rates: dict[str, float] = {}
    for (kind, _), rate in seen.items():
        if rate:
            rates[kind] = max(rates.get(kind, 0.0), round(rate / GB, 3))
    return rates


def _slow(link: _Link, kind: LinkKind, seen: float) -> list[SlowEdge]:
    least = RATES[kind].least if kind in RATES else 0.0
    wanted = SLOW_SHARE * max(seen, least)
    found = []
    for writer, moved in link.edges:
        here, there = link.ends[writer.role, writer].rate, link.ends[writer.role, moved.peer].rate
        if here and there and max(here, there) < wanted:
            name = f"{writer} → {moved.peer}"
            found.append(SlowEdge(name, moved.by, round(max(here, there) / GB, 3), round(max(seen, least) / GB, 3)))
    return found


def _ways(lanes: Iterable[str]) -> tuple[str, ...]:
    """Their transports without devices, of which there are as many as ranks."""
    return tuple(sorted({lane.partition("/")[0] for lane in lanes if lane}))[:MAX_WAYS]
