"""What a version costs end to end: daemon, one trainer rank, a real vLLM, over NIXL, on this machine.

    make bench-e2e

Prints one JSON object a line. The small model shows what does not depend on bytes (rounds, pause, stall, the daemon's
own share); the large one, 1 GB, shows the wire, beside a memcpy and bare NIXL of the same bytes between two processes,
alternating with the rounds. The spread is the distance between the quartiles.

``e2e_daemon_overhead_ms`` is what remains of ``publish`` in the trainer after converting, digesting slots and live
memory, the wire, applying, and waiting for the engine's HTTP routes: durations, of monotonic clocks of one host.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bare_nixl import BareWriter
from fleet import Fleet, fleet
from serving import VllmServer, qwen3_config, tiny_qwen3

SMALL: dict[str, Any] = {}
LARGE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 65536,
}  # fmt: skip
"""1.03 GB in bf16."""


def report(figure: str, values: list[float], unit: str) -> None:
    quartiles = statistics.quantiles(values, n=4)
    line = {
        "figure": figure,
        "value": round(statistics.median(values), 4),
        "unit": unit,
        "n": len(values),
        "spread": round(quartiles[2] - quartiles[0], 4),
    }
    print(json.dumps(line), flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rounds_of(whole: Fleet, rounds: int, between: Callable[[], None]) -> tuple[list[dict[str, float]], list[float]]:
    """Times of each committed round (milliseconds by name), and what ``publish`` took in the trainer (seconds)."""
    trainer = whole.trainers[0]
    published = []
    for step in range(1, rounds + 2):  # the first one pays for wiring and page tables
        told = trainer.publish(step, save=False)
        if "error" in told:
            raise RuntimeError(
                f"step {step} was not committed: {told['error']}\n{whole.daemon and whole.daemon.tail()}"
            )
        published.append(told["seconds"])
        between()
    rows = whole.ask(f"/rounds?last={rounds}")["rounds"]
    return [row["times_ms"] | {"bytes": row["bytes"]} for row in rows], published[1:]


def overhead(times: dict[str, float], published: float) -> float:
    known = ("convert", "slot_digest", "wire", "apply", "digest", "http")
    return published * 1e3 - sum(times[name] for name in known)


def run(model: dict[str, Any], directory: Path, rounds: int, between: Callable[[Fleet], None]) -> Any:
    path = tiny_qwen3(directory / "model", seed=1, **model)
    server = VllmServer(path, env={"WEIGHTSYNC_MODE": "live"}, log=directory / "vllm.log").start()
    try:
        with fleet(directory / "fleet", {"engine": server}) as whole:
            trainer = whole.start_trainer(path)
            server.wait_ready()
            trainer.hear()
            return rounds_of(whole, rounds, lambda: between(whole))
    finally:
        server.close()


def small(directory: Path, rounds: int) -> None:
    say(f"small model, {rounds} rounds …")
    began: list[float] = []
    times, published = run(SMALL, directory, rounds, lambda whole: began.append(time.monotonic()))
    gaps = [after - before for before, after in itertools.pairwise(began)]
    report("e2e_rounds_per_second", [1 / gap for gap in gaps], "1/s")
    report("e2e_pause_ms", [row["pausing"] for row in times], "ms")
    report("e2e_stall_ms", [row["stall"] for row in times], "ms")
    pairs = zip(times, published, strict=True)
    report("e2e_daemon_overhead_ms", [overhead(row, seconds) for row, seconds in pairs], "ms")


def large(directory: Path, rounds: int) -> None:
    say(f"large model ({qwen3_config(**LARGE)['hidden_size']} wide), {rounds} rounds …")
    bare, copies = [], []
    writer: list[BareWriter] = []

    def beside(whole: Fleet) -> None:
        if not writer:
            writer.append(BareWriter(whole.ask("/plan/layouts")))
        bare.append(writer[0].write())
        copies.append(writer[0].memcpy())

    try:
        times, _ = run(LARGE, directory, rounds, beside)
    finally:
        for one in writer:
            one.close()
    wire = [row["wire"] / 1e3 for row in times]
    size = times[0]["bytes"]
    report("e2e_bytes", [row["bytes"] for row in times], "bytes")
    report("e2e_wire_gb_per_second", [size / seconds / 1e9 for seconds in wire], "GB/s")
    report("e2e_wire_over_memcpy", _ratios(copies[1:], wire), "ratio")
    report("e2e_wire_over_bare_nixl", _ratios(bare[1:], wire), "ratio")
    report("e2e_stall_1gb_ms", [row["stall"] for row in times], "ms")


def _ratios(reference: list[float], ours: list[float]) -> list[float]:
    return [one / other for one, other in zip(reference, ours, strict=True)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=30, help="of the small model")
    arguments.add_argument("--large-rounds", type=int, default=9, help="of the 1 GB model")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightsync-bench-") as directory:
        small(Path(directory) / "small", given.rounds)
        large(Path(directory) / "large", given.large_rounds)


if __name__ == "__main__":
    main()
