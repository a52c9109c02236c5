"""The weights of one inference rank as a round sees them: live memory, staging, digest, and the way bytes come in."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from weightsync.agents.inference.calls import LiveModel
from weightsync.agents.memory.arena import arena, region_of
from weightsync.agents.tables.runs import digest_table, table_bytes
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.registry import Ends
from weightsync.kernels.digest import prepare as prepare_digest
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.names import Digest, Member, Version


class LiveWeights:
    """One per worker, for as long as it lives.

    Made on the worker's main thread, and so are the calls of ``digest``, ``arrive`` and ``follow_experts``. The agent's
    thread calls ``open``, reads ``layout`` and uses ``receivers``.

    Args:
        model: the live weights.
        device: of the model.
        staging: memory that packed writes land in before they are scattered; empty for none.

    Attributes:
        layout: of the live weights and the staging memory; replaced when experts have moved.
        bytes: that the layout covers and ``digest`` reads.
        receivers: of the transports that were opened.
    """

    def __init__(self, model: LiveModel, device: torch.device, staging: Sequence[torch.Tensor]) -> None:
        self._name = ""
        self._device = device
        self._staging = tuple(staging)
        self.receivers: Ends[Receiver] = Ends(lambda transport: transport.receiver(self._target()))
        self._adopt(model)

    def open(self, member: Member, settings: Any) -> None:
        """Open the transport that a Welcome names; ``member`` is who this rank is to its peers.

        Raises:
            AgentError: it cannot be opened.
        """
        self._name = str(member)
        self.receivers.open(settings)

    def digest(self) -> Digest:
        """Of the live memory over the whole layout. Waits for the device."""
        return self._digest()

    def arrive(self, version: Version) -> None:
        """See ``Receiver.arrive``."""
        self.receivers.current.arrive(version)

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
        self._tensors = (*model.tensors, *self._staging)
        self.layout = _with_staging(model.layout, self._staging)
        table = digest_table(self.layout.matrix(), self.layout)
        self._digest = prepare_digest(self._tensors, table)
        self.bytes = table_bytes(table)

    def _target(self) -> TargetMemory:
        model = self._model
        return TargetMemory(self._name, self._device, self.layout, self._tensors, model.refresh, model.load)


def staging_arenas(size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """One arena of ``size`` bytes on ``device``, or none for 0."""
    if size:
        yield arena(size, device)


def _with_staging(layout: Layout, staging: Sequence[torch.Tensor]) -> Layout:
    if not staging:
        return layout
    regions = (*layout.regions, *map(region_of, staging))
    return msgspec.structs.replace(layout, regions=regions, staging=len(regions) - 1)
