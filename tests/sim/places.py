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

    def __init__(self, world: "World", copied: "Disk | None" = None) -> None:
        self._world = world
        self._is_copy = copied is not None
        self.bodies: list[bytes] = [] if copied is None else list(copied.bodies)
        self.seconds = 0.002
        """Of one commit."""
        self._under_way: list[tuple[Record, bytes]] = []

    def append(self, records: list[Record], daemon: "SimulatedDaemon", durable: Work) -> None:
        """``durable`` is called when they are; the daemon ends where that is not known."""
        world = self._world
        self._under_way = written = [(record, encode_record(record)) for record in records]

        def commit() -> None:
            if not daemon.alive:
                return  # ``interrupted`` has decided
            lost = world.faults.happens("disk")
            if not lost or world.rng.random() < 0.5:
                self._write(written)
            self._under_way = []
            if lost:
                world.note("the journal is lost: what is on disk is not known until it is read anew")
                world.kill_daemon()
            else:
                durable()

        world.later(self.seconds * world.rng.uniform(0.5, 1.5), commit)

    def interrupted(self) -> None:
        """The daemon dies: what it was writing is there as a whole, or not at all."""
        written, self._under_way = self._under_way, []
        if written and self._world.rng.random() < 0.5:
            self._write(written)

    def _write(self, written: list[tuple[Record, bytes]]) -> None:
        self.bodies.extend(body for _, body in written)
        if self._world.rng.random() < COMPACTED:
            self._compact()
        self._world.judge.journaled([record for record, _ in written], in_order=not self._is_copy)

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
