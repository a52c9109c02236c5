"""The sender's packing ring: places that chunks of all edges are gathered in before they are written."""

import time
from collections import deque
from typing import Final, Protocol

from weightsync.orchestrator.protocol.landing import chunk_bytes
from weightsync.orchestrator.protocol.layout import Region

NO_PLACE: Final = -1
"""Of a chunk that is not packed."""

TURN_SECONDS: Final = 0.05
"""After which one that has not asked for the place it waited for loses its turn. Those that want one ask every few
milliseconds; one whose peer hangs may ask no more."""


class Taker(Protocol):
    """One write over one edge. ``stopped``: it has been given up, and what it holds may stay held."""

    @property
    def peer(self) -> str: ...

    @property
    def stopped(self) -> bool: ...


class PackingRing:
    """Places of ``chunk_bytes`` in a registered ``region``, given to the edges that write in turn.

    No edge holds more than its part of them while others write, and one is left for whoever begins later: a peer that
    hangs costs no other edge its places. One whose write has been given up is held until that has ended; what remains
    goes round.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.chunk_bytes = chunk_bytes(region)
        self._places = region.length // self.chunk_bytes if self.chunk_bytes else 0
        self._free = deque(range(self._places))
        self._held: dict[int, Taker] = {}
        self._waiting: deque[Taker] = deque()
        self._asked: dict[int, float] = {}
        """When each that waits (by its id) has asked last."""
        self._writing: list[Taker] = []

    def join(self, holder: Taker) -> None:
        """``holder`` will take places until it leaves."""
        self._writing.append(holder)

    def leave(self, holder: Taker) -> None:
        """``holder`` takes no more; what it holds it gives back later. Again does nothing."""
        self._writing = [one for one in self._writing if one is not holder]
        self._withdraw(holder)

    def take(self, holder: Taker) -> int | None:
        """A place for ``holder``; None: ask again."""
        if not any(one is holder for one in self._waiting):
            if self._holds(holder) >= self._part:
                return None
            self._waiting.append(holder)
        now = self._asked[id(holder)] = time.monotonic()
        while self._waiting[0] is not holder and now - self._asked[id(self._waiting[0])] > TURN_SECONDS:
            self._withdraw(self._waiting[0])
        if not self._free or self._waiting[0] is not holder:
            return None
        self._withdraw(holder)
        place = self._free.popleft()
        self._held[place] = holder
        return place

    def owes(self, holder: Taker) -> bool:
        """Whether ``holder``, which had all of them while it wrote alone, keeps others from their part."""
        others = any(one is not holder for one in self._waiting)
        return others and not self._free and self._holds(holder) > self._part

    @property
    def suffices(self) -> bool:
        """Whether each edge that writes has a place of its own, however long the others hold theirs."""
        return self._places >= len(self._writing) + self._stuck

    def give(self, place: int) -> None:
        """Nothing reads ``place`` any more."""
        del self._held[place]
        self._free.append(place)

    def lost(self) -> tuple[str, ...]:
        """Peers whose writes, given up and not ended, hold all places; none if there is a place or one that will come
        back."""
        if self._free or not all(holder.stopped for holder in self._held.values()):
            return ()
        return tuple(sorted({holder.peer for holder in self._held.values()}))

    def offset(self, place: int) -> int:
        """First byte of ``place`` in the region."""
        return place * self.chunk_bytes

    def _holds(self, holder: Taker) -> int:
        return sum(one is holder for one in self._held.values())

    @property
    def _stuck(self) -> int:
        """Places of writes that were given up."""
        return sum(holder.stopped for holder in self._held.values())

    @property
    def _part(self) -> int:
        """What one edge may hold. Of two places, one that writes alone needs both: to pack in, and to write from."""
        most = self._places - 1 if self._places > 2 else self._places
        return max(1, min(most, (self._places - self._stuck) // max(1, len(self._writing))))

    def _withdraw(self, holder: Taker) -> None:
        self._waiting = deque(one for one in self._waiting if one is not holder)
        self._asked.pop(id(holder), None)
