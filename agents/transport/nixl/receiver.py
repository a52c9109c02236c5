"""NIXL at an inference rank: peers write into its registered memory; what came packed is scattered afterwards."""

from weightsync.agents.tables.runs import scatter_table
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.open import open_endpoint
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, as_matrix
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
            return  # backends and ports of an open endpoint cannot be changed
        endpoint = open_endpoint(self._memory.name, settings, self._memory.device)
        endpoint.register(self._memory.layout.regions)
        self._endpoint = endpoint

    def announcement(self) -> tuple[str, bytes]:
        assert self._endpoint is not None
        return self._endpoint.name, self._endpoint.metadata()

    async def connect(self, connect: Connect) -> None:
        self._scatter = self._scattering(connect.copies)

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
        table = scatter_table(as_matrix(copies, COPY_COLUMNS), self._memory.layout)
        return prepare_copy(self._memory.tensors, self._memory.tensors, table)
