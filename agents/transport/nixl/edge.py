"""One edge's prepared transfers, kept from round to round: posting a round builds nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from weightsync.agents.transport.nixl.chunks import Chunk, Lane
from weightsync.agents.transport.nixl.errors import DisconnectedError, TransferError
from weightsync.agents.transport.nixl.loader import Bindings
from weightsync.orchestrator.protocol.messages import Fault

State = Literal["DONE", "PROC", "ERR"]
"""How a posted handle stands, in NIXL's words: ended, under way, ended without its bytes."""

Describe = Callable[[int, int], str]
"""(local region, local offset) → the tensor there."""


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """What one write moved to one peer; ``seconds`` from the first post to the last DONE. ``error`` None: all of it."""

    peer: str
    bytes: int
    descriptors: int
    seconds: float
    error: TransferError | None = None


@dataclass(slots=True, eq=False)
class Transfer:
    """One NIXL handle. ``pending``: posted, and not known to have ended; until then it cannot be posted again."""

    lane: int
    chunk: Chunk
    handle: Any = None
    pending: bool = False


@dataclass(slots=True, eq=False)
class Edge:
    """The way from this agent's regions to one peer's. Made by ``NixlEndpoint.prepare_edge``.

    ``broken``: NIXL has refused a transfer of it, so that only another edge, over a new connection, reaches the peer.
    """

    peer: str
    lanes: Sequence[Lane]
    describe: Describe
    transfers: list[Transfer] = field(default_factory=list)
    lists: list[tuple[Any, Any]] = field(default_factory=list)
    last_error: TransferError | None = None
    broken: bool = False

    @property
    def tainted(self) -> bool:
        """Whether a posted transfer has not ended: its bytes may still be read here and written there."""
        return any(transfer.pending for transfer in self.transfers)

    def tensor_of(self, transfer: Transfer) -> str:
        """The tensor at which ``transfer`` begins."""
        region, offset = self.lanes[transfer.lane].places[transfer.chunk.first]
        return self.describe(int(region), int(offset))


def build(edge: Edge, agent: Any) -> None:
    """Prepare the edge's descriptor lists and one handle per chunk, with ``agent`` (a nixl_agent)."""
    for number, lane in enumerate(edge.lanes):
        local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", lane.local, lane.local_memory)
        edge.lists.append((local, None))  # so that it is released if the remote side cannot be prepared
        edge.lists[-1] = (local, agent.prep_xfer_dlist(edge.peer, lane.remote, lane.remote_memory))
        edge.transfers += [Transfer(number, chunk) for chunk in lane.chunks]
    for transfer in edge.transfers:
        arm(edge, transfer, agent)


def arm(edge: Edge, transfer: Transfer, agent: Any) -> None:
    """Make the transfer's handle. Both sides are selected by the same indices of whole-edge lists: a list cut to the
    chunk would need indices from 0, a mistake that shows only when there is more than one chunk."""
    indices = np.arange(transfer.chunk.first, transfer.chunk.last, dtype=np.int32)
    local, remote = edge.lists[transfer.lane]
    transfer.handle = agent.make_prepped_xfer("WRITE", local, indices, remote, indices)


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
    kept = 0
    for transfer in edge.transfers:
        if transfer.handle is not None:
            try:
                transfer.handle.release()
            except errors:  # NIXL does not let go of a handle that is in flight
                kept += 1
            transfer.handle = None
    for pair in edge.lists:
        for prepared in pair:
            if prepared is not None:
                prepared.release()
    edge.transfers, edge.lists = [], []
    return kept


def refusal(cause: Exception | None, bindings: Bindings) -> tuple[type[TransferError], str, Fault]:
    """What it means that NIXL ended a transfer without its bytes, having raised ``cause``: kind, reason and fault."""
    if isinstance(cause, bindings.disconnected):
        reason = "the peer's process or its connection is gone (or its memory cannot be reached by this transport)"
        return DisconnectedError, reason, "engine"
    return TransferError, f"NIXL refused: {cause}" if cause is not None else "NIXL reports an error", "network"
