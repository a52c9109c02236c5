"""NIXL at an inference rank: peers write into its registered memory; what lands is scattered there and then, or when
all of it has."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from weightsync.agents.tables.runs import digest_table, scatter_table
from weightsync.agents.transport.digesting import Digester, covers, digesting_stream
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.nixl.arrivals import AT_ONCE, Arrivals, Inbound, inbound
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import NixlError
from weightsync.agents.transport.nixl.flow import Packer, packing_stream
from weightsync.agents.transport.nixl.notices import Notice
from weightsync.agents.transport.nixl.open import bind, open_endpoint
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.kernels.digest import PreparedDigest
from weightsync.kernels.digest import prepare as prepare_digest
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.landing import landed
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Layout, Matrix, Region, as_matrix
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version, add_digests

NO_COPIES: Final = np.empty((0, COPY_COLUMNS), np.int64)

EAGER_SECONDS: Final = 0.005
"""After a chunk has moved, the next is looked for …"""

EAGER_POLL_SECONDS: Final = 0.0001
"""… so often: a chunk of 256 MiB takes 0.7 ms over NVLink, and its place is waited for. The thread sleeps, because an
event loop's shortest wait is a millisecond, whatever it is asked for."""

EAGER_POLLS: Final = 4
"""In one turn of the event loop, which takes the interpreter twice more: an engine's steps hardly ever let go of it."""


@dataclass(frozen=True, slots=True)
class _Inflow:
    """What comes by one plan: its ``landed``, the way of that to its rows, and edges whose cargo passes. ``digest``: of
    what has landed, at its rows; None: of nothing, what passes included."""

    fingerprint: str = ""
    landed: Matrix = field(default_factory=lambda: NO_COPIES)
    scatter: Callable[[], None] = lambda: None
    edges: Sequence[Inbound] = ()
    digest: PreparedDigest | None = None


class NixlReceiver(Receiver):
    """See ``transport.interface``."""

    lands_beside = True

    def __init__(self, memory: TargetMemory) -> None:
        self._memory = memory
        self.landed: Matrix = NO_COPIES
        self._inflows = {False: _Inflow(), True: _Inflow()}
        """By the plan, and by the one that relays."""
        self._relays = False
        """Which of the two is in use."""
        self._endpoint: NixlEndpoint | None = None
        self._settings: NixlSettings | None = None
        self._arrivals = Arrivals(Packer(None), self._tell, 1)
        self._digester = Digester(None)
        self._names: dict[Member, str] = {}
        """Of the endpoint of each peer that is told of chunks."""
        self._cards: dict[str, bytes] = {}
        """By which they are reached."""
        self._eager_seconds = 0.0
        self._eager_until = 0.0
        self._next_look: asyncio.Handle | None = None

    def open(self, settings: NixlSettings) -> None:
        device = self._memory.device
        if self._endpoint is not None:
            if device.type == "cuda":
                bind(device)  # the agent's thread may be another than the one that opened it
            return  # backends and ports of an open endpoint cannot be changed
        self._settings = settings
        if device.type == "cuda":
            self._arrivals = Arrivals(Packer(packing_stream(device)), self._tell, AT_ONCE)
            self._digester = Digester(digesting_stream(device))
            self._eager_seconds = EAGER_SECONDS
        self._endpoint = self._new_endpoint(settings)

    def _new_endpoint(self, settings: NixlSettings) -> NixlEndpoint:
        endpoint = open_endpoint(self._memory.name, settings, self._memory.device)
        endpoint.register(reachable(self._memory.layout))
        endpoint.heard = self._arrivals.heard
        return endpoint

    def reopen(self) -> None:
        if self._endpoint is None or self._settings is None:
            return
        self._endpoint.destroy()
        self._names.clear()
        self._cards.clear()
        self._inflows = {relays: replace(known, fingerprint="") for relays, known in self._inflows.items()}
        self._arrivals.connect(())
        self._endpoint = self._new_endpoint(self._settings)

    def announcement(self) -> tuple[str, bytes]:
        return self._opened.name, self._opened.metadata()

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        memory = self._memory
        known = self._inflows[connect.relays]
        if connect.fingerprint == known.fingerprint:  # a round may be under way, and nothing has changed
            return self._reach(connect.peers)
        berths = [peer.berth for peer in connect.peers]
        loads = as_matrix(connect.copies, COPY_COLUMNS)
        copies = landed(loads, berths)
        # Seconds for hundreds of thousands of rows, and the loop has heartbeats to answer.
        table = await asyncio.to_thread(scatter_table, copies, memory.layout)
        beside = memory.layout.lands == "flip" and await asyncio.to_thread(covers, loads, memory.layout)
        digester = self._digester if beside else None
        edges = await asyncio.to_thread(inbound, loads, connect.peers, memory.layout, memory.tensors, digester)
        if memory is not self._memory:  # experts have moved meanwhile, and another plan follows
            return {}
        scatter = prepare_copy(memory.tensors, memory.tensors, table)
        digest = prepare_digest(memory.tensors, digest_table(copies, memory.layout)) if beside else None
        self._inflows[connect.relays] = _Inflow(connect.fingerprint, copies, scatter, edges, digest)
        if connect.relays == self._relays:
            self._use(connect.relays)
        return self._reach(connect.peers)

    def landed_by(self, fingerprint: str) -> Matrix | None:
        return next((flow.landed for flow in self._inflows.values() if flow.fingerprint == fingerprint), None)

    def _use(self, relays: bool) -> None:
        self._relays, flow = relays, self._inflows[relays]
        self.landed = flow.landed
        self._arrivals.connect(flow.edges)

    def renew(self, memory: TargetMemory) -> None:
        self._memory = memory
        self._inflows = {False: _Inflow(), True: _Inflow()}
        self._use(self._relays)

    def begin(self, round_name: RoundName, relays: bool = False) -> None:
        if relays != self._relays:
            self._use(relays)
        self._arrivals.begin(round_name)

    def end(self, round_name: RoundName) -> None:
        self._arrivals.end(round_name)

    def arrive(self, version: Version) -> None:
        self._arrivals.check()
        self._inflows[self._relays].scatter()
        self._memory.refresh()

    def digest(self) -> Digest | None:
        flow = self._inflows[self._relays]
        if flow.digest is None:
            return None
        found = [edge.digest.result() if edge.digest is not None else None for edge in flow.edges]
        if len(flow.landed):
            found.append(flow.digest())
        return None if None in found else add_digests(*filter(None, found))

    def poll(self) -> None:
        if self._endpoint is None:
            return
        self._endpoint.poll()
        if self._arrivals.turn():
            self._eager_until = time.monotonic() + self._eager_seconds
        if self._next_look is None and self._eager:
            self._next_look = asyncio.get_running_loop().call_soon(self._look)

    @property
    def _eager(self) -> bool:
        return time.monotonic() < self._eager_until

    def _look(self) -> None:
        self._next_look = None
        for _ in range(EAGER_POLLS):
            time.sleep(EAGER_POLL_SECONDS)
            self.poll()
            if not self._eager:
                return

    @property
    def _opened(self) -> NixlEndpoint:
        assert self._endpoint is not None, "open() comes first"
        return self._endpoint

    def _reach(self, peers: Sequence[Peer]) -> dict[Member, Exception]:
        """Be able to tell those whose chunks pass; which of them could not be reached."""
        failed: dict[Member, Exception] = {}
        for peer in peers:
            known = self._names.get(peer.member, peer.endpoint_name)
            if known != peer.endpoint_name:  # another process has taken its place
                self._opened.forget(known)
                self._cards.pop(known, None)
                del self._names[peer.member]
            if peer.berth is None or not peer.berth.passes:
                continue
            try:
                self._opened.connect(peer.endpoint_name, peer.endpoint)
            except NixlError as error:
                failed[peer.member] = error
            else:
                self._names[peer.member] = peer.endpoint_name
                self._cards[peer.endpoint_name] = peer.endpoint
        return failed

    def _tell(self, peer: str, notice: Notice) -> None:
        try:
            self._opened.tell(peer, notice)
        except NixlError:
            if peer not in self._cards:
                raise
            self._opened.forget(peer)  # it has lost its connection, and may have another
            self._opened.connect(peer, self._cards[peer])
            self._opened.tell(peer, notice)


def reachable(layout: Layout) -> Sequence[Region]:
    """What peers may write: of a shadow engine its landing alone."""
    if layout.lands == "live":
        return layout.regions
    return [layout.regions[layout.staging]] if layout.staging >= 0 else []
