"""What strangers cost a running fleet. JSON lines ``{"figure", "value", "unit", "n", "spread"}``.

    python tests/soak/flood.py [--rounds 40] [--blocks 5] [--half-open 2000] [--idle 2000] [--wrong 500] [--without-tls]

The daemon, a trainer rank and two stand-in engines, each a real process with a real agent, push version after version,
in turns without strangers, with them at the door of another process, and with them at the daemon's: so many half
requests and silent connections that are held, and taken again at most so often a second when they are ended, and so
many requests with a wrong token a second.

* ``flood_round_ratio``: median of a push's seconds with strangers over that without, over all blocks; ``spread`` of the
  blocks' own ratios.
* ``flood_control_ratio``: the same of strangers at the other process's door: what they cost as neighbours on this
  machine, whatever the daemon does. ``flood_over_control_ratio``: strangers here over strangers there.
* ``flood_log_lines``: lines of the daemon's log above level info, in all blocks with strangers.
* ``flood_rss_mb``: by how much the daemon's memory grew from its largest before the first strangers came (10^6 bytes).
* ``flood_connections_per_second``: that strangers opened, of all kinds.
* ``flood_daemon_share``, ``flood_strangers_share``: of one core, the processor time that the daemon spends beside what
  as many pushes cost it in the blocks without strangers, and that of the strangers themselves.
* ``flood_tls_…``: the same of a fleet with TLS, where half requests are half handshakes, and wrong tokens come behind
  whole ones. There is no other door to come to that shakes hands, so that its ratio has no bound: what the strangers
  cost as neighbours is in it.

Ends with 1 and says why if one is beyond its BOUNDS, or if a push failed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fleet import Process
from measure import held_by
from soak import Soak

HERE = Path(__file__).resolve().parent
WARM_ROUNDS = 10
SETTLE_SECONDS = 2.0
"""Of a flood before its first push that counts: all places are taken by then."""

BOUNDS: Final = {"flood_round_ratio": 1.1, "flood_log_lines": 99.0, "flood_rss_mb": 128.0}
"""Also with TLS, but for the first. ``flood_rss_mb``: 2,048 strangers of some 30 kB (``daemon/access/door.py``), or
half of them with 70 kB, and as much again for what the allocator keeps."""

TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Block:
    """Seconds of each push, lines of log above level info, what the strangers say that they did, and the daemon's
    processor seconds in so many ``passed``."""

    seconds: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
    spent: float = 0.0
    passed: float = 0.0

    def more_than(self, calm: "Block") -> float:
        """Of one core, what the daemon spends beside as many pushes as there were, each at its price in ``calm``."""
        return (self.spent - calm.spent * len(self.seconds) / len(calm.seconds)) / self.passed


@dataclass(frozen=True)
class Crowds:
    """Half requests and silent connections at a time, wrong tokens a second; all of it ``with_tls`` or without."""

    half: int
    idle: int
    wrong: int
    with_tls: bool = False


class Elsewhere:
    """``elsewhere.py``, a door that is not the daemon's."""

    def __init__(self, log: Path) -> None:
        self._process = Process([sys.executable, str(HERE / "elsewhere.py")], log, {}, pipe=True).start()
        child = self._process.child
        assert child is not None
        assert child.stdout is not None
        self.port = int(child.stdout.readline())

    def close(self) -> None:
        self._process.stop()


class Strangers:
    """``strangers.py``."""

    def __init__(self, port: int, crowds: "Crowds", log: Path) -> None:
        numbers = map(str, (port, crowds.half, crowds.idle, crowds.wrong))
        command = [sys.executable, str(HERE / "strangers.py"), *numbers, *["tls"] * crowds.with_tls]
        self._process = Process(command, log, {}, pipe=True).start()

    def order(self, word: str) -> dict[str, Any]:
        child = self._process.child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{word}\n".encode())
        child.stdin.flush()
        return dict(json.loads(child.stdout.readline()))

    def close(self) -> None:
        self._process.stop()


class Besieged:
    """A running fleet, and strangers at its door."""

    def __init__(self, directory: Path, crowds: Crowds) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.soak = Soak(directory, 1, 0, 0, with_tls=crowds.with_tls)
        self.soak.start()
        self.elsewhere = Elsewhere(directory / "elsewhere.log")
        self.strangers = Strangers(self.soak.fleet.port, crowds, directory / "strangers.log")
        self.neighbours = Strangers(self.elsewhere.port, crowds, directory / "neighbours.log")
        self._log = directory / "daemon.log"
        self._step = 0
        self.push(WARM_ROUNDS)

    def close(self) -> None:
        self.strangers.close()
        self.neighbours.close()
        self.elsewhere.close()
        self.soak.close()

    def push(self, rounds: int) -> list[float]:
        """Seconds of each.

        Raises:
            AssertionError: a version was not committed.
        """
        found = []
        trainer = self.soak.trainer
        assert trainer is not None
        for _ in range(rounds):
            self._step += 1
            trainer.tell(step=self._step)
            answer = trainer.hear()
            assert "sequence" in answer, answer
            found.append(float(answer["seconds"]))
        return found

    def memory(self) -> float:
        """The daemon's, in 10^6 bytes."""
        return held_by(self._daemon_pid())["rss_mb"]

    def _daemon_pid(self) -> int:
        child = self.soak.processes()["daemon"].child
        assert child is not None
        return child.pid

    def _processor_seconds(self) -> float:
        """The daemon's, since its start: utime and stime of proc(5)."""
        words = Path(f"/proc/{self._daemon_pid()}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / TICKS

    def block(self, rounds: int, crowd: Strangers | None) -> Block:
        """So many pushes, while ``crowd`` comes."""
        before = len(self._log.read_text().splitlines())
        made = Block()
        if crowd is not None:
            crowd.order("on")
            time.sleep(SETTLE_SECONDS)
        spent, began = self._processor_seconds(), time.monotonic()
        made.seconds = self.push(rounds)
        made.spent, made.passed = self._processor_seconds() - spent, time.monotonic() - began
        if crowd is not None:
            made.told = crowd.order("off")
        lines = self._log.read_text().splitlines()[before:]
        made.warnings = [line for line in lines if not line.startswith("{") or json.loads(line)["level"] != "info"]
        return made


def report(figure: str, value: float, unit: str, n: int, spread: float) -> str:
    """Print one figure; what is wrong with it, if it is beyond its bound."""
    line = {"figure": figure, "value": round(value, 4), "unit": unit, "n": n, "spread": round(spread, 4)}
    print(json.dumps(line), flush=True)
    bound = BOUNDS.get(figure.replace("flood_tls_", "flood_"))
    if figure == "flood_tls_round_ratio":
        bound = None
    return f"{figure} is {value:.4g}, more than {bound:g}" if bound is not None and value > bound else ""


def ratio(figure: str, blocks: list[Block], to: list[Block]) -> str:
    """Print a ratio of medians; what is wrong with it."""
    ratios = [statistics.median(b.seconds) / statistics.median(t.seconds) for b, t in zip(blocks, to, strict=True)]
    above, below = ([s for block in some for s in block.seconds] for some in (blocks, to))
    value = statistics.median(above) / statistics.median(below)
    return report(figure, value, "x", len(above), max(ratios) - min(ratios))


def figures(prefix: str, calm: list[Block], control: list[Block], flooded: list[Block], grown: float) -> list[str]:
    """Print them; what is beyond its bound. ``control``: none, or one for each of the others."""
    quiet = [s for block in calm for s in block.seconds]
    lines = [len(block.warnings) for block in flooded]
    kinds = ("half_open", "idle", "wrong_token")
    rates = [sum(block.told[kind]["opened"] for kind in kinds) / block.told["seconds"] for block in flooded]
    more = [with_them.more_than(without) for with_them, without in zip(flooded, calm, strict=True)]
    theirs = [block.told["cpu_seconds"] / block.told["seconds"] for block in flooded]
    report(f"{prefix}_round_calm_p50_ms", statistics.median(quiet) * 1e3, "ms", len(quiet), 0.0)
    wrong = [ratio(f"{prefix}_round_ratio", flooded, calm)]
    if control:
        wrong.append(ratio(f"{prefix}_control_ratio", control, calm))
        wrong.append(ratio(f"{prefix}_over_control_ratio", flooded, control))
    wrong.append(report(f"{prefix}_log_lines", sum(lines), "lines", len(lines), max(lines) - min(lines)))
    wrong.append(report(f"{prefix}_rss_mb", grown, "MB", 1, 0.0))
    for name, unit, values in (("connections_per_second", "1/s", rates), ("daemon_share", "core", more),
                               ("strangers_share", "core", theirs)):  # fmt: skip
        report(f"{prefix}_{name}", statistics.median(values), unit, len(values), max(values) - min(values))
    return [said for said in wrong if said]


def measured(prefix: str, directory: Path, crowds: Crowds, blocks: int, rounds: int) -> list[str]:
    """Print the figures of one fleet; what is beyond its bound."""
    besieged = Besieged(directory, crowds)
    try:
        calm, control, flooded = [], [], []
        before = after = besieged.memory()
        for _ in range(blocks):
            calm.append(besieged.block(rounds, None))
            if not crowds.with_tls:
                control.append(besieged.block(rounds, besieged.neighbours))
            flooded.append(besieged.block(rounds, besieged.strangers))
            after = max(after, besieged.memory())
            print(json.dumps(flooded[-1].told), *flooded[-1].warnings, sep="\n  ", file=sys.stderr, flush=True)
    finally:
        besieged.close()
    return figures(prefix, calm, control, flooded, after - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="pushes of one block")
    parser.add_argument("--blocks", type=int, default=5, help="with strangers, and as many without")
    parser.add_argument("--half-open", type=int, default=2000)
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--wrong", type=int, default=500)
    parser.add_argument("--without-tls", action="store_true")
    parser.add_argument("--keep", type=Path, help="a new directory for the logs; default: removed")
    given = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for prefix, with_tls in (("flood", False),) + (("flood_tls", True),) * (not given.without_tls):
            crowds = Crowds(given.half_open, given.idle, given.wrong, with_tls)
            wrong += measured(prefix, (given.keep or Path(scratch)) / prefix, crowds, given.blocks, given.rounds)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
