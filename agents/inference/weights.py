"""The weights of one inference rank as a round sees them: live memory, what lands beside it, and how bytes come in."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.inference.calls import LiveModel, PagedModel
from weightsync.agents.inference.samples import Samples
from weightsync.agents.inference.shadow import Superseded
from weightsync.agents.memory.arena import arena, region_of
from weightsync.agents.memory.errors import FlipFailed, MemoryPlacementError
from weightsync.agents.memory.quarantine import quarantine, room, spare
from weightsync.agents.tables.runs import digest_table, scatter_table, table_bytes
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.registry import Ends
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.kernels.digest import PreparedDigest
from weightsync.kernels.digest import prepare as prepare_digest
from weightsync.orchestrator.protocol.landing import landed_layout
from weightsync.orchestrator.protocol.layout import Lands, Layout, Matrix
from weightsync.orchestrator.protocol.limits import MAX_LANDS_CHARS
from weightsync.orchestrator.protocol.messages import Connect, Fault
from weightsync.orchestrator.protocol.names import Digest, Member, Version
from weightsync.orchestrator.protocol.text import clean

COPY_PAUSE_SECONDS: Final = 0.001
"""Between two parts of an audit that the round waits for: a step of the engine comes in between."""
FLIP_PAUSE_SECONDS: Final = 0.004
"""And of one that nobody waits for, and between a flip and what follows it: no step meets two of them, the first none.
Nothing was prepared for that step, so clients wait for all that keeps it from the driver or the interpreter."""

READ_IN_PLACE: Final = "by this transport versions are read into the weights of a paused engine"


class NotLanded(AgentError):
    """What has landed is not all that this rank needs. The plan's or a writer's fault; another attempt may do."""

    fault: Fault = "daemon"
    retry = True


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What lands by one plan: its ``copies`` in the landing, their digest there, and the way to their rows.

    A plan may be replaced between the digest and the switch, after a restart of the daemon for one; what has landed by
    the one before stays where that says.
    """

    copies: Matrix
    digest: PreparedDigest
    scatter: PreparedCopy


class LiveWeights:
    """One per worker, for as long as it lives; ``inference.shadow.Landed`` of it.

    Made on the worker's main thread, and so are the calls of ``arrive``, ``take`` and ``follow_experts``. The agent's
    thread calls ``open`` and ``connect``, reads ``layout`` and uses ``receivers``; a thread beside calls ``landed`` and
    ``shown``, and it or another one ``audit``.

    Args:
        model: the live weights; a PagedModel where it ``lands`` by ``flip``.
        device: of the model.
        landing: memory that writers reach; empty for none.
        lands: how a version lands, by a transport that can do that.
        boundary: whether the weights may change between two steps of the engine.
        why: it lands so, for people.

    Attributes:
        layout: of the live weights and the landing memory; replaced when experts have moved.
        bytes: that the layout covers and ``digest`` reads.
        receivers: of the transports that were opened.
    """

    def __init__(
        self,
        model: LiveModel,
        device: torch.device,
        landing: Sequence[torch.Tensor],
        lands: Lands = "live",
        boundary: bool = True,
        why: str = "",
    ) -> None:
        self._name = ""
        self._device = device
        self._landing = tuple(landing)
        self._lands, self._boundary = lands, boundary
        self._why = clean(why, MAX_LANDS_CHARS)
        self.receivers: Ends[Receiver] = Ends(lambda transport: transport.receiver(self._target()))
        self.layout: Layout
        self.bytes: int
        self._known: _Arrival | None
        self._arrival: _Arrival | None
        self._standby_digest: PreparedDigest | None
        self._both: Samples | None
        """Of standby and what is served."""
        self._digesting = threading.Lock()
        """By who uses ``_digest``."""
        self._changing = threading.Lock()
        """By who exchanges pages, and who launches what reads served ones meanwhile."""
        self._flips = 0
        self._adopt(model)

    def standby(self, landed: str) -> tuple[Layout, Sequence[torch.Tensor]]:
        """Where a version lies beside live memory once it is verified: its layout, and the tensors of its regions.

        Args:
            landed: fingerprint of the Connect by which it came.

        Raises:
            AgentError: nothing stays beside live memory, or it came by another Connect.
        """
        if self.layout.lands == "flip":
            return self.layout, self._written()
        copies = self.receivers.current.landed_by(landed)
        if self.layout.lands != "copy" or copies is None:
            raise NotLanded(f"this rank lands {self.layout.lands} by no plan {landed[:12]}: it has nothing to relay")
        return landed_layout(self.layout, copies), self._tensors

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """Uint8 views of the layout's regions: what is served, and the landing."""
        return self._tensors

    @property
    def cuda_device(self) -> int | None:
        """Index of the device that they are on; None: host memory. On the worker's main thread, whose device is set."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def open(self, member: Member, settings: Any) -> None:
        """Open the transport that a Welcome names; ``member`` is who this rank is to its peers.

        Raises:
            AgentError: it cannot be opened.
        """
        self._name = str(member)
        self.receivers.open(settings)
        if self.receivers.current.lands_beside or self._lands == "live":
            lands, why = self._lands, self._why
        else:
            lands, why = "live", READ_IN_PLACE
        self.layout = msgspec.structs.replace(self.layout, lands=lands, lands_because=why)

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        """See ``Receiver.connect``."""
        return await self.receivers.current.connect(connect)

    @property
    def spares(self) -> int:
        """How often other memory can take the place of the landing, where nothing else can be written to; of a GPU's
        only while enough of it is free."""
        return room() if self._landing and self.layout.lands != "live" else 0

    def replace_landing(self) -> None:
        """Other memory takes the place of the landing, and what was registered is reached by nobody; on the agent's
        thread, while nothing lands or lies there that is of use.

        Raises:
            MemoryPlacementError: there is no spare, or no room for one; nothing was changed.
            AgentError: the transport cannot be reached by another endpoint.
        """
        if not self.spares:
            raise MemoryPlacementError(
                f"no other memory can take the place of the landing ({self.layout.lands}, {self._device})"
            )
        left = self._landing
        self._landing = tuple(spare(memory.numel(), self._device) for memory in left)
        self._tensors = (*self._model.tensors, *self._landing)
        kept = self.layout.regions[: -len(left)]
        self.layout = msgspec.structs.replace(self.layout, regions=(*kept, *map(region_of, self._landing)))
        self._known = self._arrival = None
        try:
            for receiver in self.receivers:
                receiver.renew(self._target())
                receiver.reopen()
        finally:  # else it would be freed for others, and late writers reach it all the same
            for memory in left:
                quarantine(memory)

    def digest(self) -> Digest:
        """Of the live memory over the whole layout. Waits for the device."""
        with self._digesting:
            return self._digest()

    def digest_anew(self) -> Digest:
        """As ``digest``, by means of its own: also while another thread is inside that one."""
        return prepare_digest(self._tensors, self._table)()

    def arrive(self, version: Version) -> None:
        """See ``Receiver.arrive``."""
        self.receivers.current.arrive(version)

    # ------------------------------------------------------------------------------------------- beside live memory
    @property
    def swaps(self) -> bool:
        """See ``Landed.swaps``."""
        return self._lands == "flip"

    @property
    def restless(self) -> bool:
        """See ``Landed.restless``: the load balancer of experts does, in steps of its own choice."""
        return bool(self.layout.expert_map)

    def landed(self, version: Version) -> Digest:
        """See ``Landed.landed``.

        Raises:
            NotLanded: less than all of ``version`` is there.
            AgentError: the engine reads other memory than what the version would be served from.
        """
        self.check()  # here too, where nothing is decided yet
        if self.swaps:
            self.arrive(version)  # what has not passed the landing is brought to standby, too
            found = self.receivers.current.digest()
            if found is None:
                found = _in_parts(self._standby())
            self._samples().take()
            return found
        self._arrival = None
        arrival = self._landed()
        digest = _in_parts(arrival.digest)
        self._arrival = arrival
        return digest

    def take(self, version: Version) -> None:
        """See ``Landed.take``."""
        model = self._model
        if self.swaps and isinstance(model, PagedModel):
            self._flip(model)
            model.refresh()
            return
        assert self._arrival is not None, "only what was digested is taken"
        self._arrival.scatter()
        model.refresh()

    def _flip(self, model: PagedModel) -> None:
        with self._changing:
            self._flips += 1
            try:
                model.flip()
            except FlipFailed:
                self._flips -= 1
                raise
        self._samples().exchange()

    def settle(self) -> None:
        """See ``Landed.settle``."""
        model = self._model
        if self.swaps and isinstance(model, PagedModel):
            time.sleep(FLIP_PAUSE_SECONDS)
            with self._changing:
                model.settle()

    def shown(self) -> bool:
        """See ``Landed.shown``."""
        return self._samples().agree()

    def audit(self) -> Digest:
        """See ``Landed.audit``.

        Raises:
            Superseded: pages were exchanged or experts moved meanwhile.
        """
        model, known, digest = self._model, self.layout.expert_map, self._digest
        with self._digesting:
            flips, pause = self._flips, FLIP_PAUSE_SECONDS if self.swaps else COPY_PAUSE_SECONDS
            for part in range(digest.parts):
                if part:
                    digest.wait()
                    time.sleep(pause)
                with self._changing:
                    if self._flips != flips:
                        raise Superseded("the weights that were audited are served no more")
                    digest.launch(part)
            found = digest.result()
        if self.swaps and known and model.rebalanced(known) is not None:
            raise Superseded("experts have moved since the switch")
        return found

    def _landed(self) -> "_Arrival":
        copies, known = self.receivers.current.landed, self._known
        if known is None or known.copies is not copies:
            table = digest_table(copies, self.layout, landed=True)
            if (found := table_bytes(table)) != self.bytes:
                raise NotLanded(f"{found} bytes land by the present plan, and this rank has {self.bytes}")
            scatter = prepare_copy(self._tensors, self._tensors, scatter_table(copies, self.layout))
            self._known = known = _Arrival(copies, prepare_digest(self._tensors, table), scatter)
        return known

    def _standby(self) -> PreparedDigest:
        if self._standby_digest is None:
            self._standby_digest = prepare_digest(self._written(), self._table)
        return self._standby_digest

    def _samples(self) -> Samples:
        if self._both is None:
            self._both = Samples(self._tensors, self._written(), self._table)
        return self._both

    def check(self) -> None:
        """See ``LiveModel.check``."""
        self._model.check()

    # ------------------------------------------------------------------------------------------------------ internals
    def follow_experts(self) -> bool:
        """Take the model's layout anew if experts have moved; whether they had."""
        known = self.layout.expert_map
        fresh = self._model.rebalanced(known) if known else None
        if fresh is None:
            return False
        self._adopt(fresh)
        for receiver in self.receivers:
            receiver.renew(self._target())
        return True

    def _adopt(self, model: LiveModel) -> None:
        self._model = model
        self._tensors = (*model.tensors, *self._landing)
        layout = msgspec.structs.replace(
            model.layout, lands=self._lands, boundary=self._boundary, lands_because=self._why
        )
        self.layout = _with_landing(layout, self._landing)
        self._table = digest_table(self.layout.matrix(), self.layout)
        """Of all that rounds write, for digests; whatever lies in the landing."""
        self._digest = prepare_digest(self._tensors, self._table)
        self._known = self._arrival = self._standby_digest = self._both = None
        self.bytes = table_bytes(self._table)

    def _written(self) -> tuple[torch.Tensor, ...]:
        """What a transport brings bytes to: live memory, or the standby pages."""
        model = self._model
        if self.swaps and isinstance(model, PagedModel):
            return (*model.standby_tensors, *self._landing)
        return self._tensors

    def _refresh(self) -> None:
        self._model.check()
        self._model.refresh()

    def _target(self) -> TargetMemory:
        model = self._model
        refresh = _nothing if self.swaps else self._refresh  # of standby nothing is derived; ``take`` refreshes
        return TargetMemory(self._name, self._device, self.layout, self._written(), refresh, model.load)


def _in_parts(digest: PreparedDigest) -> Digest:
    """One part after the other: between two of them a batch comes in that needs whole multiprocessors."""
    for part in range(digest.parts):
        digest.launch(part)
        digest.wait()
    return digest.result()


def _nothing() -> None:
    """See its use."""


def landing_arenas(size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """One arena of ``size`` bytes on ``device``, or none for 0."""
    return (arena(size, device),) if size else ()


def _with_landing(layout: Layout, landing: Sequence[torch.Tensor]) -> Layout:
    if not landing:
        return layout
    regions = (*layout.regions, *map(region_of, landing))
    return msgspec.structs.replace(layout, regions=regions, staging=len(regions) - 1)
