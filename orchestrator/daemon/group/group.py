"""``rendezvous: tcpstore`` for the runner: what the child process gathers becomes the same events as the hub's."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from weightsync.orchestrator.core.events import AgentLost, AgentSaid
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.protocol.messages import Announce, Connect, Ready, TcpStoreRendezvous
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.text import clean

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Gathering:
    """One group: its members in rank order from 1, and what is to be delivered to them."""

    store: TcpStoreRendezvous
    connections: dict[Member, int]
    connects: dict[Member, Connect] = field(default_factory=dict)
    planned: asyncio.Event = field(default_factory=asyncio.Event)


class Group:
    """At most one group at a time; a new one replaces the old one.

    ``drop`` ends one connection of an agent, so that it says Hello again.
    """

    def __init__(self, inbox: Inbox, drop: Callable[[Member, int, str], bool]) -> None:
        self._inbox, self._drop = inbox, drop
        self._gathering: _Gathering | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self, store: TcpStoreRendezvous, connections: dict[Member, int]) -> None:
        """Both rounds with these members; their connections name the agents' present processes."""
        previous, gathering = self._task, _Gathering(store, connections)
        self._gathering = gathering
        self._task = self._inbox.spawn(self._meet(gathering, previous), "tcpstore group")

    def deliver(self, member: Member, connect: Connect) -> bool:
        """Keep ``connect`` until everybody's is here; false when the member is in no group."""
        gathering = self._gathering
        if gathering is None or member not in gathering.connections:
            return False
        gathering.connects[member] = connect
        if gathering.connects.keys() == gathering.connections.keys():
            gathering.planned.set()
        return True

    async def close(self) -> None:
        """End the child."""
        await _end(self._task)

    async def _meet(self, gathering: _Gathering, previous: "asyncio.Task[None] | None") -> None:
        # Only where it is used: most daemons have no such rendezvous.
        from weightsync.orchestrator.daemon.group.child import TcpStoreError, TcpStoreRendezvousServer

        await _end(previous)  # it holds the store's port
        server = TcpStoreRendezvousServer(gathering.store)
        members = dict(enumerate(gathering.connections, start=1))
        try:
            async with asyncio.timeout(gathering.store.timeout_seconds):
                await server.start(gathering.store.world)
                for rank, announce in (await server.gather_announces()).items():
                    self._say(gathering, members[rank], announce)
                await gathering.planned.wait()
                await server.deliver({rank: gathering.connects[member] for rank, member in members.items()})
                for rank, ready in (await server.gather_ready()).items():
                    self._say(gathering, members[rank], ready)
                await server.barrier()
        except Exception as error:  # whatever a peer said in it costs the group
            known = isinstance(error, TcpStoreError | OSError)  # TimeoutError, and a child that cannot be started
            reason = clean(f"the tcpstore rendezvous failed: {str(error) or 'its deadline passed'}")
            log.error("tcpstore rendezvous failed", reason=reason, exc_info=None if known else error)
            for member, connection in gathering.connections.items():
                self._drop(member, connection, reason)
                self._inbox.post(AgentLost(self._inbox.next_id(), member, connection, reason))
        finally:
            await server.close()

    def _say(self, gathering: _Gathering, member: Member, message: Announce | Ready) -> None:
        self._inbox.post(AgentSaid(self._inbox.next_id(), member, gathering.connections[member], message))


async def _end(task: "asyncio.Task[None] | None") -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
