"""A simulated trainer: its ranks, what they write and when, and the loop that publishes."""

from typing import TYPE_CHECKING

import msgspec
from contents import GARBAGE, chunks_of, owed
from simulated_engine import Worker
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Connect,
    Converting,
    EdgeFailure,
    FromDaemon,
    Grant,
    Hello,
    Outcome,
    Ready,
    Staged,
    TrainerStatus,
)
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version
from wires import Agent
from writing import Writing, hanging, leave, open_edges, reach, told

if TYPE_CHECKING:
    from world import World


class Rank(Agent):
    """One rank of a trainer."""

    def __init__(self, job: "Job", number: int) -> None:
        super().__init__(job.world, Member("trainer", "", number), job.size)
        self.job, self.generation, self.host = job, job.generation, job.host
        self.chunks = chunks_of(number, job.size)
        self.slots: Version | None = None
        self.converting: Version | None = None
        self.filled: set[int] = set()
        """Chunks of the slots that hold what is being converted."""
        self.restaged = 0
        self.open: dict[RoundName, Writing] = {}
        self.connected: dict[Member, Worker] = {}
        self.reached: dict[Member, str] = {}
        """By which endpoint each of them is reached."""
        self._newest: Connect | None = None
        self._connect: Connect | None = None
        self._failed: tuple[EdgeFailure, ...] = ()

    def introduce(self, hello: Hello) -> Hello:
        status = TrainerStatus(self.slots, tuple(self.open), self.restaged, converting=self.converting)
        return msgspec.structs.replace(hello, trainer=status)

    def chunks_for(self, target: Member) -> tuple[int, ...]:
        return self.chunks

    def reads(self, chunk: int) -> Version:
        filled = self.converting if chunk in self.filled else None
        return self.slots or filled or GARBAGE

    def may_post(self, chunk: int | None, version: Version) -> bool:
        return self.slots == version or (self.converting == version and chunk in self.filled)

    def owed(self, target: Member, version: Version) -> tuple[Digest, int]:
        """Digest and bytes of what this rank owes a target."""
        return owed(tuple((chunk, version) for chunk in self.chunks), target.rank)

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

    # --------------------------------------------------------------------------------------------------- conversion
    def begin(self, version: Version, seconds: float) -> None:
        """Convert ``version`` into the slots, chunk by chunk, and let what is filled be written."""
        self.converting, self.filled = version, set()
        self.say(Converting(version=version))
        for number, chunk in enumerate(self.chunks):
            self.later(seconds * number / len(self.chunks), lambda c=chunk: self._fill(version, c))

    def _fill(self, version: Version, chunk: int) -> None:
        if self.converting == version:
            self.filled.add(chunk)
            self.wake()

    def give_up(self) -> None:
        self.converting = None
        self.say(Converting(version=None))
        for writing in list(self.open.values()):
            writing.stop(())

    def wake(self) -> None:
        """Writes that wait for what is filled now go on."""
        for edge in open_edges(self):
            edge.wake()

    # -------------------------------------------------------------------------------------------------------- edges
    def _prepare(self, connect: Connect) -> None:
        """Connect to every peer that is there; those that are not are tried again for as long as the plan stands."""
        if self._newest is not connect:
            return
        leave(self, connect)
        if any(not edge.given_up for edge in open_edges(self)):
            self.later(0.1, lambda: self._prepare(connect))
            return
        self._connect, self.connected, self.reached, self._failed = connect, {}, {}, ()
        self._try_edges(connect, first=True)

    def _try_edges(self, connect: Connect, first: bool = False) -> None:
        if self._connect is not connect:
            return
        failed = reach(self, connect)
        changed, self._failed = failed != self._failed, failed
        if first or changed:
            self.say(Ready(fingerprint=connect.fingerprint, failed=self._failed))
        if failed:
            self.later(1.0, lambda: self._try_edges(connect))

    @property
    def slots_are_read(self) -> bool:
        """By a write that has not ended, other than one that hangs and that the daemon has taken back."""
        return any(not (edge.given_up and edge.stopped) for edge in open_edges(self))

    def tell_edges(self) -> None:
        if self._connect is not None:
            now = told(self, self._failed)
            if now != self._failed:
                self._failed = now
                self.say(Ready(fingerprint=self._connect.fingerprint, failed=now))
            if hanging(self):
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
        elif grant.version not in (self.slots, self.converting):
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
        fails = not restaged and self.world.gives_up and self.world.rng.random() < self.world.gives_up
        for rank in self.ranks:
            seconds = self.world.rng.uniform(0.0, 0.3)
            if not restaged:
                rank.begin(version, seconds)
            if fails:
                rank.later(0.3, lambda r=rank: self._give_up(r, version))
            else:
                rank.later(seconds, lambda r=rank: self._stage(r, version, restaged))

    def _give_up(self, rank: Rank, version: Version) -> None:
        """Some rank has found no numbers in it, and all have agreed on that; a trainer then publishes its next step."""
        rank.give_up()
        if self.waiting == (version, 0):
            self.waiting = None
            self.world.later(self.world.rng.uniform(*self.world.between_versions), self._publish)

    def _stage(self, rank: Rank, version: Version, restaged: int) -> None:
        rank.slots, rank.restaged, rank.converting = version, restaged, None
        rank.say(Staged(version=version, bytes=1, convert_seconds=0.0, digest_seconds=0.0, restaged=restaged))
        if all(other.slots == version for other in self.ranks):
            self.ranks[0].later(0.002, lambda: self.world.directory.stage(version, restaged))
        rank.wake()

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
