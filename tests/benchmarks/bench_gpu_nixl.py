"""NIXL between two processes of one GPU, with expandable segments on and arenas of ours.

    python tests/benchmarks/bench_gpu_nixl.py [--arena BYTES] [--tensors N] [--model BYTES] [--repeat N]

Prints one JSON object a line:

* ``nixl_vram_over_copy``: the rate of writing a 4 GiB arena into another process, over the rate of a device copy of as
  many bytes, alternating in one run.
* ``coalesced_over_per_tensor``: how much faster 20,000 tensors travel as pack + one write + scatter than with one
  descriptor each; at least 10. The first includes both kernels and asking the other process to scatter.
* ``nixl_vram``, ``device_copy``, ``coalesced``, ``per_tensor``, ``first_write``: what those are made of.

The bytes that arrived are compared after each way; a mismatch ends the run with an error.
"""

import argparse
import asyncio
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # read when torch first allocates

import numpy as np
import torch
from weightsync.agents.memory.arena import arena, region_of
from weightsync.agents.transport.nixl.edge import Edge
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.kernels.copy import PreparedCopy, prepare
from weightsync.orchestrator.protocol.layout import Matrix, Region
from weightsync.orchestrator.protocol.messages import NixlSettings

DEADLINE_SECONDS = 60.0
GPU = torch.device("cuda", 0)
POLL_SECONDS = 0.001
ALIGNMENT = 256


@dataclass(frozen=True)
class Model:
    """Where each tensor lies at the source, in the packed buffer and at the target, whose order is another."""

    length: np.ndarray
    source: np.ndarray
    packed: np.ndarray
    target: np.ndarray

    @property
    def span(self) -> int:
        return int((self.source + self.length).max()) + ALIGNMENT

    @property
    def packed_bytes(self) -> int:
        return int(self.packed[-1] + self.length[-1])

    def table(self, source: np.ndarray, target: np.ndarray) -> Matrix:
        """A kernel table that copies every tensor as one run."""
        table = np.zeros((len(self.length), 14), dtype=np.int64)
        table[:, 0], table[:, 2], table[:, 4] = self.length, source, target
        table[:, 5::3] = 1
        return table


def model(tensors: int, total: int) -> Model:
    """Tensors of 2 KiB upwards, lognormal, each on a 256-byte boundary with a gap before the next."""
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1, tensors)
    length = np.maximum((weights / weights.sum() * total).astype(np.int64) // 16 * 16, 2048)
    room = -(-length // ALIGNMENT) * ALIGNMENT
    gapped = room + ALIGNMENT
    order = rng.permutation(tensors)
    target = np.empty(tensors, dtype=np.int64)
    target[order] = np.cumsum(gapped[order]) - gapped[order]
    return Model(length, np.cumsum(gapped) - gapped, np.cumsum(room) - room, target)


def checksum(memory: torch.Tensor) -> int:
    """Order-sensitive: each 8-byte word times its odd place, modulo 2^64."""
    words = memory[: memory.numel() // 8 * 8].view(torch.int64)
    total = 0
    step = 1 << 27
    for begin in range(0, words.numel(), step):
        part = words[begin : begin + step]
        places = torch.arange(begin, begin + part.numel(), device=part.device) * 2 + 1
        total += int((part * places).sum())
    return total & 0xFFFF_FFFF_FFFF_FFFF


class Memory:
    """The arenas of one process: the large one, the model's, and the staging buffer, all registered."""

    def __init__(self, size: int, shape: Model) -> None:
        self.large = arena(size, GPU)
        self.model = arena(shape.span, GPU)
        self.staging = arena(shape.packed_bytes, GPU)
        self.regions = [region_of(part) for part in (self.large, self.model, self.staging)]


def target(options: argparse.Namespace) -> None:
    """The other process: polls, and answers ``clear``, ``scatter``, ``sum large`` and ``sum model``."""
    torch.cuda.init()
    shape = model(options.tensors, options.model)
    memory = Memory(options.arena, shape)
    endpoint = NixlEndpoint("target", NixlSettings())
    endpoint.register(memory.regions)
    scatter = prepare([memory.staging], [memory.model], shape.table(shape.packed, shape.target))
    memory.model.zero_()
    scatter()
    torch.cuda.synchronize()
    say([endpoint.name, endpoint.metadata().hex(), [region.base for region in memory.regions]])
    while True:
        endpoint.poll()
        if not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            continue
        match sys.stdin.readline().strip():
            case "clear":
                for part in (memory.large, memory.model, memory.staging):
                    part.zero_()
                torch.cuda.synchronize()
                say("done")
            case "scatter":
                scatter()
                torch.cuda.synchronize()
                say("done")
            case "sum large":
                say(checksum(memory.large))
            case "sum model":
                say(checksum(memory.model))
            case "":
                break
    endpoint.close()


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


class Bench:
    """The writing process."""

    def __init__(self, options: argparse.Namespace, process: subprocess.Popen[str]) -> None:
        torch.cuda.init()
        self.options, self.process = options, process
        self.shape = model(options.tensors, options.model)
        self.memory = Memory(options.arena, self.shape)
        for part in (self.memory.large, self.memory.model):
            part.random_(0, 256)
        torch.cuda.synchronize()
        self.endpoint = NixlEndpoint("writer", NixlSettings())
        self.endpoint.register(self.memory.regions)
        name, card, bases = self.hear()
        self.endpoint.connect(name, bytes.fromhex(card))
        self.remote = [
            Region(base, region.length, "VRAM", 0) for base, region in zip(bases, self.memory.regions, strict=True)
        ]
        self.name = name

    def hear(self) -> list[object] | int | str:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> list[object] | int | str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.hear()

    def edge(self, region: int, source: np.ndarray, there: np.ndarray, length: np.ndarray) -> Edge:
        number = np.full(len(length), region)
        runs = np.stack([number * 0, number, source, number, there, length], axis=1)
        return self.endpoint.prepare_edge(self.name, self.memory.regions, self.remote, runs)

    async def write(self, edge: Edge) -> float:
        begin = time.perf_counter()
        [result] = await self.endpoint.write([edge], deadline_seconds=DEADLINE_SECONDS)
        if result.error is not None:
            raise result.error
        return time.perf_counter() - begin

    async def arena_rates(self) -> tuple[list[float], list[float], float]:
        """Seconds of the writes and of the device copies, and of the very first write."""
        size = self.options.arena
        edge = self.edge(0, np.array([0]), np.array([0]), np.array([size]))
        copied = arena(size, GPU)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not self.endpoint.warm(self.name):  # noqa: ASYNC110  (NIXL has no event)
                await asyncio.sleep(0.001)
        first = await self.write(edge)
        self.ask("clear")
        writes, copies = [], []
        for repetition in range(self.options.repeat + 1):
            if repetition % 2:
                write = await self.write(edge)
                copy = seconds(lambda: copied.copy_(self.memory.large))
            else:
                copy = seconds(lambda: copied.copy_(self.memory.large))
                write = await self.write(edge)
            if repetition:
                writes.append(write)
                copies.append(copy)
        self.compare("large", checksum(self.memory.large))
        return writes, copies, first

    async def model_seconds(self) -> tuple[list[float], list[float]]:
        """Seconds of the model's way packed, and with one descriptor a tensor."""
        shape = self.shape
        pack = prepare([self.memory.model], [self.memory.staging], shape.table(shape.source, shape.packed))
        whole = self.edge(2, np.array([0]), np.array([0]), np.array([shape.packed_bytes]))
        each = self.edge(1, shape.source, shape.target, shape.length)
        expected = torch.zeros_like(self.memory.model)
        prepare([self.memory.model], [expected], shape.table(shape.source, shape.target))()
        wanted = checksum(expected)
        coalesced, per_tensor = [], []
        self.ask("clear")
        for repetition in range(self.options.repeat + 1):
            one = await self.coalesced(pack, whole)
            if not repetition:
                self.compare("model", wanted)
                self.ask("clear")
            other = await self.write(each)
            if not repetition:
                self.compare("model", wanted)
            else:
                coalesced.append(one)
                per_tensor.append(other)
        return coalesced, per_tensor

    async def coalesced(self, pack: PreparedCopy, whole: Edge) -> float:
        begin = time.perf_counter()
        pack()
        torch.cuda.synchronize()
        await self.write(whole)
        self.ask("scatter")
        return time.perf_counter() - begin

    def compare(self, part: str, wanted: int) -> None:
        found = self.ask(f"sum {part}")
        if found != wanted:
            raise RuntimeError(f"{part}: the bytes that arrived are not those that were sent")


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def report(figure: str, values: list[float], unit: str) -> None:
    """One line; the spread is the distance between the quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [0.0, 0.0, 0.0]
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
    parser.add_argument("--arena", type=int, default=4 << 30)
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--model", type=int, default=2 << 30)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--target", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        target(options)
        return
    command = [sys.executable, __file__, "--target", "--arena", str(options.arena)]
    command += ["--tensors", str(options.tensors), "--model", str(options.model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        bench = Bench(options, process)
        report_arena(options.arena, *asyncio.run(bench.arena_rates()))
        report_model(*asyncio.run(bench.model_seconds()))
        bench.endpoint.close()


def report_arena(size: int, writes: list[float], copies: list[float], first: float) -> None:
    report("nixl_vram_over_copy", [c / w for w, c in zip(writes, copies, strict=True)], "ratio")
    report("nixl_vram", [size / s / 1e9 for s in writes], "GB/s")
    report("device_copy", [size / s / 1e9 for s in copies], "GB/s")
    report("first_write", [first * 1e3], "ms")


def report_model(coalesced: list[float], per_tensor: list[float]) -> None:
    report("coalesced_over_per_tensor", [p / c for c, p in zip(coalesced, per_tensor, strict=True)], "ratio")
    report("coalesced", [s * 1e3 for s in coalesced], "ms")
    report("per_tensor", [s * 1e3 for s in per_tensor], "ms")


if __name__ == "__main__":
    main()
