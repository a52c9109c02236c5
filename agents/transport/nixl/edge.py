"""One edge's prepared transfers, kept from round to round: posting a round builds nothing."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from weightsync.agents.link.beside import until_ended
from weightsync.agents.transport.nixl.cargo import Cargo, CargoChunk
from weightsync.agents.transport.nixl.chunks import Chunk, Lane
from weightsync.agents.transport.nixl.errors import DisconnectedError, TransferError
from weightsync.agents.transport.nixl.flow import Flow
from weightsync.agents.transport.nixl.loader import Bindings
from weightsync.agents.transport.nixl.ring import NO_PLACE, PackingRing
from weightsync.orchestrator.protocol.messages import Fault

State = Literal["DONE", "PROC", "ERR"]
"""How a posted handle stands, in NIXL's words: ended, under way, ended without its bytes."""

Describe = Callable[[int, int], str]
"""(local region, local offset) → the tensor there."""


TRIES: Final = 3
"""Connections over which one write to one peer is tried."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """What of one write need not be sent again over another connection: the numbers of the edge's transfers that ended
    well, and of the chunks of its cargo that did (where chunks pass the landing: that were scattered)."""

    transfers: frozenset[int] = frozenset()
    chunks: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """What one write moved to one peer; ``seconds`` from the first post to the last DONE. ``error`` None: all of it."""

    peer: str
    bytes: int
    descriptors: int
    seconds: float
    error: TransferError | None = None
    arrived: Arrived = Arrived()


@dataclass(slots=True, eq=False)
class Transfer:
    """One NIXL handle, for ``bytes`` at ``where`` (a tensor, or a chunk). ``pending``: posted, and not known to have
    ended; until then it cannot be posted again. ``place``: of the packing ring, NO_PLACE for none. ``number``: among
    its edge's transfers, or of its chunk. ``needs``: how much of region 0 must be filled before it is posted."""

    bytes: int
    descriptors: int
    where: Callable[[], str]
    handle: Any = None
    pending: bool = False
    place: int = NO_PLACE
    number: int = 0
    needs: int = 0


@dataclass(slots=True, eq=False)
class Edge:
    """The way from this agent's regions to one peer's. Made by ``NixlEndpoint.prepare_edge``.

    ``transfers`` are the same in every round; those of the ``cargo`` are made as its chunks are packed, ``loads`` are
    the ones that have not ended. ``before``: what of the next write has arrived over the connection before. ``broken``:
    NIXL has refused a transfer of it, so that only another edge, over a new connection, reaches the peer.
    """

    peer: str
    lanes: Sequence[Lane]
    describe: Describe
    cargo: Cargo | None = None
    transfers: list[Transfer] = field(default_factory=list)
    loads: list[Transfer] = field(default_factory=list)
    before: EdgeResult | None = None
    lists: list[tuple[Any, Any]] = field(default_factory=list)
    last_error: TransferError | None = None
    broken: bool = False

    @property
    def tainted(self) -> bool:
        """Whether a posted transfer has not ended: its bytes may still be read here and written there."""
        return any(transfer.pending for transfer in (*self.transfers, *self.loads))


@dataclass(slots=True, eq=False)
class EdgeProgress:
    """One edge's state within one write. ``over``: ``Ended`` was told."""

    edge: Edge
    waiting: deque[Transfer]
    descriptors: int
    flow: Flow | None = None
    looked: float = 0.0
    """When something moved last, or the peer was looked after."""
    still: float = 0.0
    """For how long it was looked at in vain since, in seconds, while the peer or its path was to do something."""
    in_flight: list[Transfer] = field(default_factory=list)
    bytes_in_flight: int = 0
    bytes_done: int = 0
    started: float = 0.0
    ended: float = 0.0
    error: TransferError | None = None
    settling: bool = False
    """Its connection broke: what is in flight is waited for, since the edge can be written anew when that has ended."""
    over: bool = False
    arrived: set[int] = field(default_factory=set)
    """Numbers of transfers that ended well …"""
    loaded: set[int] = field(default_factory=set)
    """… and of chunks."""

    @property
    def active(self) -> bool:
        return self.error is None and bool(self.waiting or self.in_flight or (self.flow and self.flow.open))

    @property
    def awaited(self) -> bool:
        """Whether the write goes on for it."""
        return self.active or (self.settling and self.moves)

    @property
    def moves(self) -> bool:
        """Whether something of it is in flight, or being packed."""
        return bool(self.in_flight) or (self.flow is not None and self.flow.packs)

    def result(self) -> EdgeResult:
        seconds = max(self.ended - self.started, 0.0)
        chunks = frozenset(self.loaded) if self.flow is None else self.flow.arrived(frozenset(self.loaded))
        arrived = Arrived(frozenset(self.arrived), chunks)
        return EdgeResult(self.edge.peer, self.bytes_done, self.descriptors, seconds, self.error, arrived)


class Retries:
    """How the edges of one write end. One that breaks is not told of while it may be tried again.

    Args:
        until: its deadline, on ``time.monotonic``'s clock.
        tell: told of each edge once.
        again: asked to try one again that broke, by its endpoint.

    Attributes:
        broken: by endpoint, what became of edges whose connection broke, and that nothing is in flight over.
        stopped: endpoints that nothing more is posted to.
        tries: of those that broke, under way or ended.
    """

    def __init__(self, until: float, tell: Callable[[EdgeResult], None], again: Callable[[str], None]) -> None:
        self.tell = tell
        self.broken: dict[str, EdgeResult] = {}
        self.stopped: set[str] = set()
        self.tries: list[asyncio.Task[None]] = []
        self._until = until
        self._again = again
        self._tried: Counter[str] = Counter()
        self._over = False

    @property
    def left_seconds(self) -> float:
        return max(self._until - time.monotonic(), 0.0)

    def ended(self, result: EdgeResult) -> None:
        """Nothing is in flight over an edge."""
        name, error = result.peer, result.error
        # Stopped, late or given up: the connection is none the worse, or the bytes may still arrive.
        broke = error is not None and error.retry and type(error) in (TransferError, DisconnectedError)
        self._tried[name] += 1
        late = self._over or not self.left_seconds or name in self.stopped
        if broke and not late and self._tried[name] < TRIES:
            self.broken[name] = result
            self._again(name)
        else:
            self.tell(result)

    def try_no_more(self, names: Collection[str]) -> None:
        """Tell how those of ``names`` have ended that wait to be tried again."""
        for name in [name for name in self.broken if name in names]:
            self.tell(self.broken.pop(name))

    def stop(self, names: Collection[str]) -> None:
        """Nothing more is posted to ``names``."""
        self.stopped.update(names)
        self.try_no_more(names)

    async def tried(self) -> None:
        """Until all tries have ended, also those that they begin. Raises what one of them has raised."""
        while running := [task for task in self.tries if not task.done()]:
            await asyncio.wait(running)
        for task in self.tries:
            if not task.cancelled():
                task.result()

    async def give_up(self) -> None:
        """Nothing is tried again; what is in flight is told of when it has ended."""
        self._over = True
        for task in self.tries:
            task.cancel()
        self.try_no_more(list(self.broken))
        await until_ended(self.tries)


def bytes_of(edge: Edge, arrived: Arrived) -> int:
    """Of the edge's transfers and chunks that have arrived."""
    chunks = edge.cargo.chunks if edge.cargo is not None else ()
    plain = sum(transfer.bytes for transfer in edge.transfers if transfer.number in arrived.transfers)
    return plain + sum(chunk.bytes for chunk in chunks if chunk.number in arrived.chunks)


def build(edge: Edge, agent: Any) -> None:
    """Prepare the edge's descriptor lists and one handle per chunk, with ``agent`` (a nixl_agent)."""
    for number, lane in enumerate(edge.lanes):
        local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", lane.local, lane.local_memory)
        edge.lists.append((local, None))  # so that it is released if the remote side cannot be prepared
        edge.lists[-1] = (local, agent.prep_xfer_dlist(edge.peer, lane.remote, lane.remote_memory))
        for chunk in lane.chunks:
            edge.transfers.append(arm(edge, number, chunk, agent))


def arm(edge: Edge, lane: int, chunk: Chunk, agent: Any) -> Transfer:
    """A transfer with its handle. Both sides are selected by the same indices of whole-edge lists: a list cut to the
    chunk would need indices from 0, a mistake that shows only when there is more than one chunk."""
    indices = np.arange(chunk.first, chunk.last, dtype=np.int32)
    local, remote = edge.lists[lane]
    region, offset = edge.lanes[lane].places[chunk.first].tolist()
    where = partial(edge.describe, region, offset)
    transfer = Transfer(chunk.bytes, chunk.descriptors, where, number=len(edge.transfers), needs=chunk.needs)
    transfer.handle = agent.make_prepped_xfer("WRITE", local, indices, remote, indices)
    return transfer


def load(edge: Edge, chunk: CargoChunk, place: int, ring: PackingRing | None, notice: bytes, agent: Any) -> Transfer:
    """A transfer of one chunk of the edge's cargo, packed in ``place`` of the ``ring``; its end is told the peer by
    ``notice``. It is posted once."""
    cargo = edge.cargo
    assert cargo is not None
    local = chunk.straight if ring is None or place == NO_PLACE else chunk.local(ring.region, ring.offset(place))
    where = f"chunk {chunk.number} of {cargo.berth.chunks}"
    transfer = Transfer(chunk.bytes, len(local), lambda: where, place=place, number=chunk.number)
    edge.loads.append(transfer)
    transfer.handle = agent.initialize_xfer(
        "WRITE",
        agent.get_xfer_descs(local, cargo.local_memory),
        agent.get_xfer_descs(chunk.remote, cargo.remote_memory),
        edge.peer,
        notice,
    )
    return transfer


def unload(edge: Edge, transfer: Transfer, errors: tuple[type[Exception], ...]) -> None:
    """Give a load that has ended back."""
    edge.loads.remove(transfer)
    _release(transfer, errors)


def post(transfer: Transfer, agent: Any, bindings: Bindings) -> tuple[State, Exception | None]:
    """Post the transfer: how it stands then, and what NIXL raised.

    A post that raises may have begun to move bytes. What NIXL says of the handle afterwards counts: PROC until it has
    ended, an error for one that was never posted or whose connection is gone.
    """
    try:
        state: State = agent.transfer(transfer.handle)
    except bindings.errors as error:
        ask(transfer, agent, bindings)
        return "ERR", error
    transfer.pending = state == "PROC"
    return state, None


def ask(transfer: Transfer, agent: Any, bindings: Bindings) -> tuple[State, Exception | None]:
    """How a posted transfer stands, and what NIXL raised."""
    cause: Exception | None = None
    state: State = "ERR"
    try:
        state = agent.check_xfer_state(transfer.handle)
    except bindings.errors as error:
        cause = error
    transfer.pending = state == "PROC"
    return state, cause


def release(edge: Edge, errors: tuple[type[Exception], ...]) -> int:
    """Give back the edge's handles and lists. Returns how many NIXL would not let go because they are in flight;
    their wrappers stay with the agent, which lets them go when it is destroyed."""
    kept = sum(not _release(transfer, errors) for transfer in (*edge.transfers, *edge.loads))
    for pair in edge.lists:
        for prepared in pair:
            if prepared is not None:
                prepared.release()
    edge.transfers, edge.loads, edge.lists = [], [], []
    return kept


def _release(transfer: Transfer, errors: tuple[type[Exception], ...]) -> bool:
    """Give the transfer's handle back; whether NIXL let go of it."""
    handle, transfer.handle = transfer.handle, None
    try:
        if handle is not None:
            handle.release()
    except errors:  # it does not of one that is in flight
        return False
    return True


def refusal(cause: Exception | None, bindings: Bindings) -> tuple[type[TransferError], str, Fault]:
    """What it means that NIXL ended a transfer without its bytes, having raised ``cause``: kind, reason and fault."""
    if isinstance(cause, bindings.disconnected):
        reason = "the peer's process or its connection is gone (or its memory cannot be reached by this transport)"
        return DisconnectedError, reason, "engine"
    return TransferError, f"NIXL refused: {cause}" if cause is not None else "NIXL reports an error", "network"
