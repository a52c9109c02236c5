"""What a trainer rank does on the agent's thread: announce its slots, connect its edges, write when granted."""

import asyncio
import logging
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.slots.slots import ARENA_REGION, TrainerSlots
from weightsync.agents.transport.filesystem import save_checkpoint_part
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.open import open_endpoint
from weightsync.agents.transport.nixl.sender import TransportPlan
from weightsync.orchestrator.protocol.codec import cut
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Closed,
    Connect,
    Fault,
    FilesystemSettings,
    FromDaemon,
    Grant,
    NixlSettings,
    Outcome,
    PeerTransfer,
    Staged,
    TrainerStatus,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version

if TYPE_CHECKING:
    from weightsync.agents.link.thread import Agent

log = logging.getLogger(__name__)

NO_FAULT: Final[Fault] = ""

IN_FLIGHT_POLL_SECONDS: Final = 0.005
"""Short beside a round: once a peer that is gone is forgotten, the next grant must not find this one open."""


class TrainerBody:
    """See ``agents.agent.Body``. ``prepare`` alone runs on the trainer's thread, while nothing is granted."""

    agent: "Agent"

    def __init__(self, member: Member, slots: TrainerSlots, run_dir: Path) -> None:
        self._member, self._slots, self._run_dir = member, slots, run_dir
        self._plan = TransportPlan(slots)
        self._endpoint: NixlEndpoint | None = None
        self._saves = False
        self._staged: Version | None = None
        self._open: RoundName | None = None
        self._outcome: Future[int] | None = None
        self._digests: tuple[str, Version, dict[Member, Digest]] | None = None
        self.timings = (0.0, 0.0)

    # ------------------------------------------------------------------------------------------ for ``TrainerAgent``
    def claim(self) -> bool:
        """Take the slots for the next version; false while something is written from them."""
        if self._open is not None or (self._endpoint is not None and self._endpoint.tainted_peers):
            return False
        self._staged = None
        return True

    def prepare(self, version: Version) -> None:
        """Before STAGED: digest what will be sent, as far as edges are known; save it where files are the wire."""
        self._digest(version)
        if self._saves:
            save_checkpoint_part(self._run_dir / "broadcasts" / f"step_{version.step}", self._slots)

    def staged(self, version: Version) -> "Future[int]":
        """Tell the daemon; the future is the version's fate."""
        self._staged = version
        self._outcome = Future()
        self.agent.send(self._report(version))
        return self._outcome

    def _report(self, version: Version) -> Staged:
        convert, digest = self.timings
        size = self._slots.arenas[ARENA_REGION].numel()
        return Staged(version=version, bytes=size, convert_seconds=convert, digest_seconds=digest)

    # ------------------------------------------------------------------------------------------ ``agents.agent.Body``
    def status(self) -> TrainerStatus:
        return TrainerStatus(staged=self._staged, open_round=self._open)

    def welcomed(self, welcome: Welcome) -> None:
        self._saves = isinstance(welcome.transport, FilesystemSettings)
        if isinstance(welcome.transport, NixlSettings) and self._endpoint is None:
            device = self._slots.arenas[0].device
            self._endpoint = open_endpoint(str(self._member), welcome.transport, device)
            self._plan.register(self._endpoint)

    def announcement(self) -> tuple[Layout, str, bytes]:
        if self._endpoint is None:
            return self._slots.layout, "", b""
        return self._slots.layout, self._endpoint.name, self._endpoint.metadata()

    async def connect(self, connect: Connect) -> None:
        await self._plan.connect(connect)

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Grant():
                self.agent.spawn(self._write(message))
            case Outcome():
                self._settle(message)
            case _:
                pass  # Abort: what was posted cannot be taken back; CLOSED follows when it is DONE

    def poll(self) -> bool:
        if self._endpoint is not None:
            self._endpoint.poll()
        return self._open is not None

    def shut(self) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(PublishError("the agent was closed before the version was committed"))
        if self._endpoint is not None:
            self._endpoint.close()

    # ------------------------------------------------------------------------------------------------------- a grant
    async def _write(self, grant: Grant) -> None:
        objection = self._objection(grant)
        if objection:
            self.agent.send(Closed(round=grant.round, error=objection, fault="trainer"))
            return
        self._open = grant.round
        peers: tuple[PeerTransfer, ...] = ()
        error, fault = "", NO_FAULT
        try:
            peers = await self._push(grant)
        except RuntimeError as trouble:
            log.warning("%s: round %s: %s", self._member, grant.round, trouble)
            error, fault = cut(str(trouble)), getattr(trouble, "fault", "network")
            peers = getattr(trouble, "transfers", ())
        except Exception as bug:
            log.exception("%s: round %s", self._member, grant.round)
            error, fault = cut(repr(bug)), "trainer"
        await self._until_nothing_is_in_flight()
        self._open = None
        self.agent.send(Closed(round=grant.round, peers=peers, error=error, fault=fault))

    def _objection(self, grant: Grant) -> str:
        if grant.round.epoch != self.agent.epoch:
            return f"grant of epoch {grant.round.epoch}; this agent obeys epoch {self.agent.epoch}"
        if grant.fingerprint != self._plan.fingerprint:
            return (
                f"grant for the edges {grant.fingerprint[:12]}; this rank has {self._plan.fingerprint[:12] or 'none'}"
            )
        if self._open is not None:
            return f"round {self._open} is still being written"
        if self._staged != grant.version:
            return f"the slots hold {self._staged or 'a version in the making'}, not {grant.version}"
        return ""

    async def _push(self, grant: Grant) -> tuple[PeerTransfer, ...]:
        digests = self._digest(grant.version)
        if self._saves:
            sizes = self._plan.bytes_per_peer()
            return tuple(
                PeerTransfer(peer, sizes[peer], 0, 0.0, digests[peer]) for peer in grant.members if peer in digests
            )
        return await self._plan.push(grant.members, grant.deadline_seconds, digests)

    def _digest(self, version: Version) -> dict[Member, Digest]:
        """Per peer, of the bytes that it is owed; computed once per version and plan."""
        fingerprint = self._plan.fingerprint
        if self._digests is None or self._digests[:2] != (fingerprint, version):
            began = time.monotonic()
            self._digests = (fingerprint, version, self._plan.digest() if fingerprint else {})
            log.debug("%s: digest of %s took %.3f s", self._member, version, time.monotonic() - began)
        return self._digests[2]

    async def _until_nothing_is_in_flight(self) -> None:
        """CLOSED is a promise. A handle whose deadline passed keeps the grant open for as long as it is not DONE."""
        while self._endpoint is not None and self._endpoint.tainted_peers:  # noqa: ASYNC110  (NIXL has no event)
            await asyncio.sleep(IN_FLIGHT_POLL_SECONDS)  # the agent's poll asks after them

    def _settle(self, outcome: Outcome) -> None:
        waiting = self._outcome
        if waiting is None or waiting.done() or outcome.version != self._staged:
            return
        if outcome.committed:
            waiting.set_result(outcome.sequence)
        else:
            waiting.set_exception(PublishError(outcome.reason))
