"""NIXL at an inference rank: peers write into its registered memory; what came packed is scattered afterwards."""

import asyncio

from weightsync.agents.tables.runs import scatter_table
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.open import bind, open_endpoint
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Matrix, as_matrix
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings
from weightsync.orchestrator.protocol.names import Version

NO_COPIES = b""


class NixlReceiver(Receiver):
    """See ``transport.interface``."""

    def __init__(self, memory: TargetMemory) -> None:
        self._memory = memory
        self._scatter = self._scattering(NO_COPIES)
        self._endpoint: NixlEndpoint | None = None

    def open(self, settings: NixlSettings) -> None:
        if self._endpoint is not None:
            if self._memory.device.type == "cuda":
                bind(self._memory.device)  # the agent's thread may be another than the one that opened it
            return  # backends and ports of an open endpoint cannot be changed
        endpoint = open_endpoint(self._memory.name, settings, self._memory.device)
        endpoint.register(self._memory.layout.regions)
        self._endpoint = endpoint

    def announcement(self) -> tuple[str, bytes]:
        assert self._endpoint is not None
        return self._endpoint.name, self._endpoint.metadata()

    async def connect(self, connect: Connect) -> None:
        memory = self._memory
        # Seconds for hundreds of thousands of rows, and the loop has heartbeats to answer.
        table = await asyncio.to_thread(_scatter_table, connect.copies, memory)
        if memory is self._memory:  # else experts have moved meanwhile, and another plan follows
            self._scatter = prepare_copy(memory.tensors, memory.tensors, table)

    def renew(self, memory: TargetMemory) -> None:
        self._memory = memory
        self._scatter = self._scattering(NO_COPIES)

    def arrive(self, version: Version) -> None:
        self._scatter()
        self._memory.refresh()

    def poll(self) -> None:
        if self._endpoint is not None:
            self._endpoint.poll()

    def _scattering(self, copies: bytes) -> PreparedCopy:
        return prepare_copy(self._memory.tensors, self._memory.tensors, _scatter_table(copies, self._memory))


def _scatter_table(copies: bytes, memory: TargetMemory) -> Matrix:
    return scatter_table(as_matrix(copies, COPY_COLUMNS), memory.layout)
