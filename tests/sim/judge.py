"""The judge of a simulated fleet. It looks at the workers' memory and the journal's disk, never at the core's state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from contents import CHECKPOINT
from simulated_engine import Server, Worker
from weightsync.orchestrator.core.records import Committed, Decided, EpochBegan, Record, RoundEnded
from weightsync.orchestrator.protocol.names import RoundName, Version

if TYPE_CHECKING:
    from world import World


SWITCH_SECONDS: Final = 0.05
"""Of a shadow engine: all that a healthy round may cost it. Its workers take 40 ms at most, all at once."""


class Judge:
    """S1, S3, S4, L1 and how long healthy engines are paused."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.committed: list[Version] = []
        self.deciding: dict[RoundName, Version] = {}
        """Decided by a round that is open: being committed now."""
        self.pauses: list[float] = []
        """Of engines that were healthy all the while, in seconds."""
        self.failed: set[Version] = set()
        self.ever_served: set[Version] = set()
        self._epoch = self._sequence = 0
        self._paused_at: dict[str, float] = {}
        self._stale_since: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------------- journal
    def journaled(self, records: Sequence[Record], *, in_order: bool = True) -> None:
        """These are durable now. ``in_order``: in the one journal, whose order must not go back."""
        for record in records:
            match record:
                case EpochBegan(epoch=epoch) if in_order:
                    self._require(epoch > self._epoch, f"S3: epoch {epoch} after {self._epoch}")
                    self._epoch = epoch
                case Decided(round=name, version=version, digests=digests):
                    self.deciding[name] = version
                    for worker in self._world.workers():
                        memory = worker.prepared(name, version) if str(worker.member) in digests else None
                        if memory is not None and set(memory) != {version}:
                            self._fail(f"S4: {worker.member} holds {memory}, decided {version}")
                case Committed(version=version, sequence=sequence):
                    again = version in self.committed and sequence == self._sequence
                    if in_order:
                        grows = sequence == self._sequence + 1 or again
                        self._require(grows, f"S3: {sequence} after {self._sequence}")
                        self._sequence = sequence
                    if not again:
                        self.committed.append(version)
                case RoundEnded(round=name, version=version, outcome=outcome):
                    done = version in self.committed
                    self._require(outcome != "committed" or done, f"round {name} ended before its commit was durable")
                    self.deciding.pop(name, None)
                case _:
                    pass
        for server in self._world.servers.values():
            self.look(server.name)

    def told(self, version: Version, committed: bool) -> None:
        """Somebody hears how a version ended."""
        if committed:
            self._require(version in self.committed, f"told that {version} is committed, which is not durable")
        else:
            self.failed.add(version)
            self._require(version not in self.committed, f"told that {version} failed, which is committed")

    # ------------------------------------------------------------------------------------------------------------ S1
    def look(self, name: str) -> None:
        """S1: who serves holds one whole version that is committed, or is being committed now."""
        server = self._world.servers.get(name)
        if server is None or not server.serves:
            self._stale_since.pop(name, None)
            return
        held = {version for worker in server.workers for version in worker.memory}
        if len(held) != 1:
            self._fail(f"S1: {name} serves a mixture: {held}")
        (version,) = held
        taken = {worker.serves for worker in server.workers}
        if taken != held:
            self._fail(f"S1: {name} serves {version}, its workers take it for {taken}")
        self.ever_served.add(version)
        current = version in self.deciding.values() or self.committed[-1:] == [version]
        if version == CHECKPOINT or not (current or version in self.committed):
            self._fail(f"S1: {name} serves {version}, which is not committed")
        if current:
            self._stale_since.pop(name, None)
        elif name not in self._stale_since:
            self._stale_since[name] = since = self._world.now
            self._world.later(self._world.stale_bound, lambda: self._still_stale(name, since))

    def _still_stale(self, name: str, since: float) -> None:
        if self._stale_since.get(name) == since:
            healthy = self._world.faults.healthy_since(name) < since
            self._require(not healthy, f"S1: {name} has served an older version since {since:.3f}")
            self._world.later(self._world.stale_bound, lambda: self._still_stale(name, since))

    def written(self, worker: Worker) -> None:
        """Some of its memory changed."""
        self.look(worker.member.engine)

    # -------------------------------------------------------------------------------------------------------- pauses
    def pause_changed(self, server: Server) -> None:
        """L2: what is wrong with others costs a healthy engine no more than so much of its serving time."""
        name, now = server.name, self._world.now
        if server.paused:
            self._paused_at[name] = now
            self._world.later(self._world.patience, lambda: self._still_paused(name, now))
        else:
            paused_at = self._paused_at.pop(name, None)
            if paused_at is not None and self._healthy(name, paused_at):
                self.pauses.append(now - paused_at)
                long = now - paused_at > SWITCH_SECONDS and self._world.changes_by_itself(name)
                self._require(not long, f"L2: {name} stood for {now - paused_at:.3f} s, its switch is shorter")
        self.look(name)

    def _still_paused(self, name: str, since: float) -> None:
        if self._paused_at.get(name) == since and self._healthy(name, since):
            self._require(False, f"L2: {name} is healthy and paused since {since:.3f}")

    def _healthy(self, name: str, since: float) -> bool:
        """It was all the while, and so were enough others for a version to be committed on.

        These are counted only when no call that hung in them can hang any more: until then no round begins with them.
        """
        policy, healthy_since = self._world.policy, self._world.faults.healthy_since
        if healthy_since(name) >= since:
            return False
        usable = [other for other in self._world.members() if healthy_since(other) + policy.update < since]
        return len({name, *usable}) >= policy.quorum(self._world.counted(since))

    def died(self, name: str) -> None:
        """Its processes are gone; the next ones have served nothing yet."""
        self._paused_at.pop(name, None)
        self._stale_since.pop(name, None)

    # ------------------------------------------------------------------------------------------------------------ L1
    def behind(self) -> list[str]:
        """L1: engines that do not serve the last committed version though somebody can give it to them, and why."""
        world, lines = self._world, []
        # After a rollback the trainer has another one, and only who lends can bring an engine that is new there.
        given = world.policy.fan_out != "trainer" or all(rank.slots in self.committed[-1:] for rank in world.job.ranks)
        for name in world.members():
            server = world.servers.get(name)
            if server is None:
                lines.append(f"{name}: not there")
                continue
            if not given and not server.serves and all(worker.status.applied is None for worker in server.workers):
                continue
            held = {version for worker in server.workers for version in worker.memory}
            if not server.serves or held != set(self.committed[-1:]):
                refusals = [f"{w.member} {w.refusal or 'may run'} {w.status}" for w in server.workers]
                lines.append(f"{name}: paused {server.paused}, holds {held}, {refusals}")
        return lines

    def serves_an_older_version(self, name: str) -> bool:
        """Than the committed one."""
        server = self._world.servers.get(name)
        return server is not None and server.serves and server.workers[0].applied != self.committed[-1]

    def pairs_apart(self) -> list[str]:
        """Pairs of which both serve, different versions, though nothing is being committed."""
        world, apart = self._world, []
        for name, server in world.servers.items():
            versions = {other.workers[0].applied for o in world.unit(name) if (other := world.servers[o]).serves}
            if server.serves and len(versions) > 1 and not self.deciding:
                apart.append(name)
        return apart

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self._fail(otherwise)

    def _fail(self, what: str) -> NoReturn:
        raise AssertionError(f"{what}\n{self._world.story()}")
