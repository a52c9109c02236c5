"""What publishing costs a trainer: Python, two FSDP ranks over one, a writer beside Python, heartbeats beside a digest.

    python tests/benchmarks/bench_convert.py [--only python|ranks|writer|digest] [--tensors N] [--repeat N]

Prints one JSON object a line:

* ``convert_python_ms_20k`` and ``convert_python_ms_20k_modules``: reading, checking and casting 20,000 tensors of 8
  values and looking for NaN in them, so that next to nothing of it is arithmetic; from a mapping, and from a module of
  as many linear layers. CPU time of the thread, so that a busy machine does not count. Below 100.
* ``convert_fsdp_over_one``: seconds of two FSDP2 ranks (gloo, one thread each) over seconds of one rank for the same
  bytes, alternating in one run; at most 1.3.
* ``writer_beside_python``: speed of an agent's loop that writes over NIXL to another process, while the main thread is
  bound by Python, over its speed while that thread computes without the interpreter, as kernels do; at least 0.8.
  ``python_beside_writer``: how much of its speed the main thread keeps.
* ``heartbeat_beside_digest_s``: the longest that an agent's loop was kept while a digest computed; at most 2.
"""

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bench_nixl import arena, report, tensor_runs
from ports import free_port
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from weightsync.agents.link.beside import computed
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.state import TrainerSource
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.kernels.columns import LOOPS
from weightsync.kernels.digest import prepare as prepare_digest
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.messages import NixlSettings

HIDDEN, LAYERS, VOCABULARY = 512, 12, 8003
SLICE_SECONDS = 1.0


class Names:
    """A table of tensors that keep their names."""

    layers = 0

    def __init__(self, names: list[str]) -> None:
        self._specs = tuple(ConversionSpec(name, (Source(name),)) for name in names)

    def for_keys(self, keys: Any) -> "Names":
        return self

    def conversion_specs(self, layer_idx: int) -> tuple[ConversionSpec, ...]:
        return ()

    def non_layer_specs(self) -> tuple[ConversionSpec, ...]:
        return self._specs


class Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Linear(4, 2, bias=False)


def modules(tensors: int) -> torch.nn.Module:
    """As the first mixtures of experts had them: two modules for each tensor."""
    layers = (torch.nn.ModuleList(Expert() for _ in range(500)) for _ in range(tensors // 500))
    return torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})})


def bench_python(tensors: int, repeat: int) -> None:
    state = {f"model.layers.{n}.mlp.experts.down_proj.weight": torch.ones(2, 4) for n in range(tensors)}
    for suffix, given in (("", state), ("_modules", modules(tensors))):
        source = TrainerSource(given)
        slots = TrainerSlots(source.state(), Names(list(source.state())), options=SlotOptions(staging_bytes=0))
        values = []
        for _ in range(repeat):
            began = time.thread_time()
            now = source.state()
            taken = slots.check(now)
            source.account_for(now, slots.read)
            slots.fill(taken)
            assert not slots.nonfinite()
            values.append((time.thread_time() - began) * 1e3)
        report(f"convert_python_ms_{tensors // 1000}k{suffix}", values, "ms")


def masters() -> dict[str, torch.Tensor]:
    """A small dense model: layers of 3 matrices that are sharded, and of 16 tensors that are gathered."""
    state = {"embed": torch.ones(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        state |= {f"{layer}.{name}": torch.ones(4 * HIDDEN, HIDDEN) for name in ("up", "gate", "down")}
        state |= {f"{layer}.small.{n}": torch.ones(HIDDEN) for n in range(12)}
        state |= {f"{layer}.kv.{n}": torch.ones(64, HIDDEN) for n in range(4)}
    return state


def convert_ranks(rank: int, port: int, repeat: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plain = masters()
    table, options = Names(list(plain)), SlotOptions(staging_bytes=0)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    shards = {name: distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None) for name, full in plain.items()}
    two, one = TrainerSlots(shards, table, options=options), TrainerSlots(plain, table, options=options)
    ratios, seconds = [], []
    for repetition in range(repeat + 1):
        times = []
        for slots, state, alone in ((one, plain, True), (two, shards, False)):
            dist.barrier()
            began = time.perf_counter()
            if not alone or rank == 0:  # one rank, and the other idle
                slots.convert(state)
            dist.barrier()
            times.append(time.perf_counter() - began)
        if repetition:
            ratios.append(times[1] / times[0])
            seconds.append(times[1])
    if rank == 0:
        report("convert_fsdp_over_one", ratios, "ratio")
        report("convert_fsdp", seconds, "s")
    dist.barrier()
    dist.destroy_process_group()


def bench_ranks(repeat: int) -> None:
    multiprocessing.spawn(convert_ranks, (free_port(), repeat), nprocs=2)


class Beside:
    """A thread whose loop writes the same bytes again and again while ``on`` is set."""

    def __init__(self, peer: str, card: bytes, base: int, total: int, tls: str) -> None:
        self._runs = tensor_runs(total, 300)
        self._size = int(self._runs[-1, 2] + self._runs[-1, 5])
        self._peer, self._card, self._there, self._tls = peer, card, Region(base, self._size), tls
        self.on, self.ended, self.ready = threading.Event(), threading.Event(), threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    async def _run(self) -> None:
        memory, region = arena(self._size)
        endpoint = NixlEndpoint("writer", NixlSettings(), variables={"UCX_TLS": self._tls} if self._tls else {})
        endpoint.register([region])
        endpoint.connect(self._peer, self._card)
        edge = endpoint.prepare_edge(self._peer, [region], [self._there], self._runs)
        await endpoint.write([edge], deadline_seconds=60)
        self.ready.set()
        while not self.ended.is_set():
            if not self.on.is_set():
                await asyncio.sleep(0.01)
                continue
            began = time.perf_counter()
            [result] = await endpoint.write([edge], deadline_seconds=60)
            assert result.error is None, result.error
            self.seconds.append(time.perf_counter() - began)
        endpoint.close()
        del memory

    def median(self, meanwhile: Callable[[float], float]) -> tuple[float, float]:
        """Seconds of a write while the calling thread does something else, and what that gives."""
        self.seconds = []
        self.on.set()
        given = meanwhile(SLICE_SECONDS)
        self.on.clear()
        return statistics.median(self.seconds), given

    def end(self) -> None:
        self.ended.set()
        self._thread.join()


def operations(seconds: float) -> float:
    """Python operations a second of the calling thread."""
    ends, count = time.perf_counter() + seconds, 0
    began = time.perf_counter()
    while time.perf_counter() < ends:
        sum(range(1000))
        count += 1
    return count / (time.perf_counter() - began)


def computing(seconds: float) -> float:
    """Occupies a core as a trainer's kernels do, without the interpreter."""
    ends, block = time.perf_counter() + seconds, bytes(1 << 20)
    while time.perf_counter() < ends:
        hashlib.sha256(block)
    return 0.0


def bench_writer(total: int, repeat: int, tls: str) -> None:
    runs = tensor_runs(total, 300)
    script = os.path.join(os.path.dirname(__file__), "bench_nixl.py")
    target = [sys.executable, script, "--target", str(int(runs[-1, 2] + runs[-1, 5]))]
    options = ["--tls", tls] if tls else []
    with subprocess.Popen([*target, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, card, base = json.loads(process.stdout.readline())
        writer = Beside(name, bytes.fromhex(card), base, total, tls)
        writer.ready.wait(60)
        kept, python, rates = [], [], []
        for _ in range(repeat):
            alone, _ = writer.median(computing)
            python_alone = operations(SLICE_SECONDS)
            beside, python_beside = writer.median(operations)
            kept.append(alone / beside)
            python.append(python_beside / python_alone)
            rates.append(total / beside / 1e9)
        writer.end()
    report("writer_beside_python", kept, "ratio")
    report("python_beside_writer", python, "ratio")
    report("write_beside_python", rates, "GB/s")


async def longest_pause(work: Callable[[], object]) -> float:
    """The longest that the loop was kept from a heartbeat while ``work`` computed beside it."""
    digesting, longest = asyncio.create_task(computed(work)), 0.0
    while not digesting.done():
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - began)
    await digesting
    return longest


def bench_digest(total: int, repeat: int) -> None:
    rows, size = total >> 20, 1 << 20
    table = [[size, 0, row * size, 1, row * size, *(1, 0, 0) * LOOPS] for row in range(rows)]
    digest = prepare_digest([torch.ones(rows * size, dtype=torch.uint8)], table)
    report("heartbeat_beside_digest_s", [asyncio.run(longest_pause(digest)) for _ in range(repeat)], "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument(
        "--tls", default="", help="UCX_TLS of both ends of the writer, such as tcp; default: UCX's choice"
    )
    parser.add_argument("--only", choices=("python", "ranks", "writer", "digest"))
    options = parser.parse_args()
    if options.only in (None, "python"):
        bench_python(options.tensors, options.repeat)
    if options.only in (None, "ranks"):
        bench_ranks(options.repeat)
    if options.only in (None, "writer"):
        bench_writer(options.bytes, options.repeat, options.tls)
    if options.only in (None, "digest"):
        bench_digest(options.bytes, options.repeat)


if __name__ == "__main__":
    main()
