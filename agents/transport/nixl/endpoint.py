"""NixlEndpoint: one NIXL agent of ours, its registered memory, its peers, and the writes to them.

One thread owns an endpoint and makes every call on it; with device memory, the thread whose current CUDA device is that
memory's. Facts of NIXL 1.5 that shape it: posting to a peer on the same host blocks for the copy; nothing tells when a
transfer ends but asking; a target that never polls keeps its writers waiting; a stopped peer leaves a transfer in
progress for ever; a posted transfer cannot be taken back; and adding and removing a live peer leaks descriptors, so
connections are kept.
"""

import mmap
import os
import secrets
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
from weightsync.agents.link.introduction import boot
from weightsync.agents.memory.quarantine import keep
from weightsync.agents.memory.reach import check_reachable
from weightsync.agents.tables.runs import RUN_COLUMNS
from weightsync.agents.transport.nixl import card as nixl_card
from weightsync.agents.transport.nixl import edge as nixl_edge
from weightsync.agents.transport.nixl.cargo import Cargo
from weightsync.agents.transport.nixl.chunks import lanes
from weightsync.agents.transport.nixl.edge import Describe, Edge, EdgeResult
from weightsync.agents.transport.nixl.errors import ConnectError, NixlError
from weightsync.agents.transport.nixl.flow import Loading
from weightsync.agents.transport.nixl.loader import Bindings, connecting, environment, load, only_networks
from weightsync.agents.transport.nixl.notices import Notice, decode, encode
from weightsync.agents.transport.nixl.regions import check_regions, warn_without_gpu_direct
from weightsync.agents.transport.nixl.write import Ended, Writer
from weightsync.agents.transport.ucx import UcxConnections, Way
from weightsync.orchestrator.protocol.layout import Matrix, Region
from weightsync.orchestrator.protocol.messages import NixlSettings

SCRATCH_BYTES: Final = mmap.PAGESIZE
WARM_UP_BYTES: Final = 8
"""One word: enough to make UCX wire the connection up, which ``make_connection`` alone does not."""


class NixlEndpoint:
    """This process's end of the data plane.

    Args:
        name: who this is, for people; the NIXL name (``.name``) adds a random part, because NIXL refuses a
            restarted peer under its old name.
        settings: backends, window, rails, and the rate that is not believed.
        net_devices: UCX's network devices, such as ``mlx5_0:1`` (see ``weightsync.agents.memory.nic``); None leaves
            UCX's choice.
        gpu: unique name of the GPU whose memory is read and written; empty for host memory.
        variables: further environment for the making of the agent only; None unsets.
        progress_thread: NIXL's own polling thread. It burns a core while idle, so off.
        bindings: another NIXL than ``load()`` finds.

    Attributes:
        heard: called with what peers tell, in ``poll`` and while something is written.

    Raises:
        NixlMissingError: NIXL is not installed.
        NixlError: the agent or its backends cannot be made.
    """

    def __init__(
        self,
        name: str,
        settings: NixlSettings,
        *,
        net_devices: str | None = None,
        gpu: str = "",
        variables: Mapping[str, str | None] | None = None,
        progress_thread: bool = False,
        bindings: Bindings | None = None,
    ) -> None:
        self.rank = name
        self.name = f"{name}-{secrets.token_hex(8)}"
        self._settings = settings
        self._by_nic = net_devices is not None
        self._gpu = gpu
        self._bindings = bindings or load()
        made: dict[str, str | None] = {"UCX_MAX_RMA_RAILS": str(settings.rails)}
        if net_devices is not None:
            made["UCX_NET_DEVICES"] = net_devices
        with environment(made | dict(variables or {})):
            self._over_networks = only_networks(os.environ.get("UCX_TLS", ""))
            with environment(connecting(os.environ)):
                self._agent: Any = self._bindings.agent(
                    self.name, backends=settings.backends, progress_thread=progress_thread, threads=0
                )
        self._registrations: list[Any] = []
        self._regions: list[Region] = []
        self._peers: dict[str, bytes] = {}
        self._ucx = UcxConnections(self.name, gpu)
        self._edges: list[Edge] = []
        self._orphans: list[Edge] = []
        self._words: dict[str, Edge] = {}
        """The edge to each peer's scratch memory, for the first word."""
        self._warm: set[str] = set()
        """Peers that have taken it."""
        self._writers: list[Writer] = []
        """Writes of which some edge is not over."""
        self.heard: Callable[[str, Notice], None] = lambda peer, notice: None
        self._scratch_memory = mmap.mmap(-1, SCRATCH_BYTES)
        address = np.frombuffer(self._scratch_memory, dtype=np.uint8).ctypes.data
        self._scratch = Region(int(address), SCRATCH_BYTES)
        self.register([self._scratch])

    # ------------------------------------------------------------------------------------------ memory and peers
    def register(self, regions: Sequence[Region]) -> None:
        """Let peers write here. Cheap for a few arenas, seconds for thousands of tensors.

        Raises:
            RegionError: a range is empty, overlaps another, or is not mapped.
            MemoryPlacementError: device memory that no other process or NIC can map.
            NixlError: NIXL cannot pin the range for its transports.
        """
        check_regions(regions, self._regions)
        check_reachable(regions)
        if self._by_nic:
            warn_without_gpu_direct(self.rank, regions)
        for memory in ("DRAM", "VRAM"):
            chosen = [r for r in regions if r.memory == memory]
            if not chosen:
                continue
            table = np.array([(r.base, r.length, r.device) for r in chosen], dtype=np.uint64)
            try:
                self._registrations.append(self._agent.register_memory(table, memory))
            except self._bindings.errors as error:
                raise NixlError(f"{self.rank}: NIXL cannot register {len(chosen)} {memory} ranges: {error}") from error
            self._regions += chosen

    def metadata(self) -> bytes:
        """What a peer's ``connect`` needs. Take it after ``register``; each region adds about 44 bytes."""
        said = self._agent.get_agent_metadata()
        return nixl_card.seal(nixl_card.Card(nixl_card.SCHEMA, self.name, self._scratch, said, self._gpu, boot=boot()))

    def connect(self, peer_name: str, metadata: bytes) -> None:
        """Learn how to reach a peer. The same metadata again does nothing; newer metadata of a live peer adds its
        new regions. What fails leaves nothing of a peer that was not connected. One whose address does not answer costs
        no time here: it does not take the first word (``warm``).

        Raises:
            MetadataError: the metadata is torn or another peer's; nothing has changed.
            ConnectError: NIXL does not take it: the peer is out of reach, say, or of another backend.
        """
        if self._peers.get(peer_name) == metadata:
            return
        card = nixl_card.unseal(metadata, peer_name)
        known, before = peer_name in self._peers, self._ucx.endpoints()
        failures: tuple[type[Exception], ...] = (NixlError, *self._bindings.errors)
        try:
            self._agent.add_remote_agent(card.metadata)
            self._peers[peer_name] = metadata
            if not known:
                word = np.array([[0, 0, 0, 0, 0, WARM_UP_BYTES]], dtype=np.int64)
                self._words[peer_name] = self._make_edge(
                    peer_name, [self._scratch], [card.scratch], word, lambda region, offset: "the first word"
                )
                self._ucx.joined(peer_name, card.gpu, before)
        except failures as error:
            if not known:
                self._remove(peer_name)
            raise ConnectError(f"{self.rank}: NIXL does not take the metadata of {peer_name}: {error}") from error

    def is_replaced(self, peer_name: str, other_name: str, other: bytes) -> bool:
        """Whether nothing can arrive any more of what is in flight to ``peer_name``, now that its member has
        ``other_name`` with the metadata ``other``: see ``card.replaces``. Raises MetadataError as ``connect``."""
        known, new = self._peers.get(peer_name), nixl_card.unseal(other, other_name)
        old = nixl_card.unseal(known, peer_name) if known is not None else None
        return old is None or nixl_card.replaces(new, old, boot=boot(), over_networks=self._over_networks)

    def warm(self, peer_name: str) -> bool:
        """Whether a connected peer has taken the first word, which is posted when this is asked first: into its scratch
        memory, so that the first round does not pay for the wiring. The peer must poll meanwhile.

        Raises:
            TransferError: it will not be taken. Only a new connection, after ``forget``, can be tried.
            NixlError: unknown peer.
        """
        if peer_name in self._warm:
            return True
        if peer_name not in self._words:
            raise NixlError(f"{self.rank}: {peer_name} is not connected")
        state, cause = self._probe(peer_name)
        if state == "ERR":
            kind, reason, fault = nixl_edge.refusal(cause, self._bindings)
            raise kind(
                reason, rank=self.rank, peer=peer_name, tensor="the first word", bytes_done=0, fault=fault, retry=True
            ) from cause
        if state == "DONE":
            self._warm.add(peer_name)
        return state == "DONE"

    def way_to(self, peer_name: str) -> Way:
        """What writes to a peer that has taken the first word go by."""
        return self._ucx.way_to(peer_name)

    def forget(self, peer_name: str) -> None:
        """Drop a peer that is gone, with its edges and whatever is in flight to it. For a live peer this leaks two
        descriptors on both sides, so keep those. Unknown names are ignored."""
        for writer in self._writers:
            writer.forget(peer_name)
        for edge in self._edges_to(peer_name):
            nixl_edge.release(edge, self._bindings.errors)
        self._edges = [edge for edge in self._edges if edge.peer != peer_name]
        self._orphans = [edge for edge in self._orphans if edge.peer != peer_name]
        if peer_name in self._peers:
            self._remove(peer_name)

    # -------------------------------------------------------------------------------------------------- writing
    def prepare_edge(
        self,
        peer_name: str,
        local_regions: Sequence[Region],
        remote_regions: Sequence[Region],
        runs: Matrix,
        *,
        cargo: Cargo | None = None,
        describe: Describe | None = None,
        chunk_bytes: int | None = None,
    ) -> Edge:
        """Prepare all transfers to one peer, once for all rounds.

        Args:
            peer_name: a connected peer.
            local_regions: registered here, as the runs number them.
            remote_regions: registered there, likewise.
            runs: int64 ``[n, 6]`` as from ``tables.runs``; the peer column is ignored.
            cargo: what is packed anew, or sent chunk by chunk, in every round; None: nothing.
            describe: names the tensor at (local region, local offset), see ``tables.tensor_names``.
            chunk_bytes: bytes per handle; None for a default by kind of memory.

        Raises:
            EdgeError: a run outside its regions.
            NixlError: unknown peer, or memory that is not registered on either side.
        """
        runs = np.ascontiguousarray(runs, dtype=np.int64).reshape(-1, RUN_COLUMNS)
        names = describe or (lambda region, offset: f"region {region} byte {offset}")
        edge = self._make_edge(peer_name, local_regions, remote_regions, runs, names, chunk_bytes)
        edge.cargo = cargo
        self._edges.append(edge)
        return edge

    def release_edge(self, edge: Edge) -> None:
        """Give back an edge that is no longer planned. Its peer stays connected. A tainted edge is kept until its
        transfers have ended or the peer is forgotten."""
        self._edges = [kept for kept in self._edges if kept is not edge]
        if edge.tainted:
            self._orphans.append(edge)
        else:
            nixl_edge.release(edge, self._bindings.errors)

    async def write(
        self,
        edges: Sequence[Edge],
        *,
        loading: Loading | None = None,
        in_flight_per_peer: int | None = None,
        deadline_seconds: float,
        ended: Ended = lambda result: None,
    ) -> list[EdgeResult]:
        """Write all bytes of the edges once.

        Args:
            edges: of any peers, each at most once.
            loading: what their cargo takes; None if no edge has any.
            in_flight_per_peer: handles in flight per edge; None for the setting.
            deadline_seconds: for everything together. Transfers still in flight then stay so: NIXL cannot cancel, and
                their peer is in ``tainted_peers`` until they end or it is forgotten.
            ended: told once of each edge, when nothing of it is in flight any more: during the write, or from ``poll``
                or ``forget`` for one that was given up.

        Returns:
            One result per edge, in their order, as it stands when nothing more is posted. A peer's failure is its
            result's ``error`` and no one else's.
        """
        writer = Writer(
            self.rank,
            self._agent,
            self._bindings,
            in_flight=in_flight_per_peer or self._settings.in_flight_per_peer,
            deadline=time.monotonic() + deadline_seconds,
            ended=ended,
            loading=loading,
            listen=self._listen,
            probe=self._probe,
            max_gb_per_second=self._settings.max_gb_per_second,
            stall_seconds=self._settings.stall_seconds,
        )
        self._writers.append(writer)
        return await writer.write(edges)

    def stop(self, peers: Collection[str], reason: str) -> None:
        """Post nothing more to ``peers`` in the writes under way; what is in flight to them is waited for."""
        for writer in self._writers:
            writer.stop(peers, reason)

    def poll(self) -> None:
        """Let NIXL work: answers peers that write here (they never see DONE otherwise), and notices when a transfer
        that outlived its write ends after all. Call it every millisecond or two while a grant is open."""
        if self._agent is None:
            return
        self._listen()
        for writer in self._writers:
            writer.settle()
        self._writers = [writer for writer in self._writers if not writer.over]
        for edge in [orphan for orphan in self._orphans if not orphan.tainted]:
            self.release_edge(edge)
            self._orphans.remove(edge)

    def tell(self, peer_name: str, notice: Notice) -> None:
        """Tell a connected peer, which hears it when it polls; for one that is gone there is nobody to tell.

        Raises:
            NixlError: unknown peer, or NIXL does not take it.
        """
        if peer_name not in self._peers:
            raise NixlError(f"{self.rank}: {peer_name} is not connected")
        try:
            self._agent.send_notif(peer_name, encode(notice))
        except self._bindings.errors as error:
            raise NixlError(f"{self.rank}: NIXL cannot tell {peer_name} of a chunk: {error}") from error

    @property
    def tainted_peers(self) -> Mapping[str, str]:
        """Peers into whose memory a write may still land although it was given up, with the reason. Neither the bytes
        it reads here nor those it writes there may be reused until the peer leaves this list or is fenced."""
        return {left.edge.peer: str(left.error) for writer in self._writers for left in writer.left()}

    def close(self) -> None:
        """Give everything back; again does nothing. The caller has made sure that no peer still writes here: NIXL's
        CPU transports do not fence what is deregistered."""
        if self._agent is None:
            return
        for edge in (*self._edges, *self._orphans, *self._words.values()):
            nixl_edge.release(edge, self._bindings.errors)
        self._edges, self._orphans, self._writers = [], [], []
        for peer in list(self._peers):
            self._remove(peer)
        for registration in self._registrations:
            self._agent.deregister_memory(registration)
        self._registrations, self._regions = [], []
        self._agent = None

    def destroy(self) -> None:
        """Close, and be sure that NIXL's agent is gone with all its connections: what comes for it is dropped. Raises
        NixlError if something keeps it."""
        agent = weakref.ref(self._agent) if self._agent is not None else None
        self.close()
        keep(self._scratch_memory)
        if agent is not None and agent() is not None:
            raise NixlError(f"{self.rank}: the endpoint {self.name} cannot be destroyed: something keeps it")

    # ------------------------------------------------------------------------------------------------- internals
    def _make_edge(
        self,
        peer_name: str,
        local: Sequence[Region],
        remote: Sequence[Region],
        runs: Matrix,
        describe: Describe,
        chunk_bytes: int | None = None,
    ) -> Edge:
        if peer_name not in self._peers:
            raise NixlError(f"{self.rank}: {peer_name} is not connected")
        edge = Edge(peer_name, lanes(runs, local, remote, chunk_bytes), describe)
        try:
            nixl_edge.build(edge, self._agent)
        except self._bindings.errors as error:
            nixl_edge.release(edge, self._bindings.errors)
            raise NixlError(
                f"{self.rank}: NIXL cannot prepare {len(runs)} writes to {peer_name}; is all of their memory"
                f" registered on both sides? ({error})"
            ) from error
        return edge

    def _listen(self) -> None:
        for peer, messages in self._agent.get_new_notifs().items():
            for message in messages:
                notice = decode(message)
                if notice is not None:
                    self.heard(peer, notice)

    def _probe(self, peer_name: str) -> tuple[nixl_edge.State, Exception | None]:
        """How a word to a peer's scratch memory stands, posted anew if the last one has arrived."""
        [word] = self._words[peer_name].transfers
        return (nixl_edge.ask if word.pending else nixl_edge.post)(word, self._agent, self._bindings)

    def _remove(self, peer_name: str) -> None:
        self._words.pop(peer_name, None)
        self._warm.discard(peer_name)
        self._peers.pop(peer_name, None)
        self._ucx.left(peer_name)
        with suppress(*self._bindings.errors):  # gone already is what was asked for
            self._agent.remove_remote_agent(peer_name)

    def _edges_to(self, peer: str) -> list[Edge]:
        return [edge for edge in (*self._edges, *self._orphans, *self._words.values()) if edge.peer == peer]
