"""What our write path costs over bare NIXL: the same bytes to the same process, alternating, in one run.

    python tests/benchmarks/bench_nixl.py [--bytes N] [--tensors N] [--repeat N] [--tls TRANSPORTS]

Prints ``nixl_write_over_bare`` (a ratio, for 1 GB in 300 tensors) and the two rates behind it, one JSON
object a line. Bare means: one handle over all descriptors, posted and polled in a tight loop, with no deadline, no
window and no event loop.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from weightsync.agents.transport.nixl.edge import Edge
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.layout import Matrix, Region
from weightsync.orchestrator.protocol.messages import NixlSettings

DEADLINE_SECONDS = 120.0


def tensor_runs(total: int, tensors: int) -> Matrix:
    """Runs of a dense transformer's mix of sizes, with a gap after each so that none can be merged."""
    weights = np.random.default_rng(0).lognormal(0, 1, tensors)
    lengths = np.maximum((weights / weights.sum() * total).astype(np.int64) // 256 * 256, 256)
    lengths[-1] += total - lengths.sum()
    offsets = np.cumsum(lengths + 256) - lengths - 256
    zero = np.zeros(tensors, dtype=np.int64)
    return np.stack([zero, zero, offsets, zero, offsets, lengths], axis=1)


def arena(total: int) -> tuple[np.ndarray, Region]:
    memory = np.random.default_rng(1).integers(0, 256, total, dtype=np.uint8)
    return memory, Region(int(memory.ctypes.data), total)


def target(size: int, tls: str | None) -> None:
    """The other process: registers, says where, and polls until its standard input closes."""
    import select

    memory, region = arena(size)
    endpoint = NixlEndpoint("target", NixlSettings(), variables={"UCX_TLS": tls} if tls else {})
    endpoint.register([region])
    print(json.dumps([endpoint.name, endpoint.metadata().hex(), region.base]), flush=True)
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        endpoint.poll()
    endpoint.close()
    del memory


def bare_handle(edge: Edge, agent: Any) -> Any:
    """One NIXL handle over everything that the edge writes, from lists of whole runs."""
    [lane] = edge.lanes
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", lane.local, lane.local_memory)
    remote = agent.prep_xfer_dlist(edge.peer, lane.remote, lane.remote_memory)
    indices = np.arange(len(lane.local), dtype=np.int32)
    return agent.make_prepped_xfer("WRITE", local, indices, remote, indices)


def bare_seconds(agent: Any, handle: Any) -> float:
    begin = time.perf_counter()
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    if state != "DONE":
        raise RuntimeError(f"bare NIXL ended with {state}")
    return time.perf_counter() - begin


async def our_seconds(endpoint: NixlEndpoint, edge: Edge) -> float:
    begin = time.perf_counter()
    [result] = await endpoint.write([edge], deadline_seconds=DEADLINE_SECONDS)
    if result.error is not None:
        raise result.error
    return time.perf_counter() - begin


async def measure(options: argparse.Namespace, name: str, card: bytes, base: int) -> tuple[list[float], list[float]]:
    runs = tensor_runs(options.bytes, options.tensors)
    size = int(runs[-1, 2] + runs[-1, 5])
    memory, region = arena(size)
    endpoint = NixlEndpoint("writer", NixlSettings(), variables={"UCX_TLS": options.tls} if options.tls else {})
    endpoint.register([region])
    endpoint.connect(name, card)
    there = Region(base, size)
    edge = endpoint.prepare_edge(name, [region], [there], runs)
    plain = endpoint.prepare_edge(name, [region], [there], runs, chunk_bytes=1 << 62)
    agent = endpoint._agent
    handle = bare_handle(plain, agent)
    ours, bare = [], []
    for repetition in range(options.repeat + 1):
        if repetition % 2:  # whoever goes second finds warmer caches
            plain_time, our_time = bare_seconds(agent, handle), await our_seconds(endpoint, edge)
        else:
            our_time, plain_time = await our_seconds(endpoint, edge), bare_seconds(agent, handle)
        if repetition:  # the first pays for page tables and wiring
            ours.append(our_time)
            bare.append(plain_time)
    handle.release()
    endpoint.close()
    del memory
    return ours, bare


def report(figure: str, values: list[float], unit: str) -> None:
    """One line; the spread is the distance between the quartiles."""
    quartiles = statistics.quantiles(values, n=4)
    line = {
        "figure": figure,
        "value": round(statistics.median(values), 4),
        "unit": unit,
        "n": len(values),
        "spread": round(quartiles[2] - quartiles[0], 4),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--tls", help="UCX_TLS of both ends, such as tcp; default: UCX's choice")
    parser.add_argument("--target", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        target(options.target, options.tls)
        return
    runs = tensor_runs(options.bytes, options.tensors)
    command = [sys.executable, __file__, "--target", str(int(runs[-1, 2] + runs[-1, 5]))]
    command += ["--tls", options.tls] if options.tls else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, card, base = json.loads(process.stdout.readline())
        ours, bare = asyncio.run(measure(options, name, bytes.fromhex(card), base))
    report("nixl_write_over_bare", [b / o for o, b in zip(ours, bare, strict=True)], "ratio")
    report("nixl_write", [options.bytes / seconds / 1e9 for seconds in ours], "GB/s")
    report("nixl_bare", [options.bytes / seconds / 1e9 for seconds in bare], "GB/s")


if __name__ == "__main__":
    main()
