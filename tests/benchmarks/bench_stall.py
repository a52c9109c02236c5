"""How long a stream stands still while a version is pushed, beside how long it does without, on this machine.

    make bench-stall

Prints one JSON object a line. One client streams from a real vLLM; a *gap* is the time between two tokens that it gets.
Windows with a push and windows of the same length without one alternate; each gives its longest gap. The spread is the
distance between the quartiles.

``stall_<mode>_over_idle`` is the longest gap with a push over that of the window before it. ``stall_<mode>_ms`` is the
difference of the two, and ``stall_copy_growth_8x`` that of 1 GB of weights over that of an eighth of it. In ``copy`` a
push costs a stream the local copy, which takes about as long as a step that reads all weights once, and what digests
beside it take from the cores; in ``flip`` an exchange of pages in place of the copy; in ``live`` the whole round.

What it is made of: ``stall_<mode>_step_ms`` is an ordinary gap, the median of the window without a push;
``stall_<mode>_switch_ms`` is for how long the engine took no step, as it says itself; a gap that holds both is
``stall_<mode>_floor`` ordinary ones. ``stall_copy_switch_over_memcpy`` compares the switch with a memcpy of as many
bytes in this process, the quickest of three, for the engine goes on reading its weights beside it.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.bench_e2e import LARGE, report, say
from fleet import Fleet, fleet
from serving import DEFAULT_PROMPTS, VllmServer, tiny_qwen3
from weightsync.agents.memory.arena import host_arena
from weightsync.agents.turns import no_collection

EIGHTH: dict[str, Any] = {**LARGE, "num_hidden_layers": 3, "vocab_size": 8192}
TOKENS = 240
AFTER_SECONDS = 0.5
"""Of a window, after ``publish`` has returned: what is still computed beside the engine then counts, too."""


class Stream:
    """A client that streams one answer after the other and notes when each token came."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self._gaps: list[tuple[float, float]] = []
        self._stop, self._lock, self._under_way = threading.Event(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._under_way.wait(120):
            raise TimeoutError("the engine has said nothing for two minutes")
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join(120)

    def _run(self) -> None:
        while not self._stop.is_set():
            came: list[float] = []
            for _ in self._server.stream(DEFAULT_PROMPTS[0], TOKENS):
                came.append(time.monotonic())
                with self._lock:
                    self._gaps += itertools.pairwise(came[-2:])
                if len(came) > 1:
                    self._under_way.set()
                if self._stop.is_set():
                    return

    def median(self, begin: float, end: float) -> float:
        """Seconds; of the gaps that are wholly between ``begin`` and ``end``."""
        with self._lock:
            return statistics.median(after - before for before, after in self._gaps if before > begin and after < end)

    def longest(self, begin: float, end: float) -> float:
        """Seconds; of the gaps that are at least partly between ``begin`` and ``end``."""
        with self._lock:
            return max((after - before for before, after in self._gaps if after > begin and before < end), default=0.0)


@dataclass(frozen=True, slots=True)
class Pair:
    """A window without a push and one with: the longest gap of each, and what they are made of, in seconds."""

    idle: float
    push: float
    step: float
    switch: float
    memcpy: float


class Memcpy:
    """A copy of ``size`` bytes, each time between the same two ranges of memory."""

    def __init__(self, size: int) -> None:
        self._source, self._target = host_arena(size, pin=False), host_arena(size, pin=False)
        self._source.fill_(1)
        self()

    def __call__(self) -> float:
        """Seconds."""
        began = time.monotonic()
        self._target.copy_(self._source)
        return time.monotonic() - began


def windows(whole: Fleet, server: VllmServer, pushes: int) -> list[Pair]:
    """One pair for each push."""
    trainer, found = whole.trainers[0], []
    for step in (1, 2):  # they pay for wiring and page tables
        told = trainer.publish(step, save=False)
        assert told["sequence"] == step
    memcpy = Memcpy(whole.ask("/rounds?last=1")["rounds"][0]["bytes"])
    with Stream(server) as stream, no_collection():
        length = told["seconds"] + AFTER_SECONDS
        for step in range(3, pushes + 3):
            begin = time.monotonic()
            time.sleep(length)
            between = time.monotonic()
            assert trainer.publish(step, save=False)["sequence"] == step
            time.sleep(AFTER_SECONDS)
            end = time.monotonic()
            length = end - between
            longest = stream.longest(begin, between), stream.longest(between, end)
            switch = whole.ask("/rounds?last=1")["rounds"][0]["switch_ms"] / 1e3
            found.append(Pair(*longest, stream.median(begin, between), switch, min(memcpy() for _ in range(3))))
    return found


def measure(model: dict[str, Any], mode: str, directory: Path, pushes: int) -> list[Pair]:
    say(f"{mode}, {model['num_hidden_layers']} layers, {pushes} pushes …")
    directory.mkdir(parents=True, exist_ok=True)
    path = tiny_qwen3(directory / "model", seed=1, **model)
    server = VllmServer(path, env={"WEIGHTSYNC_MODE": mode}, log=directory / "vllm.log").start()
    try:
        with fleet(directory / "fleet", {"engine": server}, settings={"pause": {"cache": "keep"}}) as whole:
            trainer = whole.start_trainer(path)
            server.wait_ready()
            trainer.hear()
            return windows(whole, server, pushes)
    finally:
        server.close()


def stalls(pairs: Sequence[Pair]) -> list[float]:
    return [(pair.push - pair.idle) * 1e3 for pair in pairs]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pushes", type=int, default=10)
    arguments.add_argument("--modes", nargs="+", default=["copy", "flip", "live"], choices=["copy", "flip", "live"])
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightsync-bench-") as parent:
        for mode in given.modes:
            pairs = measure(LARGE, mode, Path(parent) / mode, given.pushes)
            report(f"stall_{mode}_over_idle", [pair.push / pair.idle for pair in pairs], "ratio")
            report(f"stall_{mode}_ms", stalls(pairs), "ms")
            report(f"stall_{mode}_idle_gap_ms", [pair.idle * 1e3 for pair in pairs], "ms")
            if mode != "live":
                report(f"stall_{mode}_step_ms", [pair.step * 1e3 for pair in pairs], "ms")
                report(f"stall_{mode}_switch_ms", [pair.switch * 1e3 for pair in pairs], "ms")
                report(f"stall_{mode}_floor", [1 + pair.switch / pair.step for pair in pairs], "ratio")
            if mode == "copy":
                report("stall_copy_switch_over_memcpy", [pair.switch / pair.memcpy for pair in pairs], "ratio")
                eighth = stalls(measure(EIGHTH, mode, Path(parent) / "eighth", given.pushes))
                report("stall_copy_eighth_ms", eighth, "ms")
                growth = statistics.median(stalls(pairs)) / statistics.median(eighth)
                line = {"figure": "stall_copy_growth_8x", "value": round(growth, 2), "unit": "ratio"}
                print(json.dumps(line | {"n": len(eighth), "spread": 0.0}), flush=True)


if __name__ == "__main__":
    main()
