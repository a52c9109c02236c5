"""What only a GPU can show of the kernels: native rounding, large offsets, streams, and no compiler inside a round."""

import itertools

import numpy as np
import pytest
import torch
from weightsync.kernels import copy as copy_module
from weightsync.kernels import digest as digest_module
from weightsync.kernels.columns import CODES, ELEMENTS, UNSEEN
from weightsync.kernels.digest import digest
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.dispatch import Beside
from weightsync.kernels.fp8 import prepare_quantize, quantize_blocks
from weightsync.kernels.fp8_jobs import QuantizeJob
from weightsync.kernels.fp8_reference import quantize_reference
from weightsync.kernels.warm import warm_up, warm_up_quantize

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BESIDE: tuple[Beside | None, ...] = (None, "batches", "wire")
FORMATS = [("fp32", (128, 128)), ("ue8m0", (128, 128)), ("ue8m0", (1, 32)), ("fp32", (1, 128))]


def outputs(src: torch.Tensor, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned codes and fp32 scales for ``src``."""
    grid = [*src.shape[:-2], -(-src.shape[-2] // block[0]), -(-src.shape[-1] // block[1])]
    return torch.full(src.shape, 0xEE, dtype=torch.uint8, device=CUDA), torch.full(grid, -1.0, device=CUDA)


def assert_exact(src: torch.Tensor, **options: object) -> None:
    """The kernel's bytes are those of the reference, computed by torch on the same device."""
    block = options.get("block", (128, 128))
    mine, theirs = outputs(src, block), outputs(src, block)
    quantize_blocks(src, *mine, **options)
    quantize_reference(src, *theirs, **options)
    assert torch.equal(mine[1].view(torch.int32), theirs[1].view(torch.int32))
    assert torch.equal(mine[0], theirs[0])


@pytest.mark.parametrize(("scale_format", "block"), FORMATS)
def test_every_bf16_pattern(scale_format: str, block: tuple[int, int]) -> None:
    patterns = torch.arange(65536, dtype=torch.int32, device=CUDA).to(torch.int16).view(torch.bfloat16)
    finite = patterns[patterns.isfinite()]
    shuffled = finite[torch.randperm(finite.numel(), device=CUDA)]
    for values in (patterns.view(512, 128), finite[: 508 * 128].view(508, 128), shuffled[: 508 * 128].view(508, 128)):
        for sorted_values in (values, values.T.contiguous()):
            assert_exact(sorted_values, scale_format=scale_format, block=block)


@pytest.mark.parametrize(("scale_format", "block"), FORMATS)
@pytest.mark.parametrize("spread", [0.5, 4.0, 40.0])
def test_random_values_of_many_magnitudes(spread: float, scale_format: str, block: tuple[int, int]) -> None:
    shape = (4096, 4096)
    magnitude = torch.exp2(torch.randn(shape, device=CUDA) * spread)
    for dtype in (torch.float32, torch.bfloat16):
        src = (torch.randn(shape, device=CUDA) * magnitude).to(dtype).nan_to_num(0.0, 1.0, -1.0)
        assert_exact(src, scale_format=scale_format, block=block)
        assert_exact(src, scale_format=scale_format, block=block, forward_dtype=torch.bfloat16)


def test_quotients_at_and_beside_every_rounding_boundary() -> None:
    """The fused division must round as IEEE division does where it matters: next to the middle of two codes."""
    codes = torch.arange(0x7F, dtype=torch.uint8, device=CUDA).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    blocks = 20_000
    amax = torch.exp2(torch.rand(blocks, device=CUDA) * 200 - 120) * (1 + torch.rand(blocks, device=CUDA))
    scale = torch.maximum(amax / torch.full_like(amax, 448.0), torch.full_like(amax, 1e-12))
    near = (middles[None, :] * scale[:, None]).view(torch.int32)
    src = torch.zeros(blocks, 1, 128 * 8, device=CUDA)
    for place, ulps in enumerate((-2, -1, 0, 1, 2)):
        src[:, 0, place * 128 + 1 : place * 128 + 127] = (near + ulps).view(torch.float32)
    src[:, 0, ::128] = amax[:, None]
    mine, theirs = outputs(src), outputs(src)
    quantize_blocks(src, *mine)
    quantize_reference(src, *theirs)
    assert torch.equal(mine[1], theirs[1])
    assert torch.equal(mine[0], theirs[0])


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    src = torch.randn(300, 129, 60_000, dtype=torch.bfloat16, device=CUDA)
    assert src.numel() > 1 << 31
    codes, scales = outputs(src)
    quantize_blocks(src, codes, scales)
    for group in (0, 150, 299):
        theirs = outputs(src[group])
        quantize_reference(src[group], *theirs)
        assert torch.equal(codes[group], theirs[0])
        assert torch.equal(scales[group], theirs[1])


@pytest.mark.parametrize("beside", BESIDE)
def test_a_layer_on_a_stream_of_its_own(beside: Beside | None) -> None:
    sources = [torch.randn(shape, device=CUDA).bfloat16() for shape in [(2048, 6144), (576, 6144), (4, 2048, 640)]]
    slot = torch.zeros(sum(src.numel() for src in sources), dtype=torch.uint8, device=CUDA)
    jobs, offset = [], 0
    for src in sources:
        _, scales = outputs(src)
        jobs.append(QuantizeJob(src, slot[offset : offset + src.numel()].view(src.shape), scales))
        offset += src.numel()
    launch = prepare_quantize(jobs, beside=beside)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(sources)
    stream.synchronize()
    for job in jobs:
        theirs = outputs(job.src)
        quantize_reference(job.src, *theirs)
        assert torch.equal(job.out, theirs[0])
        assert torch.equal(job.scale_out, theirs[1])


def arena_table(length: int, seed: int) -> np.ndarray:
    """Tensors of random sizes and alignments that cover an arena; some as column slices of larger ones."""
    rng = np.random.default_rng(seed)
    rows, offset = [], 0
    while True:
        run = int(2 ** rng.uniform(0, 25)) if rng.random() < 0.5 else int(2 ** rng.integers(4, 25))
        count = int(rng.integers(1, 200)) if run < 65536 else 1
        offset += int(rng.integers(0, 64)) if rng.random() < 0.3 else -offset % 256
        if offset + run * count > length:
            return np.array(rows, np.int64)
        pitch = run * int(rng.integers(1, 9))
        start = int(rng.integers(0, 8)) * run
        key = digest_module.tensor_key(f"tensor {len(rows)}")
        rows.append([run, 0, offset, key, start, 1, 0, 0, 1, 0, 0, count, run, pitch])
        offset += run * count


@pytest.mark.parametrize("beside", BESIDE)
def test_the_digest_of_an_arena_is_that_of_the_reference(beside: Beside | None) -> None:
    arena = torch.randint(0, 256, (1 << 29,), dtype=torch.uint8, device=CUDA)
    table = arena_table(arena.numel(), 1)
    prepared = digest_module.prepare([arena], table, beside=beside)
    expected = ReferenceDigest([arena.cpu()], table, np.full(len(table), UNSEEN))()
    assert prepared() == expected
    assert prepared() == expected
    arena[123_456_789] ^= 0x10
    assert prepared() != expected


def test_what_is_not_finite_is_found_wherever_it_lies_in_an_arena() -> None:
    """Tensors of all formats and alignments; of each a number at its beginning, at its end and anywhere."""
    arena = torch.randint(0, 256, (1 << 27,), dtype=torch.uint8, device=CUDA) & 0xBF  # finite in every format
    table = arena_table(arena.numel(), 4)
    rng = np.random.default_rng(5)
    names = [*ELEMENTS, ""]
    sizes = [ELEMENTS[name].itemsize if name else 1 for name in names]
    fit = [[n for n, size in enumerate(sizes) if not (row[[0, 4, 13]] % size).any()] for row in table]
    chosen = [names[rng.choice(fitting)] for fitting in fit]
    codes = np.array([CODES[name] if name else UNSEEN for name in chosen])
    assert set(codes.tolist()) == {UNSEEN, *CODES.values()}
    prepared = digest_module.prepare([arena], table, codes)
    assert prepared() == digest([arena], table)
    assert prepared.finite()
    for name, (run, _, offset, *loops) in zip(chosen, table.tolist(), strict=True):
        size, numbers = ELEMENTS[name].itemsize if name else 1, run * loops[8]
        for at in {0, numbers // size - 1, int(rng.integers(numbers // size))}:
            place = slice(offset + at * size, offset + (at + 1) * size)
            before = arena[place].clone()
            arena[place] = 0xFF
            prepared()
            assert prepared.finite() == (name == ""), f"{name} at byte {at * size} of runs of {run}"
            arena[place] = before
    prepared()
    assert prepared.finite()


def test_digests_and_copies_beyond_four_gibibytes() -> None:
    length = (1 << 32) + 50_000
    region = torch.empty(length, dtype=torch.uint8, device=CUDA)
    region[-60_000:] = torch.randint(0, 256, (60_000,), dtype=torch.uint8, device=CUDA)
    start = length - 60_000
    loops = [1, 0, 0] * 3
    tail = region[start:].clone()
    key = digest_module.tensor_key("x")
    far = digest([region], np.array([[60_000, 0, start, key, 1 << 40, *loops]], np.int64))
    assert far == digest([tail.cpu()], np.array([[60_000, 0, 0, key, 1 << 40, *loops]], np.int64))
    target = torch.empty(length + 1, dtype=torch.uint8, device=CUDA)
    for shift in (0, 1):
        copy_module.strided_copy([region], [target], np.array([[60_000, 0, start, 0, start + shift, *loops]], np.int64))
        assert torch.equal(target[start + shift :][:60_000], tail)


def test_scatter_of_a_whole_arena_and_back() -> None:
    source = torch.randint(0, 256, (1 << 28,), dtype=torch.uint8, device=CUDA)
    table = arena_table(source.numel(), 2)
    span = table[:, 4] + table[:, 0] + (table[:, 11] - 1) * table[:, 13]
    table[:, 3] = 0
    table[:, 4] += np.cumsum(span + 7) - (span + 7)
    target = torch.zeros(int((span + 7).sum()), dtype=torch.uint8, device=CUDA)
    copy_module.strided_copy([source], [target], table)
    back = table.copy()
    back[:, [1, 2, 3, 4, 12, 13]] = table[:, [3, 4, 1, 2, 13, 12]]
    returned = torch.zeros_like(source)
    copy_module.strided_copy([target], [returned], back)
    covered = torch.zeros_like(source, dtype=torch.bool)
    for run, _, offset, *_rest in table.tolist():
        covered[offset : offset + run * _rest[8]] = True
    assert torch.equal(returned, torch.where(covered, source, torch.zeros_like(source)))
    again = torch.zeros_like(target)
    copy_module.prepare([source], [again], table, beside="batches")()
    assert torch.equal(again, target)
    host_target = torch.zeros(target.numel(), dtype=torch.uint8)
    copy_module.strided_copy([source.cpu()], [host_target], table)
    assert torch.equal(target.cpu(), host_target)


def compiled_kernels() -> int:
    """How many compiled kernels this process holds."""
    from weightsync.kernels.copy_triton import _copy_kernel
    from weightsync.kernels.digest_triton import _digest_kernel
    from weightsync.kernels.fp8_triton import _quantize_kernel

    kernels = (_copy_kernel, _digest_kernel, _quantize_kernel)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_nothing_is_compiled_after_the_warm_up() -> None:
    warm_up(CUDA)
    for beside in (None, "wire"):
        warm_up_quantize(CUDA, [torch.bfloat16, torch.float32], forward_dtype=torch.bfloat16, beside=beside)
    before = compiled_kernels()
    assert before > 0
    for shape in [(128, 128), (1, 1), (577, 6144), (3, 130, 70), (64, 16)]:
        for dtype in (torch.bfloat16, torch.float32):
            src = torch.randn(shape, device=CUDA).to(dtype)
            quantize_blocks(src, *outputs(src), forward_dtype=torch.bfloat16)
            turned = src.transpose(-1, -2)
            quantize_blocks(turned, *outputs(turned), forward_dtype=torch.bfloat16)
            jobs = [QuantizeJob(src, *outputs(src)), QuantizeJob(turned, *outputs(turned))]
            prepare_quantize(jobs, forward_dtype=torch.bfloat16, beside="wire")([src, turned])
    region = torch.zeros(1 << 24, dtype=torch.uint8, device=CUDA)
    table = arena_table(1 << 22, 3)
    digest([region], table)
    whole = np.array([[region.numel(), 0, 0, digest_module.tensor_key("x"), 0, *[1, 0, 0] * 3]])
    for parts in (digest_module.prepare([region], whole), digest_module.prepare([region], table)):
        for part in range(parts.parts):
            parts.launch(part)
        parts.result()
    digest_module.prepare([region], table, beside="wire")()
    for name, beside in itertools.product(ELEMENTS, BESIDE):
        digest_module.prepare([region], whole, np.array([CODES[name]]), beside=beside)()
    table[:, 3:5] = 0, 0
    target = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    for shift, beside in itertools.product((0, 16, 1 << 20), BESIDE):
        copy_module.prepare([region], [target], table, beside=beside)(shift)
    assert compiled_kernels() == before
