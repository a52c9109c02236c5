"""What an inference rank does on the agent's thread: announce its layout, let bytes come, pass the daemon's word on."""

from collections.abc import Mapping

from weightsync.agents.inference.weights import LiveWeights
from weightsync.agents.inference.window import Windows
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Commit,
    Connect,
    EngineStatus,
    Fault,
    FromDaemon,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member


class InferenceSide:
    """See ``link.side.AgentSide``. All of it runs on the agent's thread."""

    here: Fault = "engine"

    def __init__(self, member: Member, weights: LiveWeights, windows: Windows) -> None:
        self._member = member
        self._weights = weights
        self._windows = windows

    def status(self) -> EngineStatus:
        return self._windows.status

    def welcomed(self, welcome: Welcome) -> None:
        self._weights.open(self._member, welcome.transport)

    def announcement(self) -> tuple[Layout, str, bytes]:
        return self._weights.layout, *self._weights.receivers.current.announcement()

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        await self._weights.receivers.current.connect(connect)
        return {}

    def heard(self, message: FromDaemon) -> None:
        if isinstance(message, Verify | Commit | Abort):
            self._windows.heard(message)

    def poll(self) -> bool:
        for receiver in self._weights.receivers:
            receiver.poll()
        return self._windows.status.window is not None

    def shut(self) -> None:
        pass  # receivers outlive a connection: writers may still reach this memory until the process ends
