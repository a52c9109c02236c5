"""What goes wrong in a simulated fleet: by chance at each step, or for a while; and who suffered from it since when."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from simulated_engine import Worker
from weightsync.orchestrator.protocol.names import Member

if TYPE_CHECKING:
    from world import World
    from writing import Writer

CHANCES: Final[Mapping[str, float]] = {
    "commands": 0.0008,  # the daemon is killed between two of its commands
    "disk": 0.004,  # the journal fails in a commit
    "refused": 0.01,  # an engine answers 500
    "lost": 0.01,  # an answer of an engine is lost
    "late": 0.01,  # an engine performs a call after its deadline
    "delayed": 0.004,  # a message takes its time, and those behind it
    "corrupt": 0.004,  # a write lands as garbage
    "short": 0.004,  # a writer claims other bytes than it was to write
    "switch": 0.01,  # a switch fails half way
}
"""Of each kind of chance, each time it is asked for."""


class Faults:
    """``kinds``: those of CHANCES that may happen. The rest is done to the world by ``disturbances``."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.kinds: frozenset[str] = frozenset()
        self.cut: set[str] = set()
        """Engines whose admin routes cannot be reached, though their agents are connected."""
        self.cut_answers: set[str] = set()
        """Engines whose answers are lost."""
        self.broken_edges: set[str] = set()
        """Engines into whose memory nothing can be written."""
        self.gone_paths: set[str] = set()
        """Endpoints that nothing reaches any more, and no writer hears of it."""
        self.waiting_wires = False
        """Writes into the memory of a stopped process wait; else they land (RDMA)."""
        self._sick: dict[str, int] = {}
        self._since: dict[str, float] = {}

    def happens(self, kind: str, engine: str = "") -> bool:
        """Whether it does now. ``engine``: the only one that has a right to suffer from it; else all have."""
        if kind not in self.kinds or self._world.rng.random() >= CHANCES[kind]:
            return False
        self._world.note(f"FAULT {kind} {engine}")
        self.hurt([engine] if engine else self._world.servers)
        return True

    # ------------------------------------------------------------------------------------------------ who is healthy
    def hurt(self, engines: Iterable[str]) -> None:
        """Something happened to these just now."""
        for name in self._units(engines):
            self._since[name] = self._world.now

    def begin(self, engines: Iterable[str]) -> Callable[[], None]:
        """Something is wrong with these from now on, until what is returned is called."""
        names = self._units(engines)
        for name in names:
            self._sick[name] = self._sick.get(name, 0) + 1

        def end() -> None:
            for name in names:
                self._sick[name] -= 1
            self.hurt(names)

        return end

    def _units(self, engines: Iterable[str]) -> list[str]:
        return sorted({other for name in engines for other in self._world.unit(name)})

    def healthy_since(self, name: str) -> float:
        """Nothing has gone wrong with the engine, its pair, the trainer or the daemon since then."""
        if self._sick.get(name):
            return float("inf")
        return self._since[name] + self._world.aftermath if name in self._since else -1.0

    # ------------------------------------------------------------------------------------------------ asked by models
    def edge_is_broken(self, rank: "Writer", target: Member) -> bool:
        return target.engine in self.broken_edges

    def wire_waits(self, worker: Worker) -> bool:
        return self.waiting_wires
