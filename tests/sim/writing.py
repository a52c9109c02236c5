"""A grant in the simulation: what a writer, of a trainer or of an engine that lends, moves into others' memory."""

from typing import TYPE_CHECKING, Final, Protocol

from contents import GARBAGE, SIZES
from virtual_time import Work
from weightsync.orchestrator.protocol.edges import EdgeFailure, Peer, PeerTransfer
from weightsync.orchestrator.protocol.messages import Closed, Connect, Grant
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version

if TYPE_CHECKING:
    from simulated_engine import Worker
    from wires import Word
    from world import World


STALL_SECONDS: Final = 1.0
"""After which a writer gives up what hangs."""


class Writer(Protocol):
    """Who writes: a trainer's rank from its slots, or a worker from its live memory.

    ``connected``: peers by the present edges. ``reached``: by which endpoint each of them is. ``open``: its grants that
    are not closed.
    """

    world: "World"
    member: Member
    alive: bool
    connected: "dict[Member, Worker]"
    reached: "dict[Member, str]"
    open: "dict[RoundName, Writing]"

    def chunks_for(self, target: Member) -> tuple[int, ...]:
        """What it owes a peer."""

    def reads(self, chunk: int) -> Version:
        """What is there at this moment."""

    def may_post(self, chunk: int | None, version: Version) -> bool:
        """Whether the chunk, or with None all of it and its digest, is there."""

    def owed(self, target: Member, version: Version) -> tuple[Digest, int]:
        """Digest and bytes of what it owes a peer."""

    def tell_edges(self) -> None:
        """Some write hangs, or has ended after all."""

    def later(self, seconds: float, work: Work) -> None: ...

    def do(self, work: Work) -> None: ...

    def say_once(self, word: "Word") -> None: ...


class Edge:
    """What one grant has one writer write to one peer: chunk after chunk, each posted when the one before has ended."""

    def __init__(self, writing: "Writing", target: Member) -> None:
        self.writing, self.target = writing, target
        self.owed = writing.rank.owed(target, writing.grant.version)
        self.left = list(writing.rank.chunks_for(target))
        self.stopped = self.waits = False
        self.given_up = ""
        """Why nothing more is posted, although something has not ended."""
        self.endpoint = writing.rank.reached.get(target, "")
        self.ended: PeerTransfer | None = None

    def post(self) -> None:
        """The next chunk; ends when there is none, or when the peer cannot be posted to."""
        rank, world = self.writing.rank, self.writing.rank.world
        if self.ended is not None:
            return
        may = rank.may_post(self.left[0] if self.left else None, self.writing.grant.version)
        if may and not self.left:
            self._end("")
            return
        self.given_up = ""
        worker = rank.connected.get(self.target)
        if self.stopped or world.now > self.writing.until:
            self._end("told to stop" if self.stopped else "the grant's deadline passed")
        elif worker is None or not worker.alive or world.faults.edge_is_broken(rank, self.target):
            self._end(f"{self.target} cannot be reached")
        elif not may:
            self.waits = True
        else:
            chunk = self.left.pop(0)
            rank.later(world.short(), lambda: world.later(0.001, lambda: self._land(worker, chunk)))

    def wake(self) -> None:
        """What it waits for may be there."""
        if self.waits:
            self.waits = False
            self.post()

    def _land(self, worker: "Worker", chunk: int) -> None:
        """What was posted lands, whether or not the writer's process runs at the moment; not if either has died."""
        rank, world = self.writing.rank, self.writing.rank.world
        if not rank.alive:
            return
        if worker.alive and self.endpoint in world.faults.gone_paths:
            self._hang(worker, chunk)
            return
        if self.ended is not None or (worker.alive and worker.endpoint != self.endpoint):
            rank.do(lambda: self._end("another endpoint has taken its place"))
            return
        if worker.alive and worker.stopped and world.faults.wire_waits(worker):
            # Over TCP the peer's kernel takes nothing more, until the peer is thawed or dead.
            world.later(0.1, lambda: self._land(worker, chunk))
            return
        if worker.alive:
            corrupt = world.faults.happens("corrupt", self.target.engine)
            worker.land(chunk, GARBAGE if corrupt else rank.reads(chunk), self.writing.grant.round)
            if rank.member.role == "trainer":
                world.judge.left_the_trainer(self.writing.grant.round, self.target.engine, SIZES[chunk])
        rank.do(self.post if worker.alive else lambda: self._end(f"{self.target} died"))

    def _hang(self, worker: "Worker", chunk: int) -> None:
        """It lands when its path is there again, if the endpoint is, too; until then nobody knows that it will not."""
        rank, world = self.writing.rank, self.writing.rank.world
        if not self.given_up:
            self.given_up = "hangs"
            world.later(STALL_SECONDS, lambda: rank.do(rank.tell_edges))
        world.later(0.1, lambda: self._land(worker, chunk))

    def leave(self, endpoint: str) -> None:
        """The plan has another endpoint of its peer: what was on its way to the one before arrives nowhere."""
        if self.ended is None and self.given_up and endpoint != self.endpoint:
            self._end("another endpoint has taken its place")

    def _end(self, error: str) -> None:
        rank = self.writing.rank
        if self.ended is not None:
            return
        digest, size = self.owed
        if error:
            digest, size = (0, 0), size - sum(SIZES[chunk] for chunk in self.left)
        elif rank.world.faults.happens("short"):
            size -= 1
        self.ended = PeerTransfer(self.target, size, 1, 0.01, digest, error)
        self.writing.ended(self)


class Writing:
    """One grant of one writer, open until every edge has ended."""

    def __init__(self, rank: "Writer", grant: Grant) -> None:
        self.rank, self.grant = rank, grant
        self.until = rank.world.now + grant.deadline_seconds
        self.edges = [Edge(self, member) for member in grant.members]
        self._told = False

    def begin(self) -> None:
        for edge in self.edges:
            edge.post()

    def stop(self, members: tuple[Member, ...]) -> None:
        for edge in self.edges:
            if not members or edge.target in members:
                edge.stopped = True
                edge.wake()

    def ended(self, edge: Edge) -> None:
        done = tuple(e.ended for e in self.edges if e.ended is not None)
        final = len(done) == len(self.edges)
        if final:
            del self.rank.open[self.grant.round]
            self.rank.say_once(Closed(round=self.grant.round, peers=done))
        elif edge.ended is not None and edge.ended.error:
            self.rank.say_once(Closed(round=self.grant.round, peers=done, final=False))
        elif not self._told:
            self._told = True
            self.rank.later(0.05, self._tell_so_far)

    def _tell_so_far(self) -> None:
        self._told = False
        done = tuple(e.ended for e in self.edges if e.ended is not None)
        if self.grant.round in self.rank.open:
            self.rank.say_once(Closed(round=self.grant.round, peers=done, final=False))


def leave(writer: Writer, connect: Connect) -> None:
    """What hangs on its way to an endpoint that ``connect`` has another one for arrives nowhere."""
    endpoints = {peer.member: peer.endpoint_name for peer in connect.peers}
    for edge in open_edges(writer):
        edge.leave(endpoints.get(edge.target, edge.endpoint))


def reach(writer: Writer, connect: Connect) -> tuple[EdgeFailure, ...]:
    """Connect to every peer that is there; those that are not, and those that something hangs on its way to."""
    failed = []
    for peer in connect.peers:
        if peer.member in writer.connected:
            continue
        worker = writer.world.worker(peer.member)
        if worker is None or not worker.alive or worker.stopped or not _leads_to(worker, peer):
            failed.append(EdgeFailure(peer.member, "no answer"))
        else:
            writer.connected[peer.member], writer.reached[peer.member] = worker, peer.endpoint_name
    return (*failed, *hanging(writer))


def _leads_to(worker: "Worker", peer: Peer) -> bool:
    """It is the process and the endpoint of the plan, and a first word to it would not hang."""
    planned = (worker.incarnation, worker.endpoint) == (peer.incarnation, peer.endpoint_name)
    return planned and worker.endpoint not in worker.world.faults.gone_paths


def open_edges(writer: Writer) -> list[Edge]:
    return [edge for writing in writer.open.values() for edge in writing.edges if edge.ended is None]


def hanging(writer: Writer) -> tuple[EdgeFailure, ...]:
    members = {edge.target for edge in open_edges(writer) if edge.given_up}
    return tuple(EdgeFailure(member, "has not ended") for member in sorted(members))


def told(writer: Writer, failed: tuple[EdgeFailure, ...]) -> tuple[EdgeFailure, ...]:
    """What is wrong with the edges now that some write hangs, or has ended after all; ``failed`` was before."""
    return (*(failure for failure in failed if failure.peer not in writer.connected), *hanging(writer))
