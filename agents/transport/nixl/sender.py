"""TransportPlan: what one trainer rank owes each peer. Registrations, rendezvous, and the push, all on one thread."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.agents.tables.runs import RUN_LENGTH, digest_table, pack_table, runs, tensor_names
from weightsync.agents.trainer.slots.slots import TrainerSlots
from weightsync.agents.transport.nixl.edge import Edge
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import TransferError
from weightsync.kernels import copy, digest
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, COPY_PEER, Matrix, Region, as_matrix
from weightsync.orchestrator.protocol.messages import Connect, Fault, Peer, PeerTransfer
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member

WARM_UP_SECONDS: Final = 10.0
"""For the first word to every peer. Wiring takes 5–20 ms an edge; a peer that is busy polls late, a dead one never."""


class PlanMismatch(RuntimeError):
    """A Connect whose table does not say what it claims. The daemon's fault; only another plan helps."""

    fault: Fault = "daemon"
    retry = False


class PushError(RuntimeError):
    """Some peers were not written. ``transfers`` are those that were, ``failures`` says why by peer."""

    retry = True

    def __init__(self, transfers: tuple[PeerTransfer, ...], failures: Mapping[Member, TransferError]) -> None:
        super().__init__("; ".join(f"{member}: {error}" for member, error in failures.items()))
        self.transfers = transfers
        self.failures = dict(failures)
        self.fault: Fault = next(iter(failures.values())).fault


@dataclass(frozen=True, slots=True)
class _Way:
    """The prepared way to one peer. ``edge`` is None where nothing goes over NIXL."""

    peer: Peer
    table: bytes
    size: int
    digest: digest.PreparedDigest
    pack: copy.PreparedCopy | None
    edge: Edge | None

    def leads_to(self, peer: Peer, table: bytes) -> bool:
        """Whether this is still the way to ``peer`` with these copies."""
        return self.peer == peer and self.table == table


class TransportPlan:
    """The edges of one trainer rank. Made with its slots; everything else happens on the agent's thread.

    Without ``register`` there is no endpoint and ``connect`` only prepares the digests, for transports that move the
    bytes in another way.
    """

    def __init__(self, slots: TrainerSlots) -> None:
        self._slots = slots
        self._endpoint: NixlEndpoint | None = None
        self._ways: Mapping[Member, _Way] = {}
        self._fingerprint = ""
        self._describe = tensor_names(slots.layout)
        self._writing = asyncio.Lock()
        arena = slots.arenas[0]
        # Of its own, so that packing does not queue behind the kernels of the training.
        self._stream = torch.cuda.Stream(arena.device) if arena.is_cuda else None  # type: ignore[no-untyped-call]

    @property
    def fingerprint(self) -> str:
        """Of the edges that are ready; empty before the first ``connect`` and after one that failed."""
        return self._fingerprint

    def register(self, endpoint: NixlEndpoint) -> None:
        """Register the arenas with ``endpoint``, over which all edges go.

        Raises:
            RegionError, NixlError: see ``NixlEndpoint.register``.
        """
        endpoint.register(self._slots.layout.regions)
        self._endpoint = endpoint

    async def connect(self, connect: Connect) -> None:
        """Prepare and warm up the edges of a plan. Edges that have not changed are kept as they are.

        Raises:
            PlanMismatch: the copies are not worth the bytes that the plan expects.
            TableError: a copy outside this rank's rows.
            NixlError: a peer's memory or metadata is refused, or a peer did not take the first word.
        """
        copies = as_matrix(connect.copies, COPY_COLUMNS)
        async with self._writing:
            self._fingerprint = ""
            per_peer = [copies[copies[:, COPY_PEER] == number] for number in range(len(connect.peers))]
            self._check(connect, copies, per_peer)
            self._leave(connect.peers)
            ways = {}
            for peer, own in zip(connect.peers, per_peer, strict=True):
                ways[peer.member] = self._way(peer, own)
            self._ways = ways
            await self._warm_up()
            self._fingerprint = connect.fingerprint

    def digest(self) -> dict[Member, Digest]:
        """Digest of the bytes that each peer is owed, as the slots hold them now. Waits for the device."""
        ways = self._ways
        for way in ways.values():
            way.digest.launch()
        return {member: way.digest.result() for member, way in ways.items()}

    def bytes_per_peer(self) -> Counter[Member]:
        """Bytes that each peer is owed; zero for those that this rank owes nothing."""
        return Counter({member: way.size for member, way in self._ways.items()})

    async def push(
        self, members: Sequence[Member], deadline_seconds: float, digests: Mapping[Member, Digest] | None = None
    ) -> tuple[PeerTransfer, ...]:
        """Write what ``members`` are owed: gather what travels packed, write, and wait until all is DONE.

        Args:
            members: of the grant; those that this rank owes nothing are left out of the result.
            deadline_seconds: for everything together.
            digests: of the version in the slots, from ``digest``; None: taken now.

        Returns:
            One per peer written.

        Raises:
            PushError: some peers were not written in time or are gone.
        """
        until = time.monotonic() + deadline_seconds
        async with self._writing:
            ways = [self._ways[member] for member in members if member in self._ways]
            known = self.digest() if digests is None else digests
            self._gather(ways)
            over_wire = [way for way in ways if way.edge is not None]
            if self._endpoint is None or not over_wire:
                return tuple(_nothing_sent(way, known) for way in ways)
            edges = [way.edge for way in over_wire if way.edge is not None]
            results = await self._endpoint.write(edges, deadline_seconds=max(until - time.monotonic(), 0.0))
        sent, failures = [], {}
        for way, result in zip(over_wire, results, strict=True):
            member = way.peer.member
            if result.error is not None:
                failures[member] = result.error
                continue
            moved = known.get(member, NO_BYTES)
            sent.append(PeerTransfer(member, result.bytes, result.descriptors, result.seconds, moved))
        sent += [_nothing_sent(way, known) for way in ways if way.edge is None]
        if failures:
            raise PushError(tuple(sent), failures)
        return tuple(sent)

    # ------------------------------------------------------------------------------------------------- internals
    def _check(self, connect: Connect, copies: Matrix, per_peer: Sequence[Matrix]) -> None:
        if sum(map(len, per_peer)) != len(copies):
            raise PlanMismatch(f"plan {connect.fingerprint}: copies for peers that it does not name")
        size = int(runs(copies, self._slots.layout)[:, RUN_LENGTH].sum())
        if size != connect.expected_bytes:
            raise PlanMismatch(
                f"plan {connect.fingerprint}: its copies are worth {size} bytes, not {connect.expected_bytes}"
            )

    def _leave(self, peers: Sequence[Peer]) -> None:
        """Give back ways that the new plan does not have, and forget processes that a newer one has replaced."""
        now = {peer.member: peer for peer in peers}
        if self._endpoint is None:
            return
        for member, way in self._ways.items():
            replaced = member in now and now[member].endpoint_name != way.peer.endpoint_name
            if way.edge is not None and (member not in now or replaced):
                self._endpoint.release_edge(way.edge)
            if replaced:
                self._endpoint.forget(way.peer.endpoint_name)

    def _way(self, peer: Peer, copies: Matrix) -> _Way:
        table, old = copies.tobytes(), self._ways.get(peer.member)
        if old is not None and old.leads_to(peer, table):
            return old
        layout, arenas = self._slots.layout, self._slots.arenas
        writes, packing = runs(copies, layout), pack_table(copies, layout)
        return _Way(
            peer,
            table,
            int(writes[:, RUN_LENGTH].sum()),
            digest.prepare(arenas, digest_table(copies, layout)),
            copy.prepare(arenas, arenas, packing) if len(packing) else None,
            self._edge(peer, layout.regions, writes, old),
        )

    def _edge(self, peer: Peer, regions: Sequence[Region], writes: Matrix, old: _Way | None) -> Edge | None:
        if self._endpoint is None or not len(writes):
            return None
        if old is not None and old.edge is not None and old.peer.endpoint_name == peer.endpoint_name:
            self._endpoint.release_edge(old.edge)
        self._endpoint.connect(peer.endpoint_name, peer.endpoint)
        return self._endpoint.prepare_edge(peer.endpoint_name, regions, peer.regions, writes, describe=self._describe)

    async def _warm_up(self) -> None:
        edges = [way.edge for way in self._ways.values() if way.edge is not None]
        if self._endpoint is None or not edges:
            return
        results = await self._endpoint.warm_up(edges, WARM_UP_SECONDS)
        failed = next((result.error for result in results if result.error is not None), None)
        if failed is not None:
            raise failed

    def _gather(self, ways: Sequence[_Way]) -> None:
        """Collect packed bytes in the staging region; they are there when this returns."""
        packs = [way.pack for way in ways if way.pack is not None]
        with torch.cuda.stream(self._stream):
            for pack in packs:
                pack()
        if packs and self._stream is not None:
            self._stream.synchronize()


def _nothing_sent(way: _Way, digests: Mapping[Member, Digest]) -> PeerTransfer:
    """For a transport that moves the bytes in another way, and for peers that are owed none."""
    return PeerTransfer(way.peer.member, way.size, 0, 0.0, digests.get(way.peer.member, NO_BYTES))
