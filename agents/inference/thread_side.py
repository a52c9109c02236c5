"""What an inference rank does on the agent's thread: announce its layout, let bytes come, pass the daemon's word on."""

import logging
from collections.abc import Mapping

import msgspec
from weightsync.agents.inference.lending import Lending
from weightsync.agents.inference.shadow import ShadowRounds
from weightsync.agents.inference.weights import LiveWeights
from weightsync.agents.inference.window import Windows
from weightsync.agents.link.edges import EdgesBeside
from weightsync.agents.link.side import Link
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Commit,
    Connect,
    EngineStatus,
    Expose,
    Fault,
    FromDaemon,
    Grant,
    Hold,
    Holding,
    Left,
    Renew,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName

log = logging.getLogger(__name__)


class InferenceSide:
    """See ``link.side.AgentSide``. All of it runs on the agent's thread."""

    here: Fault = "engine"

    def __init__(
        self,
        link: Link,
        member: Member,
        weights: LiveWeights,
        windows: Windows,
        shadow: ShadowRounds,
        lending: Lending,
    ) -> None:
        self._link = link
        self._member = member
        self._weights = weights
        self._windows = windows
        self._shadow = shadow
        self._lending = lending
        lending.attach(link, member)
        self._relayed = EdgesBeside(link, member, self)

    def status(self) -> EngineStatus:
        return msgspec.structs.replace(self._windows.holdings.status, lending=self._lending.open_rounds)

    def welcomed(self, welcome: Welcome) -> None:
        self._weights.open(self._member, welcome.transport)
        self._lending.welcomed(welcome)

    def announcement(self) -> Announce:
        name, endpoint = self._weights.receivers.current.announcement()
        lends_name, lends = self._lending.announcement()
        return Announce(
            layout=self._weights.layout,
            endpoint_name=name,
            endpoint=endpoint,
            lends_name=lends_name,
            lends=lends,
            spares=self._weights.spares,
        )

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        return await self._weights.connect(connect)

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Connect():
                (self._lending if message.lends else self._relayed).prepare(message)
            case Grant():
                self._lending.granted(message)
            case Abort():
                self._lending.stop(message)
                if message.members:
                    return  # to the writer that it is; else its engine is out of the round
            case Expose():
                self._lending.changes()
            case _:
                pass
        match message:
            case Expose() if self._may_be_written(message.round):
                self._weights.receivers.current.begin(message.round, message.relays)
            case Verify() | Commit() | Abort():  # nobody writes any more, or nobody may
                self._weights.receivers.current.end(message.round)
            case _:
                pass
        match message:
            case Hold():
                status = self._windows.holdings.hold(message.held, message.reason)
                log.warning("%s: %s: %s", self._member, "held" if message.held else "held no longer", message.reason)
                self._link.send(Holding(status=status))
            case Renew():
                self._renew(message)
            case Expose() | Verify() | Commit() | Abort() if self._weights.layout.lands != "live":
                self._shadow.heard(message)
            case Expose() | Verify() | Commit() | Abort():
                changed = self._windows.heard(message)
                if changed is not None:
                    log.warning("%s: round %s: torn no longer; now %s", self._member, message.round, changed)
                    self._link.say_once(Left(round=message.round, status=changed))
            case _:
                pass

    def _renew(self, order: Renew) -> None:
        log.warning("%s: another %s: %s", self._member, "landing" if order.spare else "endpoint", order.reason)
        if not order.spare:
            for receiver in self._weights.receivers:
                receiver.reopen()
        elif self._lending.open_rounds or not self._shadow.gives_up(copied=self._weights.layout.lands == "copy"):
            log.warning("%s: its landing is in use; the daemon will ask again", self._member)
            return
        else:
            self._link.send(Holding(status=self.status()))
            try:
                self._weights.replace_landing()
            except MemoryPlacementError as error:
                log.warning("%s: nothing can take the place of its landing: %s", self._member, error)
                return
            self._lending.renew()
        self._link.announce()

    def _may_be_written(self, name: RoundName) -> bool:
        """Live memory only while the worker stands still for that round."""
        return self._weights.layout.lands != "live" or self._windows.holdings.status.window == name

    def poll(self) -> bool:
        for receiver in self._weights.receivers:
            receiver.poll()
        lends = self._lending.poll()
        return lends or self._windows.holdings.status.window is not None or self._shadow.open

    def shut(self) -> None:
        pass  # receivers outlive a connection: writers may still reach this memory until the process ends
