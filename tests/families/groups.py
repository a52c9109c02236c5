"""Runs the judge over families, in groups of processes with a deadline: one family's crash costs only itself."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import preloaded
from ports import free_port
from serving import environment

JUDGE: Final = Path(__file__).with_name("judge.py")
START_SECONDS: Final = 240.0
"""Imports and process groups: 15 s on two idle cores."""
FAMILY_SECONDS: Final = 150.0
"""One family: 3 s on two idle cores. One that takes longer has a rank that waits for the other for good."""
FAILED_SECONDS: Final = 30.0
"""How long a rank that failed waits for one that stands in a collective of vLLM's."""
GROUP: Final = 16
"""Families of one group of processes; engines leave some memory behind."""
BEFORE_WRITING: Final = ("transformers", "engine", "trainer", "planner")
"""Stages in which no byte has moved: who ends there has been refused."""
STAGES: Final = (*BEFORE_WRITING, "write", "refresh", "fresh engine", "compare")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a family at one degree of tensor parallelism.

    ``outcome``: ``same``, ``refused`` or ``wrong``; ``reason``: who refused it or what differs, empty for ``same``.
    """

    family: str
    tensor_parallel: int
    outcome: str
    reason: str = ""


def verdicts(names: Sequence[str], tensor_parallel: int, directory: Path) -> Iterator[Verdict]:
    """One verdict per family, in order, as groups of processes come to them.

    Args:
        directory: an existing one, for model files and the logs of the ranks.
    """
    left = list(names)
    for number in count():
        if not left:
            return
        here = directory / f"tp{tensor_parallel}_{number}"
        here.mkdir()
        done = _group(left[:GROUP], tensor_parallel, here)
        yield from done
        left = left[len(done) :]


def _group(names: Sequence[str], world: int, directory: Path) -> list[Verdict]:
    """Verdicts on the first of ``names``, at least one: up to the family at which a process crashed or hung."""
    port = str(free_port())
    # In this process's environment nothing may be left over from a launcher of its own.
    settings = {k: v for k, v in environment(directory).items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    logs = [(directory / f"rank_{rank}.log").open("w") for rank in range(world)]
    ranks = [
        preloaded.start(
            "vllm",
            [sys.executable, str(JUDGE), str(rank), str(world), port, str(directory), *names],
            settings,
            log.fileno(),
            log.fileno(),
        )
        for rank, log in enumerate(logs)
    ]
    try:
        ended = _watch(ranks, directory)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return _read(names, world, directory, ended)


def _watch(ranks: Sequence[preloaded.Child], directory: Path) -> str:
    """Wait for all ranks; returns how they ended, empty if well.

    Raises:
        RuntimeError: the judge itself failed: with an exception, or before the first family.
    """
    files = [directory / f"rank_{rank}.jsonl" for rank in range(len(ranks))]
    deadline, size, late = time.monotonic() + START_SECONDS, 0, ""
    while None in (codes := [process.poll() for process in ranks]) and not any(codes) and not late:
        now = sum(file.stat().st_size for file in files if file.exists())
        if now != size:
            failed = any("failed" in line for file in files for line in _lines(file)[-1:])
            deadline, size = time.monotonic() + (FAILED_SECONDS if failed else FAMILY_SECONDS), now
        if time.monotonic() > deadline:
            late = "a rank waited for another for good"
        time.sleep(0.2)
    ends = sorted((code, rank) for rank, code in enumerate(codes) if code)
    ended = f"rank {ends[0][1]} ended with {ends[0][0]}" if ends else late
    # A crash is a signal, after which the other ranks end with an exception; one without a signal is a bug.
    signals = [code for code in codes if code and code < 0]
    if not all(file.exists() for file in files) or (any(codes) and not signals):
        raise RuntimeError(f"the judge failed: {ended}; see the logs in {directory}")
    return ended


def _read(names: Sequence[str], world: int, directory: Path, ended: str) -> list[Verdict]:
    done: list[Verdict] = []
    lines = [_lines(directory / f"rank_{rank}.jsonl") for rank in range(world)]
    for name in names:
        own = [line for of_rank in lines for line in of_rank if line["family"] == name]
        outcomes = [line for line in own if "outcome" in line]
        if len(outcomes) < world:
            # The ranks ended here; the next group goes on behind it.
            stages = [line["stage"] for line in own if "stage" in line] or [STAGES[0]]
            last = max(stages, key=STAGES.index)
            outcome = "refused" if last in BEFORE_WRITING else "wrong"
            reasons = [line["failed"] for line in own if "failed" in line]
            return [*done, Verdict(name, world, outcome, (reasons or [f"{last}: {ended or 'the process ended'}"])[0])]
        # All ranks agree on it; were they not to, the worst would count.
        worst = max(outcomes, key=lambda line: ("same", "refused", "wrong").index(line["outcome"]))
        done.append(Verdict(name, world, worst["outcome"], worst["reason"]))
    return done


def _lines(file: Path) -> list[dict[str, str]]:
    """The whole lines of ``file``, which may be growing."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
