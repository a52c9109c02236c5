"""What the kernels reach of the memory they run on, as JSON lines: figure, value, unit, n, spread.

Each figure is a ratio taken in one run: kernel and ceiling alternate, every pair gives one ratio, ``value`` is the
median of ``n`` ratios and ``spread`` their interquartile range over the median. The ceiling moves the same number of
bytes (read + written, or read): a device-to-device copy for quantise and scatter, the best of two reductions for the
digest. Inputs are random.

What looking for NaN and infinity costs is time over time, 1 at best: ``finite_over_digest*`` of the kernel, and
``judged_over_digested_*`` of converting all slots and digesting them, by the clock and with the host's part, with the
milliseconds of both and of the conversion alone.

Run as ``python tests/benchmarks/bench_gpu_kernels.py [figure …]``.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from weightsync.agents.tables.runs import digest_table, element_codes
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, PLAIN, QuantizationSpec
from weightsync.kernels import copy as copy_module
from weightsync.kernels import digest as digest_module
from weightsync.kernels.columns import CODES, UNSEEN
from weightsync.kernels.fp8 import prepare_quantize
from weightsync.kernels.fp8_jobs import QuantizeJob

CUDA = torch.device("cuda")
PAIRS = 30
SAMPLE_MS = 4.0
"""A sample repeats a short launch until it lasts about this long, so that event resolution does not matter."""
GIB = 1 << 30
Launch = Callable[[], object]


def milliseconds(launch: Launch, repeat: int) -> float:
    """Mean time of ``repeat`` launches in a row, by device events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeat):
        launch()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeat


def repeats(launch: Launch) -> int:
    """How many launches make a sample; compiles and warms up."""
    for _ in range(3):
        launch()
    torch.cuda.synchronize()
    return max(1, round(SAMPLE_MS / max(milliseconds(launch, 2), 1e-3)))


def compare(figure: str, kernel: Launch, ceiling: Launch, traffic: float, unit: str = "x", **more: object) -> None:
    """Print ``ceiling time / kernel time``; ``traffic`` is the bytes that each of them moves."""
    counts = repeats(kernel), repeats(ceiling)
    times = [(milliseconds(kernel, counts[0]), milliseconds(ceiling, counts[1])) for _ in range(PAIRS)]
    ratios = sorted(theirs / mine for mine, theirs in times)
    quarter = statistics.quantiles(ratios, n=4)
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    line = {
        "figure": figure,
        "value": round(statistics.median(ratios), 4),
        "unit": unit,
        "n": PAIRS,
        "spread": round((quarter[2] - quarter[0]) / statistics.median(ratios), 4),
        "gb_per_s": round(traffic / mine / 1e6, 1),
        "ceiling_gb_per_s": round(traffic / theirs / 1e6, 1),
        "device": torch.cuda.get_device_name(),
    }
    print(json.dumps(line | more), flush=True)


def absent(figure: str, why: str) -> None:
    """Print that a figure was not taken, and why."""
    print(json.dumps({"figure": figure, "value": None, "unit": "x", "n": 0, "spread": None, "absent": why}), flush=True)


def copy_of(traffic: int) -> Launch:
    """A device-to-device copy that reads and writes ``traffic`` bytes together."""
    source = torch.empty(traffic // 2, dtype=torch.uint8, device=CUDA).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def weights(*shape: int) -> torch.Tensor:
    """Random bf16 weights, made in place so that large ones fit."""
    return torch.empty(shape, dtype=torch.bfloat16, device=CUDA).normal_(std=0.02)


def slot_jobs(sources: list[list[torch.Tensor]]) -> list[QuantizeJob]:
    """Jobs whose outputs lie in one slot; the sources of one list are fused by rows, each on its own 128-grid."""
    scale_rows = [[-(-src.shape[-2] // 128) for src in fused] for fused in sources]
    slot = torch.empty(sum(src.numel() for fused in sources for src in fused), dtype=torch.uint8, device=CUDA)
    jobs, offset = [], 0
    for fused, heights in zip(sources, scale_rows, strict=True):
        groups = list(fused[0].shape[:-2])
        rows, columns = sum(src.shape[-2] for src in fused), fused[0].shape[-1]
        size = sum(src.numel() for src in fused)
        codes = slot[offset : offset + size].view(*groups, rows, columns)
        scales = torch.empty(*groups, sum(heights), -(-columns // 128), device=CUDA)
        offset += size
        outs = codes.split([src.shape[-2] for src in fused], dim=-2)
        tiles = scales.split(heights, dim=-2)
        jobs += [QuantizeJob(*job) for job in zip(fused, outs, tiles, strict=True)]
    return jobs


def quantise_traffic(jobs: list[QuantizeJob]) -> int:
    """Bytes read and written: sources, codes and scales."""
    return sum(job.src.numel() * (job.src.element_size() + 1) + 4 * job.scale_out.numel() for job in jobs)


def quantising(jobs: list[QuantizeJob]) -> Launch:
    """One launch over all jobs, with their own sources."""
    launch, sources = prepare_quantize(jobs), [job.src for job in jobs]
    return lambda: launch(sources)


def bench_quantise(figure: str, sources: list[list[torch.Tensor]]) -> None:
    """One launch over ``sources`` against a copy of the same traffic."""
    jobs = slot_jobs(sources)
    traffic = quantise_traffic(jobs)
    compare(figure, quantising(jobs), copy_of(traffic), traffic, tensors=len(jobs))


def glm5_attention() -> list[list[torch.Tensor]]:
    """The quantised matrices of GLM-5's attention and indexer, fused as the engine holds them."""
    return [
        [weights(2048, 6144), weights(576, 6144)],  # q_a, kv_a (512 + 64 rope)
        [weights(16384, 2048)],  # q_b: 64 heads of 192 + 64
        [weights(28672, 512)],  # kv_b: 64 heads of 192 + 256
        [weights(6144, 16384)],  # o
        [weights(4096, 2048)],  # indexer wq_b
        [weights(128, 6144)],  # indexer wk
    ]


def bench_glm5_layer() -> None:
    """A whole mixture-of-experts layer of GLM-5: attention, shared expert, 256 experts with gate and up fused."""
    experts = [[weights(256, 2048, 6144), weights(256, 2048, 6144)], [weights(256, 6144, 2048)]]
    shared = [[weights(2048, 6144), weights(2048, 6144)], [weights(6144, 2048)]]
    bench_quantise("quantise_over_copy_glm5_layer", [*glm5_attention(), *shared, *experts])


def eager_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block quantise as one writes it in torch, for a matrix of whole blocks."""
    grid = x.view(x.shape[0] // 128, 128, x.shape[1] // 128, 128)
    scale = (grid.abs().float().amax(dim=(1, 3), keepdim=True) / 448.0).clamp(min=1e-12)
    codes = (grid.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes.view(x.shape), scale.view(grid.shape[0], grid.shape[2])


def bench_over_eager() -> None:
    """Against the same arithmetic in eager torch, and under torch.compile."""
    x = weights(16384, 16384)
    jobs = slot_jobs([[x]])
    compare("quantise_over_eager", quantising(jobs), lambda: eager_blocks(x), quantise_traffic(jobs))
    compiled = torch.compile(eager_blocks)
    compare("quantise_over_compiled", quantising(jobs), lambda: compiled(x), quantise_traffic(jobs))


def bench_over_vllm() -> None:
    """Against vLLM's block quantise of weights, where vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        absent("quantise_over_vllm", "vLLM is not installed here")
        return
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    x = weights(16384, 16384)
    jobs = slot_jobs([[x]])
    compare("quantise_over_vllm", quantising(jobs), lambda: per_block_cast_to_fp8(x), quantise_traffic(jobs))


@triton.jit
def _read_kernel(data, sums, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SPAN
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(0, SPAN, BLOCK):
        place = start + step + tl.arange(0, BLOCK)
        total += tl.load(data + place)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read_of(region: torch.Tensor) -> Launch:
    """The faster of two reductions over ``region``: torch's own sum, and a plain Triton one."""
    words = region.view(torch.int32)
    span = 65536
    programs = words.numel() // span
    sums = torch.empty(programs, dtype=torch.int32, device=CUDA)
    floats = region.view(torch.float32)
    candidates: list[Launch] = [
        floats.sum,
        lambda: _read_kernel[(programs,)](words, sums, SPAN=span, BLOCK=2048, num_warps=4),
        lambda: _read_kernel[(programs,)](words, sums, SPAN=span, BLOCK=4096, num_warps=8),
    ]
    best = [min(milliseconds(launch, repeats(launch)) for _ in range(3)) for launch in candidates]
    return candidates[best.index(min(best))]


def arena(size: int) -> torch.Tensor:
    """Random bytes on the device."""
    return torch.empty(size, dtype=torch.uint8, device=CUDA).random_()


def digest_row(run: int, offset: int, logical: int, name: str, loop: tuple[int, int, int] = (1, 0, 0)) -> list[int]:
    """One row of a digest's table with at most one loop."""
    return [run, 0, offset, digest_module.tensor_key(name), logical, 1, 0, 0, 1, 0, 0, *loop]


def bench_digest() -> None:
    """A 4 GiB arena of 500 tensors of mixed sizes; and one whose tensors are slices of every row."""
    region = arena(4 * GIB)
    ceiling = read_of(region)
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(region.numel() // 256, 499, replace=False)) * 256
    edges = [0, *cuts.tolist(), region.numel()]
    rows = [digest_row(end - begin, begin, 0, f"t{begin}") for begin, end in itertools.pairwise(edges)]
    whole = digest_module.prepare([region], np.array(rows, np.int64))
    compare("digest_over_read", whole.launch, ceiling, region.numel(), rows=len(rows))
    looked = digest_module.prepare([region], np.array(rows, np.int64), np.full(len(rows), CODES["bfloat16"]))
    compare("finite_over_digest", whole.launch, looked.launch, region.numel(), rows=len(rows))
    for run in (256, 2048):
        count = (64 << 20) // run
        rows = [
            digest_row(run, at, 3 * run, f"s{at}", (count, run, 8 * run)) for at in range(0, region.numel(), 64 << 20)
        ]
        sliced = digest_module.prepare([region], np.array(rows, np.int64))
        compare(f"digest_over_read_slices_{run}", sliced.launch, ceiling, region.numel(), rows=len(rows))
        looked = digest_module.prepare([region], np.array(rows, np.int64), np.full(len(rows), CODES["bfloat16"]))
        compare(f"finite_over_digest_slices_{run}", sliced.launch, looked.launch, region.numel(), rows=len(rows))


class Alike:
    """A table that sends every tensor under its own name, each treated alike."""

    layers = 0

    def __init__(self, names: Iterable[str], treatment: QuantizationSpec) -> None:
        self._specs = [ConversionSpec(name, (Source(name),), quantization=treatment) for name in names]

    def for_keys(self, keys: Collection[str], /) -> "Alike":
        return self

    def conversion_specs(self, layer_idx: int, /) -> Iterable[ConversionSpec]:
        return ()

    def non_layer_specs(self) -> Iterable[ConversionSpec]:
        return self._specs


def by_the_clock(publish: Callable[[], object]) -> float:
    """Milliseconds until the device has done it, the host's part with it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    publish()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def bench_judged(figure: str, shapes: list[tuple[int, int]], treatment: QuantizationSpec) -> None:
    """What looking for NaN and infinity adds to converting and digesting all slots, as a publish does it."""
    state = {f"t{number}": weights(*shape) for number, shape in enumerate(shapes)}
    slots = TrainerSlots(state, Alike(state, treatment), options=SlotOptions(staging_bytes=0))
    table = digest_table(slots.layout.matrix(), slots.layout)
    codes = element_codes(table, slots.layout)
    plain, looking = digest_module.prepare(slots.arenas, table), digest_module.prepare(slots.arenas, table, codes)
    finite = Spans.of(table[codes != UNSEEN])

    def digested() -> None:
        slots.convert(state)
        torch.cuda.synchronize()
        plain()

    def judged() -> None:
        slots.convert(state)
        torch.cuda.synchronize()
        looking()
        assert slots.nonfinite(finite if looking.finite() else NOWHERE) == ()

    for warm in (digested, judged):
        by_the_clock(warm)
    times = [[by_the_clock(run) for run in (lambda: slots.convert(state), digested, judged)] for _ in range(PAIRS)]
    ratios = sorted(mine / theirs for _, theirs, mine in times)
    quarter = statistics.quantiles(ratios, n=4)
    convert, theirs, mine = (round(statistics.median(column), 3) for column in zip(*times, strict=True))
    line = {
        "figure": figure, "value": round(statistics.median(ratios), 4), "unit": "x", "n": PAIRS,
        "spread": round((quarter[2] - quarter[0]) / statistics.median(ratios), 4),
        "convert_ms": convert, "digested_ms": theirs, "judged_ms": mine, "tensors": len(shapes),
        "device": torch.cuda.get_device_name(),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def bench_finite() -> None:
    """Eight layers of Qwen3-8B, cast; four of Qwen3-30B-A3B with their 128 experts as tensors of their own, in FP8."""
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288)]
    bench_judged("judged_over_digested_dense", 8 * layer, PLAIN)
    fp8 = QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX)
    bench_judged("judged_over_digested_experts", 4 * 128 * [(768, 2048), (768, 2048), (2048, 768)], fp8)


def mixed_ranges(total: int) -> Iterator[int]:
    """Sizes from 4 KiB to 64 MiB, evenly in the logarithm, multiples of 256, until ``total`` is reached."""
    rng = np.random.default_rng(1)
    while total > 0:
        size = min(total, int(2 ** rng.uniform(12, 26)) // 256 * 256)
        yield size
        total -= size


def bench_scatter() -> None:
    """Mixed ranges to shuffled places, and column slices of 256 bytes and 2 KiB out of a packed buffer."""
    source, target = arena(4 * GIB), torch.empty(4 * GIB, dtype=torch.uint8, device=CUDA)
    ceiling = copy_of(2 * source.numel())
    sizes = list(mixed_ranges(source.numel()))
    order = np.random.default_rng(2).permutation(len(sizes))
    starts = np.cumsum([0, *sizes])[:-1]
    places = np.empty(len(sizes), np.int64)
    places[order] = np.cumsum([0, *np.array(sizes)[order].tolist()])[:-1]
    loops = [1, 0, 0] * 3
    rows = [[size, 0, int(src), 0, int(dst), *loops] for size, src, dst in zip(sizes, starts, places, strict=True)]
    scatter = copy_module.prepare([source], [target], np.array(rows, np.int64))
    compare("scatter_over_copy", scatter, ceiling, 2 * source.numel(), ranges=len(rows))
    for run in (256, 2048):
        count = source.numel() // run // 8
        rows = [[run, 0, part * count * run, 0, part * run, 1, 0, 0, 1, 0, 0, count, run, 8 * run] for part in range(8)]
        slices = copy_module.prepare([source], [target], np.array(rows, np.int64))
        compare(f"scatter_over_copy_slices_{run}", slices, ceiling, 2 * source.numel(), ranges=8 * count)


BENCHES: dict[str, Callable[[], None]] = {
    "large": lambda: bench_quantise("quantise_over_copy_large", [[weights(32768, 32768)]]),
    "experts": lambda: bench_quantise("quantise_over_copy_experts", [[weights(256, 2048, 6144)]]),
    "attention": lambda: bench_quantise("quantise_over_copy_glm5_attention", glm5_attention()),
    "layer": bench_glm5_layer,
    "eager": bench_over_eager,
    "vllm": bench_over_vllm,
    "digest": bench_digest,
    "scatter": bench_scatter,
    "finite": bench_finite,
}


def main() -> int:
    """Run the benches named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", choices=[*BENCHES, []], help="all, where none is named")
    chosen = parser.parse_args().figures or list(BENCHES)
    for name in chosen:
        BENCHES[name]()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
