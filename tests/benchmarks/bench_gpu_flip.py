"""What exchanging two sets of pages costs by itself, by their size and that of their chunks. Needs torch and a GPU.

    make bench-gpu-flip

Prints one JSON object a line; the spread is the distance between the quartiles. Each size has a process of its own,
because pages stay for as long as theirs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from weightsync.agents.memory.pages.paged import into_pages

GB, GIB, FLIPS = 10**9, 1 << 30, 41
TENSOR_BYTES = 10**8


def measure(gigabytes: int, chunk_gib: int) -> None:
    weights = [
        torch.empty(TENSOR_BYTES, dtype=torch.uint8, device="cuda") for _ in range(gigabytes * GB // TENSOR_BYTES)
    ]
    began = time.perf_counter()
    pages = into_pages(weights, chunk_bytes=chunk_gib * GIB)
    torch.cuda.synchronize()
    moved = time.perf_counter() - began
    times = []
    for _ in range(FLIPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        pages.flip()
        times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = statistics.quantiles(times, n=4)
    facts = {"gb": gigabytes, "chunk_gib": chunk_gib, "n": FLIPS, "device": torch.cuda.get_device_name(0)}
    for figure, value, unit in (
        ("flip_ms", middle, "ms"),
        ("flip_spread_ms", high - low, "ms"),
        ("flip_max_ms", max(times), "ms"),
        ("into_pages_ms", 1e3 * moved, "ms"),
        ("pages_mib", pages.bytes / (1 << 20), "MiB"),
    ):
        print(json.dumps({"figure": figure, "value": round(value, 4), "unit": unit} | facts), flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gb", type=int, nargs="+", default=[2, 15])
    arguments.add_argument("--chunk-gib", type=int, nargs="+", default=[1, 4, 16])
    arguments.add_argument("--here", action="store_true", help="in this process: one size, one chunk")
    given = arguments.parse_args()
    for gigabytes in given.gb:
        for chunk in given.chunk_gib:
            if given.here:
                measure(gigabytes, chunk)
            else:
                size = ["--gb", str(gigabytes), "--chunk-gib", str(chunk)]
                subprocess.run([sys.executable, __file__, "--here", *size], check=True)


if __name__ == "__main__":
    main()
