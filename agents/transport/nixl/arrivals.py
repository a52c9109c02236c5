"""Cargo that passes its berth: each chunk is scattered as it lands, and its place is free again.

A chunk that a sender says has landed is spread over the rows, and the sender told so. Only those of the round that is
open count: chunks of an earlier attempt are somebody's who has no grant any more, and change nothing.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog
import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.tables.cargo import cut_scattering
from weightsync.agents.tables.runs import scatter_table
from weightsync.agents.transport.digesting import CargoDigest, Digester, digest_parts
from weightsync.agents.transport.nixl.flow import Packing
from weightsync.agents.transport.nixl.notices import Notice
from weightsync.kernels.columns import SRC_OFFSET
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import COPY_PEER, Layout, Matrix
from weightsync.orchestrator.protocol.names import Member, RoundName

log = structlog.get_logger(__name__)

AT_ONCE: Final = 8
"""Chunks that are being scattered on a device, one behind the other on a stream. On the CPU it is one."""


class ChunksMissing(AgentError):
    """Chunks have not landed although every writer has finished."""

    fault = "trainer"
    retry = True


class Begins(Protocol):
    """Begins a copy: ``flow.Packer``."""

    def begin(self, pack: PreparedCopy, shift: int) -> Packing: ...


@dataclass(slots=True, eq=False)
class Inbound:
    """One edge whose cargo passes: how each chunk is scattered from its place, and what of the open round has landed
    and was scattered."""

    member: Member
    endpoint_name: str
    berth: Berth
    scatter: Sequence[PreparedCopy]
    digest: CargoDigest | None = None
    landed: set[int] = field(default_factory=set)
    scattered: set[int] = field(default_factory=set)


def inbound(
    copies: Matrix,
    peers: Sequence[Peer],
    layout: Layout,
    tensors: Sequence[torch.Tensor],
    digester: Digester | None = None,
) -> tuple[Inbound, ...]:
    """The edges of a Connect whose cargo comes chunk by chunk.

    Args:
        copies: int64 ``[n, COPY_COLUMNS]``, with their places in the cargo.
        peers: of the Connect.
        layout: of this rank; ``tensors`` (uint8) are its regions.
        digester: digests what is in its rows; None: nobody does before all is.

    Raises:
        RunTableError: copies that do not fit the layout.
    """
    found = []
    for number, peer in enumerate(peers):
        if peer.berth is None or not peer.berth.passes:
            continue
        mine = copies[copies[:, COPY_PEER] == number]
        table = scatter_table(mine, layout)
        cut = cut_scattering(table, peer.berth.chunk_bytes)
        chunks = []
        for chunk in range(peer.berth.chunks):
            rows = cut.of(chunk).copy()
            rows[:, SRC_OFFSET] += peer.berth.place(chunk)
            chunks.append(prepare_copy(tensors, tensors, rows, beside="batches"))
        digest = None
        if digester is not None:
            digest = CargoDigest(digest_parts(mine, peer.berth.chunk_bytes, layout, tensors), digester.begin)
        found.append(Inbound(peer.member, peer.endpoint_name, peer.berth, tuple(chunks), digest))
    return tuple(found)


class Arrivals:
    """Chunks that land at this rank, on the agent's thread.

    Args:
        copier: makes the copies.
        tell: tells a sender; raises AgentError if it cannot.
        at_once: copies that are begun before the first is done.
    """

    def __init__(self, copier: Begins, tell: Callable[[str, Notice], None], at_once: int) -> None:
        self._copier = copier
        self._tell = tell
        self._at_once = at_once
        self._edges: dict[str, Inbound] = {}
        self._round: RoundName | None = None
        self._waiting: deque[tuple[Inbound, int]] = deque()
        self._copying: deque[tuple[RoundName | None, Inbound, int, Packing]] = deque()

    def connect(self, edges: Sequence[Inbound]) -> None:
        """The edges of another plan. What was open is not any more."""
        self._round = None
        self._waiting.clear()
        self._edges = {edge.endpoint_name: edge for edge in edges}

    def begin(self, round_name: RoundName) -> None:
        """Writers of this round may be granted from now on; again changes nothing."""
        if self._round == round_name:
            return
        self._round = round_name
        self._waiting.clear()
        for edge in self._edges.values():
            edge.landed.clear()
            edge.scattered.clear()
            if edge.digest is not None:
                edge.digest.begin()

    def end(self, round_name: RoundName) -> None:
        """Nothing more of this round is scattered but what has begun."""
        if self._round == round_name:
            self._round = None
            self._waiting.clear()

    def heard(self, peer: str, notice: Notice) -> None:
        """A sender says that a chunk has landed."""
        edge = self._edges.get(peer)
        if edge is None or notice.what != "landed" or notice.round != self._round:
            return
        if notice.chunk in edge.landed:
            if notice.chunk in edge.scattered:  # its sender has lost the connection by which it was told so
                self._say(edge, Notice("scattered", notice.round, notice.chunk))
            return
        if not self._may_land(edge, notice.chunk):
            log.warning("chunk_unexpected", peer=peer, chunk=notice.chunk, round=str(notice.round))
            return
        edge.landed.add(notice.chunk)
        self._waiting.append((edge, notice.chunk))

    def _may_land(self, edge: Inbound, chunk: int) -> bool:
        """Whether ``chunk`` is one that there is, in a place that is free: else its bytes are on others'."""
        before = chunk - edge.berth.places
        return chunk < edge.berth.chunks and (before < 0 or before in edge.scattered)

    def turn(self) -> bool:
        """Scatter what has landed and tell of what was scattered; whether anything moved. Must not block.

        Copies are made one after the other: one that an attempt has left behind never comes after those of the next.
        What senders wait for comes first, and then the digests.
        """
        moved, advanced = self._begin(), dict[str, Inbound]()
        while self._copying and self._copying[0][3].done():
            round_name, edge, chunk, copying = self._copying.popleft()
            moved = True
            try:
                copying.result()
            except Exception:  # its sender is never told, so that it names the chunk; ``check`` does, too
                log.exception("chunk_not_scattered", peer=str(edge.member), chunk=chunk)
                continue
            if round_name is not None and round_name == self._round:
                edge.scattered.add(chunk)
                self._say(edge, Notice("scattered", round_name, chunk))
                advanced[edge.endpoint_name] = edge
        moved |= self._begin()
        for edge in advanced.values():
            if edge.digest is not None:
                edge.digest.advance(edge.scattered)
        return moved

    def _begin(self) -> bool:
        """As many copies as may be under way; whether any was begun."""
        begun = False
        while self._waiting and len(self._copying) < self._at_once:
            edge, chunk = self._waiting.popleft()
            self._copying.append((self._round, edge, chunk, self._copier.begin(edge.scatter[chunk], 0)))
            begun = True
        return begun

    def _say(self, edge: Inbound, notice: Notice) -> None:
        try:
            self._tell(edge.endpoint_name, notice)
        except AgentError as error:  # the sender's own deadline ends the edge, and it is the one that is asked
            log.warning("sender_not_told", peer=str(edge.member), chunk=notice.chunk, error=str(error))

    def check(self) -> None:
        """That all chunks of all edges were scattered, now that every writer has finished.

        Raises:
            ChunksMissing: which were not.
        """
        for edge in self._edges.values():
            missing = sorted(set(range(edge.berth.chunks)) - edge.scattered)
            if missing:
                raise ChunksMissing(
                    f"{len(missing)} of {edge.berth.chunks} chunks from {edge.member} were not scattered, chunk"
                    f" {missing[0]} first"
                )
