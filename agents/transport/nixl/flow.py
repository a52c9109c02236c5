"""One write of an edge's cargo: chunks are packed, posted, and where they only pass the peer's landing, waited for.

Chunk k is packed while those before it are on the wire. Where it passes the landing, it is written when the peer has
said that the chunk in its place was scattered, and the write is over when the peer has said so of all.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from weightsync.agents.transport.filling import Filled, whole
from weightsync.agents.transport.nixl.cargo import Cargo, CargoChunk
from weightsync.agents.transport.nixl.notices import Notice, encode
from weightsync.agents.transport.nixl.ring import NO_PLACE, PackingRing
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.dispatch import StreamMark, StreamWork
from weightsync.orchestrator.protocol.names import RoundName


class Packing(Protocol):
    """A chunk that is being packed."""

    def done(self) -> bool: ...

    def result(self) -> object:
        """Raises what went wrong."""

    def add_done_callback(self, call: Callable[["Packing"], object], /) -> object:
        """Call when nothing touches the place any more."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Packing on a stream. Later work on the stream comes after it, so its place may be given back at any time."""

    mark: StreamMark

    def done(self) -> bool:
        return self.mark.reached()

    def result(self) -> object:
        return None

    def add_done_callback(self, call: Callable[[Packing], object], /) -> object:
        return call(self)


def packing_stream(device: torch.device) -> torch.cuda.Stream:
    """Of its own, which no kernel of the training or of the engine waits for, and which goes before theirs: a chunk
    takes a tenth of a millisecond, and its place in a ring is waited for."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class Packer:
    """Begins packing: on ``stream``, or on another thread where it is the CPU's work."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._work = None if stream is None else StreamWork(stream)

    def begin(self, pack: PreparedCopy, shift: int) -> Packing:
        if self._work is None:
            return asyncio.get_running_loop().run_in_executor(None, partial(pack, shift))
        return _Recorded(self._work.begin(partial(pack, shift), pack))


class Flow:
    """The chunks of one write over one edge, in their order.

    Attributes:
        peer: endpoint name of the other side.
        stopped: nothing more is posted; what is on its way holds its place until it ends.
    """

    def __init__(
        self,
        peer: str,
        cargo: Cargo,
        ring: PackingRing | None,
        packer: Packer,
        done: frozenset[int] = frozenset(),
        filled: Filled = whole,
    ) -> None:
        self.peer = peer
        self._filled = filled
        self.stopped = False
        self._cargo = cargo
        self._ring = ring if any(chunk.pack is not None for chunk in cargo.chunks) else None
        self._packer = packer
        self._left = deque(chunk for chunk in cargo.chunks if chunk.number not in done)
        self._packing: deque[tuple[CargoChunk, int, Packing]] = deque()
        self._in_vain: list[Packing] = []
        self._scattered: set[int] = set(done) if cargo.berth.passes else set()
        if self._ring is not None:
            self._ring.join(self)

    @property
    def open(self) -> bool:
        """Whether anything is still to be posted, or to be heard of from the peer."""
        return not self.stopped and bool(self._left or self._packing or self._unscattered)

    def arrived(self, ended: frozenset[int]) -> frozenset[int]:
        """Of the chunks whose writes have ended, those that need not come again."""
        return frozenset(self._scattered) if self._cargo.berth.passes else ended

    @property
    def _unscattered(self) -> int:
        return len(self._cargo.chunks) - len(self._scattered) if self._cargo.berth.passes else 0

    @property
    def packs(self) -> bool:
        """Whether something that nobody will post is still being packed: the ring may be the landing of whoever writes
        here next, of an engine that lends."""
        self._in_vain = [packing for packing in self._in_vain if not packing.done()]
        return bool(self._in_vain)

    @property
    def waits_for_peer(self) -> bool:
        """Whether it goes on when the peer has scattered something, and not before."""
        if self._packing:
            return self.open and not self._may_land(self._packing[0][0])
        return self.open and not (self._left and self._may_land(self._left[0]))

    @property
    def waits_for_slots(self) -> bool:
        """Whether it goes on when more of the slots is filled, and not before."""
        return self.open and not self._packing and bool(self._left) and self._left[0].needs > self._filled()

    def scattered(self, chunk: int) -> None:
        """The peer has said so of ``chunk``: its place is free."""
        self._scattered.add(chunk)

    def next(self) -> tuple[CargoChunk, int] | None:
        """The next chunk to post, and its place in the ring; packs ahead as far as there is room."""
        filled = self._filled()
        self._make_room()
        while self._left and self._left[0].pack is not None and self._may_be_packed(self._left[0], filled):
            assert self._ring is not None, "what is packed has a ring"
            place = self._ring.take(self)
            if place is None:
                break
            chunk = self._left.popleft()
            assert chunk.pack is not None
            self._packing.append((chunk, place, self._packer.begin(chunk.pack, self._ring.offset(place))))
        if self._packing:
            if not (self._packing[0][2].done() and self._may_land(self._packing[0][0])):
                return None
            chunk, place, packing = self._packing.popleft()
            try:
                packing.result()
            except BaseException:
                self.give(place)
                raise
            return chunk, place
        if self._left and self._left[0].pack is None and self._may_leave(self._left[0], filled):
            return self._left.popleft(), NO_PLACE
        return None

    def _may_be_packed(self, chunk: CargoChunk, filled: int) -> bool:
        """Before the peer has a place for it only where no other edge could want the one that it takes here."""
        assert self._ring is not None, "what is packed has a ring"
        return chunk.needs <= filled and (self._ring.suffices or self._may_land(chunk))

    def _make_room(self) -> None:
        """Give back places of what was packed ahead, which others want and its peer has no room for: it is packed
        again."""
        while self._packing and self._ring is not None and self._ring.owes(self):
            chunk, place, packing = self._packing[-1]
            if not packing.done() or self._may_land(chunk):
                return
            self._packing.pop()
            self._left.appendleft(chunk)
            self.give(place)

    def _may_leave(self, chunk: CargoChunk, filled: int) -> bool:
        return chunk.needs <= filled and self._may_land(chunk)

    def _may_land(self, chunk: CargoChunk) -> bool:
        berth = self._cargo.berth
        before = chunk.number - berth.places
        return not berth.passes or before < 0 or before in self._scattered

    def give(self, place: int) -> None:
        """The write from ``place`` has ended."""
        if place != NO_PLACE:
            assert self._ring is not None
            self._ring.give(place)

    def _packed_in_vain(self, place: int, _: Packing) -> None:
        self.give(place)

    def lost(self) -> str:
        """Why it can never go on: no place of the ring will come back."""
        peers = self._ring.lost() if self._ring is not None and self._left and not self._packing else ()
        return f"no packing chunk is left: writes to {', '.join(peers)} have not ended" if peers else ""

    def waits_for(self) -> str:
        """What it waits for, for people."""
        total = self._cargo.berth.chunks
        if self._packing:
            chunk = self._packing[0][0]
            if self._may_land(chunk):
                return f"chunk {chunk.number} of {total} is being packed"
            return self._waits_for_room(chunk)
        if self._left:
            chunk = self._left[0]
            if chunk.needs > self._filled():
                return f"chunk {chunk.number} of {total} is still being converted"
            if not self._may_land(chunk):
                return self._waits_for_room(chunk)
            return f"chunk {chunk.number} of {total} waits for a place to be packed in"
        left = self._unscattered
        return f"the peer has yet to scatter {left} of {total} chunks" if left else ""

    def _waits_for_room(self, chunk: CargoChunk) -> str:
        berth = self._cargo.berth
        return (
            f"chunk {chunk.number} of {berth.chunks} waits for the peer to scatter chunk {chunk.number - berth.places}"
        )

    def stop(self) -> None:
        """Post nothing more. Again does nothing."""
        self.stopped = True
        self._left.clear()
        for _, place, packing in self._packing:
            packing.add_done_callback(partial(self._packed_in_vain, place))
            self._in_vain.append(packing)
        self._packing.clear()
        if self._ring is not None:
            self._ring.leave(self)


@dataclass(slots=True)
class Loading:
    """What a write takes, of the round ``round``. ``ring`` is None where nothing is packed; ``filled`` may leave."""

    round: RoundName
    ring: PackingRing | None
    packer: Packer
    filled: Filled = whole
    _flows: dict[str, Flow] = field(default_factory=dict)

    def begin(self, peer: str, cargo: Cargo, done: frozenset[int] = frozenset()) -> Flow:
        """The flow of an edge's cargo to ``peer``, without the chunks that have arrived before."""
        flow = self._flows[peer] = Flow(peer, cargo, self.ring, self.packer, done, self.filled)
        return flow

    def notice(self, cargo: Cargo, chunk: CargoChunk) -> bytes:
        """What the peer is told with the bytes of ``chunk``: nothing if all of the cargo stays where it lands."""
        return encode(Notice("landed", self.round, chunk.number)) if cargo.berth.passes else b""

    def heard(self, peer: str, notice: Notice) -> None:
        """What a peer says of this round: that a chunk was scattered."""
        if notice.round == self.round and notice.what == "scattered" and peer in self._flows:
            self._flows[peer].scattered(notice.chunk)
