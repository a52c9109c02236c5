"""What a process holds, and by how much that grows over its life."""

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

WARM_ROUNDS = 20
"""Rounds of a process that are not looked at: its first ones load libraries, wire connections and fill caches."""

LEAST_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process held after ``round`` rounds of the run: some or all of what is known of it."""

    process: str
    pid: int
    round: int
    held: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Growth:
    """By how much ``what`` of one process grew within its life, and in how many rounds of it.

    ``by``: the median of the last quarter of its samples less that of the second, since in the first it warms up.
    """

    process: str
    pid: int
    what: str
    by: float
    rounds: float


@dataclass
class Measured:
    """All samples of a run; ``file`` takes them as JSON lines, for people."""

    file: Path | None = None
    samples: list[Sample] = field(default_factory=list)

    def take(self, process: str, pid: int, number: int, counts: Mapping[str, float]) -> None:
        """A sample of a living process, with what it has counted itself."""
        sample = Sample(process, pid, number, {**held_by(pid), **counts})
        self.samples.append(sample)
        if self.file is not None:
            with self.file.open("a") as lines:
                lines.write(json.dumps(asdict(sample)) + "\n")

    def growths(self) -> list[Growth]:
        """Of everything that was sampled often enough after the process was warm."""
        lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)
        for sample in self.samples:
            lives[sample.process, sample.pid].append(sample)
        found = (growth(life, what) for life in lives.values() for what in sorted({w for s in life for w in s.held}))
        return [known for known in found if known is not None]


def growth(life: list[Sample], what: str) -> Growth | None:
    """Of one process by its samples, in their order; None for fewer than LEAST_SAMPLES."""
    first = life[0]
    known = [s for s in life if what in s.held and s.round >= first.round + WARM_ROUNDS]
    if len(known) < LEAST_SAMPLES:
        return None
    quarter = len(known) // 4
    early, late = known[quarter : 2 * quarter], known[-quarter:]
    rounds = statistics.mean(s.round for s in late) - statistics.mean(s.round for s in early)
    by = statistics.median(s.held[what] for s in late) - statistics.median(s.held[what] for s in early)
    return Growth(first.process, first.pid, what, by, rounds)


def held_by(pid: int) -> dict[str, float]:
    """``rss_mb`` (10^6 bytes), open ``fds`` and ``threads``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) * 1024 / 1e6,
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def megabytes_in(directory: Path) -> float:
    """Of all files directly in it."""
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file()) / 1e6
