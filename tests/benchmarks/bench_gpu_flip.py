"""What exchanging two sets of pages costs by itself, by their size and that of their chunks. Needs torch and a GPU.

    make bench-gpu-flip

Prints one JSON object a line; the spread is the distance between the quartiles. Each size has a process of its own,
because pages stay for as long as theirs. The value is the flip, for which an engine stands still. ``settle_ms``: what
follows beside its batches, on an idle device, and ``settle_busy_ms`` on one that computes. ``launch_ms``: the longest
of the launches that a thread makes meanwhile, one after the other, and ``launch_alone_ms`` without it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch
from weightsync.agents.memory.pages.paged import into_pages

GB, GIB, FLIPS = 10**9, 1 << 30, 41
TENSOR_BYTES = 10**8
BUSY_PRODUCTS, LAUNCHES = 40, 400


def milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def beside(call: Callable[[], object], matrix: torch.Tensor, vector: torch.Tensor) -> tuple[float, float]:
    """How long ``call`` takes on another thread while the device computes, and the longest launch meanwhile."""
    torch.cuda.synchronize()
    for _ in range(BUSY_PRODUCTS):
        torch.mm(matrix, matrix)
    took: list[float] = []
    other = threading.Thread(target=lambda: took.append(milliseconds(call)))
    other.start()
    longest = max(milliseconds(lambda: vector.add_(1)) for _ in range(LAUNCHES))
    other.join()
    torch.cuda.synchronize()
    return took[0], longest


def measure(gigabytes: int, chunk_gib: int) -> None:
    weights = [
        torch.empty(TENSOR_BYTES, dtype=torch.uint8, device="cuda") for _ in range(gigabytes * GB // TENSOR_BYTES)
    ]
    began = time.perf_counter()
    pages = into_pages(weights, chunk_bytes=chunk_gib * GIB)
    torch.cuda.synchronize()
    moved = time.perf_counter() - began
    matrix, vector = torch.randn(4096, 4096, device="cuda"), torch.zeros(1024, device="cuda")
    times, settles, busy, launches, alone = [], [], [], [], []
    for _ in range(FLIPS):
        torch.cuda.synchronize()
        times.append(milliseconds(pages.flip))
        settles.append(milliseconds(pages.settle))
        pages.flip()
        for took, into in zip(beside(pages.settle, matrix, vector), (busy, launches), strict=True):
            into.append(took)
        alone.append(beside(lambda: None, matrix, vector)[1])
    low, middle, high = statistics.quantiles(times, n=4)
    lists = {"settle": settles, "settle_busy": busy, "launch": launches, "launch_alone": alone}
    facts = {f"{name}_ms": round(statistics.median(values), 4) for name, values in lists.items()}
    facts |= {"longest_ms": round(max(times), 4)}
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
