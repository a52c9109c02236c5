"""What exchanging two sets of pages costs by itself, by their size and that of their chunks. Needs torch and a GPU.

    make bench-gpu-flip

Prints one JSON object a line; the spread is the distance between the quartiles. Each size has a process of its own,
because pages stay for as long as theirs. ``served_ms`` is the part of a flip after which the served addresses mean the
other set: what an engine would have to stand still for, if standby got its pages later.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from weightsync.agents.memory.pages.paged import into_pages
from weightsync.agents.memory.pages.ranges import PhysicalChunks

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
    times, served = [], []
    show = pages._live.show

    def timed(chunks: PhysicalChunks) -> None:
        at = time.perf_counter()
        show(chunks)
        served.append(1e3 * (time.perf_counter() - at))

    pages._live.show = timed  # type: ignore[method-assign]
    for _ in range(FLIPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        pages.flip()
        times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = statistics.quantiles(times, n=4)
    facts = {"longest_ms": round(max(times), 4), "served_ms": round(statistics.median(served), 4)}
    facts |= {"into_pages_ms": round(1e3 * moved, 1), "pages_bytes": pages.bytes}
    line = {"figure": f"flip_{gigabytes}_gb_chunks_{chunk_gib}_gib_ms", "value": round(middle, 4), "unit": "ms"}
    line |= {"n": FLIPS, "spread": round(high - low, 4), "device": torch.cuda.get_device_name(0)}
    print(json.dumps(line | facts), flush=True)


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
