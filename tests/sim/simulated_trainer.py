"""A simulated trainer: its ranks, what they write and when, and the loop that publishes."""

from typing import TYPE_CHECKING, Final

import msgspec
from contents import GARBAGE, SIZES, chunks_of, digest_of
from simulated_engine import Worker
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Connect,
    EdgeFailure,
    FromDaemon,
    Grant,
    Hello,
    Outcome,
    PeerTransfer,
    Ready,
    Staged,
    TrainerStatus,
)
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version, add_digests
from wires import Agent

if TYPE_CHECKING:
    from world import World


STALL_SECONDS: Final = 1.0
"""After which a writer gives up what hangs."""


class Edge:
    """What one grant has one rank write to one peer: chunk after chunk, each posted when the one before has ended."""

    def __init__(self, writing: "Writing", target: Member) -> None:
        self.writing, self.target = writing, target
        self.left = list(writing.rank.chunks)
        self.stopped = False
        self.given_up = ""
        """Why nothing more is posted, although something has not ended."""
        self.endpoint = writing.rank.reached.get(target, "")
        self.ended: PeerTransfer | None = None

    def post(self) -> None:
        """The next chunk; ends when there is none, or when the peer cannot be posted to."""
        rank, world = self.writing.rank, self.writing.rank.world
        if self.ended is not None:
            return
        if not self.left:
            self._end("")
            return
        self.given_up = ""
        worker = rank.connected.get(self.target)
        if self.stopped or world.now > self.writing.until:
            self._end("told to stop" if self.stopped else "the grant's deadline passed")
        elif worker is None or not worker.alive or world.faults.edge_is_broken(rank, self.target):
            self._end(f"{self.target} cannot be reached")
        else:
            chunk = self.left.pop(0)
            rank.later(world.short(), lambda: world.later(0.001, lambda: self._land(worker, chunk)))

    def _land(self, worker: Worker, chunk: int) -> None:
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
            worker.land(chunk, GARBAGE if corrupt or rank.slots is None else rank.slots, self.writing.grant.round)
        rank.do(self.post if worker.alive else lambda: self._end(f"{self.target} died"))

    def _hang(self, worker: Worker, chunk: int) -> None:
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
        digest, size = rank.owed(self.target, self.writing.grant.version)
        if error:
            digest, size = (0, 0), size - sum(SIZES[chunk] for chunk in self.left)
        elif rank.world.faults.happens("short"):
            size -= 1
        self.ended = PeerTransfer(self.target, size, 1, 0.01, digest, error)
        self.writing.ended(self)


class Writing:
    """One grant of one rank, open until every edge has ended."""

    def __init__(self, rank: "Rank", grant: Grant) -> None:
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


class Rank(Agent):
    """One rank of a trainer."""

    def __init__(self, job: "Job", number: int) -> None:
        super().__init__(job.world, Member("trainer", "", number), job.size)
        self.job, self.generation, self.host = job, job.generation, job.host
        self.chunks = chunks_of(number, job.size)
        self.slots: Version | None = None
        self.restaged = 0
        self.open: dict[RoundName, Writing] = {}
        self.connected: dict[Member, Worker] = {}
        self.reached: dict[Member, str] = {}
        """By which endpoint each of them is reached."""
        self._newest: Connect | None = None
        self._connect: Connect | None = None
        self._failed: tuple[EdgeFailure, ...] = ()

    def introduce(self, hello: Hello) -> Hello:
        status = TrainerStatus(self.slots, tuple(self.open), self.restaged)
        return msgspec.structs.replace(hello, trainer=status)

    def owed(self, target: Member, version: Version) -> tuple[Digest, int]:
        """Digest and bytes of what this rank owes a target."""
        digest = add_digests(*(digest_of(chunk, version, target) for chunk in self.chunks))
        return digest, sum(SIZES[chunk] for chunk in self.chunks)

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Connect():
                self._newest = message
                self.later(self.world.short(), lambda: self._prepare(message))
            case Grant():
                self._granted(message)
            case Abort():
                writing = self.open.get(message.round)
                if writing is not None:
                    writing.stop(message.members)
            case Outcome():
                self.job.outcome(message)
            case _:
                pass

    # -------------------------------------------------------------------------------------------------------- edges
    def _prepare(self, connect: Connect) -> None:
        """Connect to every peer that is there; those that are not are tried again for as long as the plan stands."""
        if self._newest is not connect:
            return
        endpoints = {peer.member: peer.endpoint_name for peer in connect.peers}
        for edge in self._open_edges():
            edge.leave(endpoints.get(edge.target, edge.endpoint))
        if any(not edge.given_up for edge in self._open_edges()):
            self.later(0.1, lambda: self._prepare(connect))
            return
        self._connect, self.connected, self.reached, self._failed = connect, {}, {}, ()
        self._try_edges(connect, first=True)

    def _try_edges(self, connect: Connect, first: bool = False) -> None:
        if self._connect is not connect:
            return
        failed = []
        for peer in connect.peers:
            if peer.member in self.connected:
                continue
            worker = self.world.worker(peer.member)
            if worker is None or not worker.alive or worker.stopped or not self._reaches(worker, peer):
                failed.append(EdgeFailure(peer.member, "no answer"))
            else:
                self.connected[peer.member], self.reached[peer.member] = worker, peer.endpoint_name
        failed += self._hanging()
        changed, self._failed = tuple(failed) != self._failed, tuple(failed)
        if first or changed:
            self.say(Ready(fingerprint=connect.fingerprint, failed=self._failed))
        if failed:
            self.later(1.0, lambda: self._try_edges(connect))

    def _reaches(self, worker: Worker, peer: Peer) -> bool:
        """It is the process and the endpoint of the plan, and a first word to it would not hang."""
        planned = (worker.incarnation, worker.endpoint) == (peer.incarnation, peer.endpoint_name)
        return planned and worker.endpoint not in self.world.faults.gone_paths

    def _open_edges(self) -> list[Edge]:
        return [edge for writing in self.open.values() for edge in writing.edges if edge.ended is None]

    def _hanging(self) -> list[EdgeFailure]:
        members = {edge.target for edge in self._open_edges() if edge.given_up}
        return [EdgeFailure(member, "has not ended") for member in sorted(members)]

    @property
    def slots_are_read(self) -> bool:
        """By a write that has not ended, other than one that hangs and that the daemon has taken back."""
        return any(not (edge.given_up and edge.stopped) for edge in self._open_edges())

    def tell_edges(self) -> None:
        """Some write hangs, or has ended after all."""
        if self._connect is not None:
            hanging = tuple(self._hanging())
            told = tuple(failure for failure in self._failed if failure.peer not in self.connected) + hanging
            if told != self._failed:
                self._failed = told
                self.say(Ready(fingerprint=self._connect.fingerprint, failed=told))
            if hanging:
                self.later(1.0, self.tell_edges)

    # ------------------------------------------------------------------------------------------------------- grants
    def _granted(self, grant: Grant) -> None:
        objection = ""
        if grant.round.epoch != self.epoch:
            objection = f"grant of epoch {grant.round.epoch}"
        elif self._connect is None or grant.fingerprint != self._connect.fingerprint:
            objection = "grant for other edges"
        elif any(not edge.stopped and edge.ended is None for writing in self.open.values() for edge in writing.edges):
            objection = "another round is still being written"
        elif self.slots != grant.version:
            objection = "the slots hold another version"
        if objection:
            self.say_once(Closed(round=grant.round, error=objection, fault="trainer"))
            return
        self.open[grant.round] = writing = Writing(self, grant)
        writing.begin()


class Job:
    """One start of the trainer: its ranks, and a loop that publishes the next version when the fate of one is known."""

    def __init__(self, world: "World", generation: int, size: int, host: str) -> None:
        self.world, self.generation, self.size, self.host = world, generation, size, host
        self.ranks = [Rank(self, number) for number in range(size)]
        self.waiting: tuple[Version, int] | None = None
        self.results: list[tuple[Version, bool]] = []
        for rank in self.ranks:
            rank.dial(world.rng.uniform(0.0, 1.0))
        world.later(world.rng.uniform(0.5, 2.0), self._publish)

    @property
    def whole(self) -> bool:
        """All its ranks run: what they do together, they can do."""
        return all(rank.alive and not rank.stopped for rank in self.ranks)

    @property
    def dead(self) -> bool:
        return not any(rank.alive for rank in self.ranks)

    def die(self, *, silently: bool = False) -> None:
        for rank in self.ranks:
            rank.die(silently=silently)

    def publish_soon(self) -> None:
        """The next version, of a trainer that publishes nothing by itself."""
        self.world.later(0.1, self._publish)

    def _publish(self, again: Version | None = None, restaged: int = 0) -> None:
        """Convert into the slots, which nobody may be writing from."""
        if self.dead:
            return
        if not self.whole or any(rank.slots_are_read for rank in self.ranks):
            self.world.later(0.3, lambda: self._publish(again, restaged))
            return
        version = again or Version(self.generation, self.world.next_step())
        self.waiting = version, restaged
        for rank in self.ranks:
            rank.slots = None
        for rank in self.ranks:
            rank.later(self.world.rng.uniform(0.0, 0.3), lambda r=rank: self._stage(r, version, restaged))

    def _stage(self, rank: Rank, version: Version, restaged: int) -> None:
        rank.slots, rank.restaged = version, restaged
        rank.say(Staged(version=version, bytes=1, convert_seconds=0.0, digest_seconds=0.0, restaged=restaged))
        if all(other.slots == version for other in self.ranks):
            self.ranks[0].later(0.002, lambda: self.world.directory.stage(version, restaged))

    def outcome(self, told: Outcome) -> None:
        """To any of its ranks; the first one that hears of it counts."""
        if (told.version, told.restaged) != self.waiting:
            return
        version, restaged = self.waiting
        self.waiting = None
        self.results.append((version, told.committed))
        self.world.judge.told(version, told.committed)
        pause = self.world.rng.uniform(*self.world.between_versions)
        if not told.committed and (self.world.idle or self.world.rng.random() < 0.3):
            self.world.later(pause, lambda: self._publish(version, restaged + 1))
        elif not (self.world.idle and told.committed):
            self.world.later(pause, self._publish)
