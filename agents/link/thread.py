"""What both agents share: a thread of its own with the control channel, the rendezvous, and all calls of a transport.

The embedding process keeps its threads; everything of ours that waits does so here. What differs between a trainer rank
and an inference worker is an ``AgentSide``, which the thread makes and calls.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from weightsync.agents.link.beside import beside
from weightsync.agents.link.client import ControlClient, NotConnected, RefusedForGood
from weightsync.agents.link.connection import NotObeyed
from weightsync.agents.link.edges import PlanEdges
from weightsync.agents.link.examination import Look, examination
from weightsync.agents.link.introduction import Identity, hello
from weightsync.agents.link.obedience import Obedience
from weightsync.agents.link.polling import Polling
from weightsync.agents.link.side import AgentSide
from weightsync.agents.link.silence import Silence
from weightsync.agents.link.tracing import AgentTraces, span_sink
from weightsync.orchestrator.protocol.messages import (
    Connect,
    FromAgent,
    FromDaemon,
    Hello,
    RoundWord,
    TcpStoreRendezvous,
    TransportSettings,
    Welcome,
)
from weightsync.orchestrator.protocol.text import clean

if TYPE_CHECKING:
    from weightsync.agents.link.process_group import SpgRendezvous

log = logging.getLogger(__name__)
T = TypeVar("T")
SideT = TypeVar("SideT", bound=AgentSide)

GROUP_RETRY_SECONDS: Final = 1.0
"""Before a StatelessProcessGroup is joined again; the last group's store listens at the same port for two seconds."""

WELCOME_LOOK_SECONDS: Final = 0.25
"""While the first Welcome is waited for: between two looks at anything else."""

REJECTIONS: Final = 4
"""Of a token, in a row, after which the first Welcome is not waited for; one that is being replaced takes less."""

STOP_SECONDS: Final = 10.0
"""For the thread to end after ``close``."""


@dataclass(frozen=True, slots=True)
class ControlAddress:
    """The daemon: ``ws://host:port/agents`` and the file with the agent's token."""

    url: str
    token_file: Path


class AgentThread(Generic[SideT]):
    """The thread. ``start`` it once; ``close`` ends it within STOP_SECONDS.

    The embedding's threads call ``start`` to ``close``. Everything else runs on the agent's thread, on its event loop.

    Args:
        identity: who this agent is.
        address: of its daemon.
        make_side: given this thread, the side that it calls; kept as ``side``.
        look: at this process's surroundings, whenever a daemon has taken it in.
        obeyed: the agent before this one in the same process. Its memory is this one's, so what it obeyed binds this
            one, too.

    Attributes:
        address: where its daemon is.
        obedience: which daemon this process obeys.
        failure: why the thread has ended, if it was not closed; None while it runs.
    """

    def __init__(
        self,
        identity: Identity,
        address: ControlAddress,
        make_side: Callable[["AgentThread[SideT]"], SideT],
        look: Look,
        obeyed: "AgentThread[SideT] | None" = None,
    ) -> None:
        self.identity = identity
        self.obedience: Obedience = Obedience(secrets.randbits(63)) if obeyed is None else obeyed.obedience
        self._look = look
        self._silence = Silence()
        self._polling = Polling(self._poll)
        self.address = address
        self._loop = asyncio.new_event_loop()
        self._client: ControlClient | None = None
        self._group: SpgRendezvous | None = None
        self._rendezvous: asyncio.Task[None] | None = None
        self._edges: PlanEdges | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._farewell: asyncio.Task[None] | None = None
        self._stopping = self._has_ended = self._introduced = False
        self._thread = threading.Thread(target=self._run, name=f"weightsync {identity.member}", daemon=True)
        self._welcome: Future[Welcome] = Future()
        self.failure: BaseException | None = None
        self._traces = AgentTraces(identity.run_id, identity.member, span_sink(identity.run_id, identity.member))
        self.side = make_side(self)

    # ------------------------------------------------------------------------------------ for the embedding's threads
    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs: started and not ended, neither by ``close`` nor by an error."""
        return self._thread.is_alive()

    @property
    def ended(self) -> str:
        """Why this thread says and hears nothing any more; empty while it runs."""
        if self.failure is not None:
            return f"the agent of this worker has ended: {self.failure}"
        return "" if self.alive else "the agent of this worker was closed; the daemon must introduce itself again"

    @property
    def connected(self) -> bool:
        """Whether there is a connection to a daemon that is obeyed."""
        return self._client is not None and self._client.connected

    @property
    def lease(self) -> tuple[float, float] | None:
        """The lease that the daemon gave, and for how long it was not heard, in seconds; None: there is none.

        An agent that was refused or closed has heard of its daemon, so its lease does not run.
        """
        seconds = self.obedience.lease_seconds
        return (seconds, self._silence.seconds) if seconds and self.alive else None

    def wait_welcome(self, seconds: float, look: Callable[[], None] | None = None) -> Welcome:
        """The first Welcome.

        Args:
            seconds: total deadline; a token that the daemon keeps rejecting ends the wait before it.
            look: called every WELCOME_LOOK_SECONDS; what it raises ends the wait.

        Raises:
            TimeoutError: none came in time; says why the last attempt had failed.
            RefusedForGood: the daemon does not want this agent.
        """
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            try:
                return self._welcome.result(timeout=max(0.0, min(seconds - waited, WELCOME_LOOK_SECONDS)))
            except TimeoutError:
                rejected = self._client is not None and self._client.rejections >= REJECTIONS
                if waited >= seconds or rejected:
                    why = f"no Welcome from {self.address.url} within {waited:.0f} s"
                    last = f"the last attempt: {self.trouble or 'under way'}"
                    raise TimeoutError(f"{self.identity.member}: {why}; {last}") from None
            if look is not None:
                look()

    @property
    def trouble(self) -> str:
        """Why there is no connection to the daemon; empty while there is one, or while the first is made."""
        client = self._client
        return client.trouble if client is not None and not client.connected else ""

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
        with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended by itself
            self._loop.call_soon_threadsafe(self._stop, reason)
        if self._thread.ident is not None:
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
        self._traces.said(message)
        try:
            if self._client is not None:
                self._client.send(message)
                return True
        except NotConnected:
            log.info("%s could not say %s: no daemon", self.identity.member, type(message).__name__)
        return False

    def say_once(self, word: RoundWord) -> None:
        """See ``Link``."""
        self.obedience.keep(word)
        self.send(word)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: %s", self.identity.member, clean(repr(task.exception())), exc_info=task.exception())

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
            self.side.shut()
            self._traces.close()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _live(self) -> None:
        try:
            if not self._stopping:  # else it was closed before it began
                await self._keep_connected()
        finally:
            self._has_ended = True  # from here on ``_stop`` begins nothing that the end of the loop would cut off
            if self._farewell is not None:
                await self._farewell

    async def _keep_connected(self) -> None:
        self._client = ControlClient(self.address.url, self.address.token_file, self._hello, self._heard)
        self.spawn(self._polling.run())
        try:
            await self._client.run()
        except RefusedForGood as error:
            log.error("%s: the daemon refuses this agent: %s", self.identity.member, error)
            raise
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._leave_group()

    def _stop(self, reason: str) -> None:
        """``close`` on the agent's thread: it may come before the client is made, and after the client has ended."""
        if self._has_ended or self._stopping:
            return
        self._stopping = True
        if self._client is not None:
            # Not one of ``_tasks``, which are cancelled as soon as the client has ended.
            self._farewell = self._loop.create_task(self._client.close(reason))

    def _poll(self) -> bool:
        if self._client is not None:
            self._silence.look(self._client.heard_at)
        return self.side.poll()

    def _hello(self) -> Hello:
        self._introduced = True  # to a new connection, whose first Welcome has not come
        return hello(self.identity, self.obedience, self.side.status())

    def _heard(self, message: FromDaemon) -> None:
        self._traces.heard(message)
        match message:
            case Welcome():
                self._welcomed(message)
            case Connect(lends=False, relays=False) if self._group is None:
                self._begin_rendezvous(self._connect(message))
            case Connect(lends=False, relays=False):
                log.warning("%s: a Connect over the hub, while the rendezvous is tcpstore", self.identity.member)
            case _:
                self.side.heard(message)
                self._polling.wake()

    def _welcomed(self, welcome: Welcome) -> None:
        try:
            self.obedience.obey(welcome)
        except NotObeyed as error:
            log.error("%s: the daemon at %s is refused: %s", self.identity.member, self.address.url, error)
            raise  # which ends the connection: nothing that it says is heard
        self._leave_group()
        self.side.welcomed(welcome)
        if not self._welcome.done():
            self._welcome.set_result(welcome)
        if isinstance(welcome.rendezvous, TcpStoreRendezvous):
            self._begin_rendezvous(self._over_group(welcome.rendezvous))
        elif welcome.rendezvous is not None:
            self.announce()
        if self._introduced:
            self._introduced = False
            self.spawn(self._tell_surroundings(welcome.transport))
            for word in self.obedience.repeated(self.side.status()):  # may be lost with the connection before
                self.send(word)

    async def _tell_surroundings(self, transport: TransportSettings) -> None:
        """Nothing waits for it."""
        dated = self._client.dated if self._client is not None else ("", 0.0)
        said = await examination(self.identity.member, self._look, transport, dated)
        if said is not None:
            self.send(said)

    def _leave_group(self) -> None:
        """Each Welcome begins the rendezvous anew, by whichever way it names."""
        if self._rendezvous is not None:
            self._rendezvous.cancel()
        if self._group is not None:
            self._group.close()
        self._group = None

    @property
    def epoch(self) -> int:
        """Of the daemon that this agent obeys."""
        return self.obedience.epoch

    def _begin_rendezvous(self, work: Coroutine[Any, Any, None]) -> None:
        if self._rendezvous is not None:
            self._rendezvous.cancel()
        self._rendezvous = self.spawn(work)

    def announce(self) -> None:
        """Say the layout anew, because it has changed; the present plan's edges are of no use any more."""
        if self._rendezvous is not None and self._group is None:
            self._rendezvous.cancel()
        announce = self.side.announcement()
        if announce is not None:
            self.send(announce)

    def reconnect(self) -> None:
        """Look at the present plan's edges again, and tell what is ready if that has changed."""
        if self._edges is not None:
            self._edges.changed()

    async def _connect(self, connect: Connect) -> None:
        self._edges = PlanEdges(self.identity.member, self.side, connect)
        self.send(await self._edges.prepare())
        await self._edges.keep(self.send)

    async def _over_group(self, place: TcpStoreRendezvous) -> None:
        """Both rounds over vLLM's StatelessProcessGroup, again until its deadline: the store may be the last group's.

        When nothing comes of it, the daemon's own deadline ends this connection, and a new Hello opens a new group.
        """
        from weightsync.agents.link.process_group import GroupError

        ends = self._loop.time() + place.timeout_seconds
        while True:
            try:
                edges = await self._meet(place)
                await edges.keep(self.send)
            except GroupError as error:
                log.warning("%s: %s", self.identity.member, error)
            if self._loop.time() >= ends:
                return
            await asyncio.sleep(GROUP_RETRY_SECONDS)

    async def _meet(self, place: TcpStoreRendezvous) -> PlanEdges:
        from weightsync.agents.link.process_group import SpgRendezvous

        announce = self.side.announcement()
        assert announce is not None, "a side that meets in a group has its layout"
        self._group = group = await beside(lambda: SpgRendezvous(place))
        await beside(lambda: group.announce(announce))
        connect = await beside(group.connect)
        self._edges = edges = PlanEdges(self.identity.member, self.side, connect)
        ready = await edges.prepare()
        await beside(lambda: group.ready(ready))
        await beside(lambda: group.barrier(place.timeout_seconds))
        return edges
