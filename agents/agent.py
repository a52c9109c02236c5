"""What both agents share: a thread of its own with the control channel, the rendezvous, and all calls of NIXL.

The embedding process (a trainer rank, a vLLM worker) keeps its threads; everything of ours that waits does so here.
"""

import asyncio
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from weightsync.agents.control import ControlClient, NotConnected, RefusedForGood
from weightsync.orchestrator.protocol.codec import cut
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Connect,
    EngineStatus,
    FromAgent,
    FromDaemon,
    Hello,
    Ready,
    TcpStoreRendezvous,
    TrainerStatus,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member

if TYPE_CHECKING:
    from weightsync.agents.spg import SpgRendezvous

log = logging.getLogger(__name__)
T = TypeVar("T")

IDLE_POLL_SECONDS: Final = 0.01
"""Between looks at the transport when nothing is expected: only warm-ups of peers wait for it."""

BUSY_POLL_SECONDS: Final = 0.001
"""While a grant is open on either side; NIXL has neither a descriptor nor a callback to wait for."""

CONNECT_ATTEMPTS: Final = 5
"""At warming the edges up, one second longer apart each time; with the warm-ups' own deadlines about a minute."""

STOP_SECONDS: Final = 10.0
"""For the thread to end after ``close``."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this agent is. ``generation`` is 0 for inference ranks."""

    run_id: str
    member: Member
    world: int
    generation: int = 0


@dataclass(frozen=True, slots=True)
class ControlAddress:
    """The daemon: ``ws://host:port/agents`` and the file with the bearer token."""

    url: str
    token_file: Path


class Body(Protocol):
    """What differs between a trainer rank and a vLLM worker. Every method runs on the agent's thread."""

    def status(self) -> TrainerStatus | EngineStatus:
        """What this rank's memory holds now."""

    def welcomed(self, welcome: Welcome) -> None:
        """The transport is known; open it on the first call."""

    def announcement(self) -> tuple[Layout, str, bytes]:
        """Layout, and name and metadata of the transport's endpoint."""

    async def connect(self, connect: Connect) -> None:
        """Prepare and warm up the edges."""

    def heard(self, message: FromDaemon) -> None:
        """A message that is not part of the rendezvous."""

    def poll(self) -> bool:
        """Let the transport make progress; true while a grant is open here."""

    def shut(self) -> None:
        """Close the transport."""


class Agent:
    """The thread. ``start`` it once; ``close`` ends it within STOP_SECONDS."""

    def __init__(self, identity: Identity, address: ControlAddress, body: Body) -> None:
        self.identity = identity
        self.incarnation = secrets.randbits(63)
        self._body = body
        self._address = address
        self._epoch, self._journal_id = 0, ""
        self._loop = asyncio.new_event_loop()
        self._client: ControlClient | None = None
        self._group: SpgRendezvous | None = None
        self._rendezvous: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name=f"weightsync {identity.member}", daemon=True)
        self._welcome: Future[Welcome] = Future()
        self.failure: BaseException | None = None

    # ------------------------------------------------------------------------------------ for the embedding's threads
    def start(self) -> None:
        self._thread.start()

    def wait_welcome(self, seconds: float) -> Welcome:
        """The first Welcome.

        Raises:
            TimeoutError: none came in time.
            RefusedForGood: the daemon does not want this agent.
        """
        return self._welcome.result(timeout=seconds)

    def call(self, work: Callable[[], T], seconds: float = STOP_SECONDS) -> T:
        """Run ``work`` on the agent's thread and wait for its result."""
        result: Future[T] = Future()

        def perform() -> None:
            try:
                result.set_result(work())
            except BaseException as error:  # handed to the caller's thread
                result.set_exception(error)

        self._loop.call_soon_threadsafe(perform)
        return result.result(timeout=seconds)

    def post(self, work: Callable[[], object]) -> None:
        """Run ``work`` on the agent's thread, without waiting."""
        self._loop.call_soon_threadsafe(work)

    def close(self, reason: str = "") -> None:
        """Say Bye and end the thread."""
        if self._thread.is_alive() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.spawn(self._stop(reason)))
        self._thread.join(STOP_SECONDS)

    # ---------------------------------------------------------------------------------------- on the agent's thread
    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A task of this thread; its failure is logged and ends nothing else."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def send(self, message: FromAgent) -> bool:
        """Tell the daemon, if it is there; Hello carries the state otherwise."""
        try:
            if self._client is not None:
                self._client.send(message)
                return True
        except NotConnected:
            log.info("%s could not say %s: no daemon", self.identity.member, type(message).__name__)
        return False

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: %s", self.identity.member, cut(repr(task.exception())), exc_info=task.exception())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:  # the embedding learns it from its next call
            self.failure = error
            log.error("%s ends: %s", self.identity.member, error)
            if not self._welcome.done():
                self._welcome.set_exception(error)
        finally:
            self._body.shut()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _live(self) -> None:
        self._client = ControlClient(self._address.url, self._address.token_file, self._hello, self._heard)
        polling = self.spawn(self._poll())
        try:
            await self._client.run()
        except RefusedForGood as error:
            log.error("%s: the daemon refuses this agent: %s", self.identity.member, error)
            raise
        finally:
            polling.cancel()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._group is not None:
                self._group.close()

    async def _stop(self, reason: str) -> None:
        if self._client is not None:
            self._tasks.discard(asyncio.current_task())  # it outlives the others
            await self._client.close(reason)

    async def _poll(self) -> None:
        while True:
            busy = self._body.poll()
            await asyncio.sleep(BUSY_POLL_SECONDS if busy else IDLE_POLL_SECONDS)

    def _hello(self) -> Hello:
        status = self._body.status()
        return Hello(
            schema=SCHEMA_VERSION,
            run_id=self.identity.run_id,
            member=self.identity.member,
            world=self.identity.world,
            incarnation=self.incarnation,
            generation=self.identity.generation,
            epoch_seen=self._epoch,
            journal_id=self._journal_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            trainer=status if isinstance(status, TrainerStatus) else None,
            engine=status if isinstance(status, EngineStatus) else None,
        )

    def _heard(self, message: FromDaemon) -> None:
        match message:
            case Welcome():
                self._welcomed(message)
            case Connect() if self._group is None:
                self._begin_rendezvous(self._connect(message))
            case Connect():
                log.warning("%s: a Connect over the hub, while the rendezvous is tcpstore", self.identity.member)
            case _:
                self._body.heard(message)

    def _welcomed(self, welcome: Welcome) -> None:
        older = welcome.epoch < self._epoch
        foreign = welcome.epoch == self._epoch and welcome.journal_id != self._journal_id
        if older or foreign:
            # Hello told it the epoch that we obey; a daemon that stays below it is not ours to follow.
            log.error("daemon of epoch %d refused: this agent obeyed %d", welcome.epoch, self._epoch)
            return
        self._epoch, self._journal_id = welcome.epoch, welcome.journal_id
        self._body.welcomed(welcome)
        if not self._welcome.done():
            self._welcome.set_result(welcome)
        if isinstance(welcome.rendezvous, TcpStoreRendezvous):
            self._begin_rendezvous(self._over_group(welcome.rendezvous))
        elif welcome.rendezvous is not None:
            self.send(self._announce())

    @property
    def epoch(self) -> int:
        """Of the daemon that this agent obeys."""
        return self._epoch

    def _begin_rendezvous(self, work: Coroutine[Any, Any, None]) -> None:
        if self._rendezvous is not None:
            self._rendezvous.cancel()
        self._rendezvous = self.spawn(work)

    def _announce(self) -> Announce:
        layout, name, endpoint = self._body.announcement()
        return Announce(layout=layout, endpoint_name=name, endpoint=endpoint)

    async def _connect(self, connect: Connect) -> None:
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            try:
                await self._body.connect(connect)
            except RuntimeError as error:
                # A peer may be starting, or be gone; the daemon sends another Connect when the members change.
                log.warning("%s: edges not ready (attempt %d): %s", self.identity.member, attempt, error)
                await asyncio.sleep(attempt)
            else:
                self.send(Ready(fingerprint=connect.fingerprint))
                return

    async def _over_group(self, place: TcpStoreRendezvous) -> None:
        """Both rounds over vLLM's StatelessProcessGroup; its calls block, so they run beside the loop."""
        from weightsync.agents.spg import SpgRendezvous  # imports vLLM, which only this rendezvous needs

        if self._group is not None:
            self._group.close()
        announce = self._announce()
        self._group = group = await asyncio.to_thread(SpgRendezvous, place)
        await asyncio.to_thread(group.announce, announce)
        connect = await asyncio.to_thread(group.connect)
        await self._body.connect(connect)
        await asyncio.to_thread(group.ready, Ready(fingerprint=connect.fingerprint))
        await asyncio.to_thread(group.barrier, place.timeout_seconds)
