"""Where the simulated fleet keeps things for longer than a process lives: the journal's disk and the run directory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtual_time import Work
from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.events import StableSeen
from weightsync.orchestrator.core.memory import Memory, replay, saved
from weightsync.orchestrator.core.records import AnyRecord, MemorySaved, Record, decode_record, encode_record
from weightsync.orchestrator.protocol.names import Version

if TYPE_CHECKING:
    from simulated_daemon import SimulatedDaemon
    from world import World


COMPACTED: Final = 0.005
"""Chance, at each commit, that the journal is compacted after it."""


class Disk:
    """The journal: a commit takes time, and the daemon's death in it leaves all of it or nothing."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.bodies: list[bytes] = []
        self.seconds = 0.002
        """Of one commit."""

    def append(self, records: list[Record], daemon: "SimulatedDaemon", durable: Work) -> None:
        """``durable`` is called when they are; the daemon ends where that is not known."""
        world = self._world

        def commit() -> None:
            lost = daemon.alive and world.faults.happens("disk")
            if (lost or not daemon.alive) and world.rng.random() < 0.5:
                return self._end(daemon, lost)
            self.bodies.extend(map(encode_record, records))
            if world.rng.random() < COMPACTED:
                self._compact()
            world.judge.journaled(records)
            if lost or not daemon.alive:
                return self._end(daemon, lost)
            return durable()

        world.later(self.seconds * world.rng.uniform(0.5, 1.5), commit)

    def records(self) -> list[AnyRecord]:
        """What the next daemon begins with: all since the newest fold of the rest."""
        records = [decode_record(body) for body in self.bodies]
        folds = [number for number, record in enumerate(records) if isinstance(record, MemorySaved)]
        return records[folds[-1] if folds else 0 :]

    def _compact(self) -> None:
        memory = Memory()
        for record in self.records():
            replay(memory, record)
        self.bodies.append(encode_record(saved(memory)))

    def _end(self, daemon: "SimulatedDaemon", lost: bool) -> None:
        """JournalLost: the outcome is unknown until it is read anew."""
        if lost:
            self._world.note("the journal is lost")
            self._world.kill_daemon()


@dataclass(frozen=True, slots=True)
class Staged:
    """A STABLE marker: whether it carries its generation, and of which staging of the step it is."""

    version: Version
    empty: bool
    restaged: int


class RunDirectory:
    """STABLE markers, and those that the daemon puts beside them."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._stable: dict[int, Staged] = {}

    def stage(self, version: Version, restaged: int) -> None:
        self._stable[version.step] = Staged(version, self._world.rng.random() < 0.3, restaged)
        self._world.later(self._world.latency(), self._world.wake_scan)

    def write(self, command: WriteMarker) -> None:
        """An outcome settles the staging that it is about."""
        version = command.version
        if command.kind == "COMMITTED":
            self._world.judge.told(version, True)
        here = self._stable.get(version.step)
        again = int(command.facts.get("restaged", 0))
        if command.kind != "TRANSFER_READY" and here is not None and here.version == version and here.restaged <= again:
            del self._stable[version.step]

    def waiting(self) -> tuple[StableSeen, ...]:
        return tuple(
            StableSeen(step, None if staged.empty else staged.version.generation)
            for step, staged in sorted(self._stable.items())
        )
