"""NIXL at an inference rank: peers write into its registered memory; what came packed is scattered afterwards."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from weightsync.agents.tables.cargo import landed
from weightsync.agents.tables.runs import scatter_table
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.open import bind, open_endpoint
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Layout, Matrix, Region, as_matrix
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings
from weightsync.orchestrator.protocol.names import Version

NO_COPIES: Final = np.empty((0, COPY_COLUMNS), np.int64)


class NixlReceiver(Receiver):
    """See ``transport.interface``."""

    lands_beside = True

    def __init__(self, memory: TargetMemory) -> None:
        self._memory = memory
        self.landed: Matrix = NO_COPIES
        self._scatter: Callable[[], None] = _scatter_nothing
        self._endpoint: NixlEndpoint | None = None

    def open(self, settings: NixlSettings) -> None:
        if self._endpoint is not None:
            if self._memory.device.type == "cuda":
                bind(self._memory.device)  # the agent's thread may be another than the one that opened it
            return  # backends and ports of an open endpoint cannot be changed
        endpoint = open_endpoint(self._memory.name, settings, self._memory.device)
        endpoint.register(reachable(self._memory.layout))
        self._endpoint = endpoint

    def announcement(self) -> tuple[str, bytes]:
        assert self._endpoint is not None
        return self._endpoint.name, self._endpoint.metadata()

    async def connect(self, connect: Connect) -> None:
        memory = self._memory
        berths = [peer.berth for peer in connect.peers]
        copies = landed(as_matrix(connect.copies, COPY_COLUMNS), berths)
        # Seconds for hundreds of thousands of rows, and the loop has heartbeats to answer.
        table = await asyncio.to_thread(scatter_table, copies, memory.layout)
        if memory is self._memory:  # else experts have moved meanwhile, and another plan follows
            self.landed, self._scatter = copies, prepare_copy(memory.tensors, memory.tensors, table)

    def renew(self, memory: TargetMemory) -> None:
        self._memory = memory
        self.landed, self._scatter = NO_COPIES, _scatter_nothing

    def arrive(self, version: Version) -> None:
        self._scatter()
        self._memory.refresh()

    def poll(self) -> None:
        if self._endpoint is not None:
            self._endpoint.poll()


def reachable(layout: Layout) -> Sequence[Region]:
    """What peers may write: of a shadow engine its landing alone."""
    return layout.regions if layout.lands == "live" else [layout.regions[layout.staging]]


def _scatter_nothing() -> None:
    """There is no plan."""
