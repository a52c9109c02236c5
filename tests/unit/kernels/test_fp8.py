"""FP8 block quantise: bit-exact, on every kind of input, shape, stride and format."""

import itertools
import math
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weightsync.kernels.dispatch import Beside
from weightsync.kernels.errors import KernelError
from weightsync.kernels.fp8 import prepare_quantize, quantize_blocks
from weightsync.kernels.fp8_jobs import QuantizeJob
from weightsync.kernels.fp8_reference import quantize_reference

hypothesis_settings = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def outputs(
    src: torch.Tensor, block: tuple[int, int] = (128, 128), scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned codes and scales for ``src``."""
    grid = [*src.shape[:-2], -(-src.shape[-2] // block[0]), -(-src.shape[-1] // block[1])]
    codes = torch.full(src.shape, 0xEE, dtype=torch.uint8, device=src.device).view(E4M3)
    size = torch.empty((), dtype=scale_dtype).element_size()
    scales = torch.full([math.prod(grid) * size], 0xEE, dtype=torch.uint8, device=src.device).view(scale_dtype)
    return codes, scales.view(grid)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.cpu().contiguous().view(torch.uint8), second.cpu().contiguous().view(torch.uint8))


def check(src: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise, compare every byte with the reference on the CPU, and give codes and scales."""
    block, scale_dtype = options.get("block", (128, 128)), options.pop("scale_dtype", torch.float32)
    codes, scales = outputs(src, block, scale_dtype)
    quantize_blocks(src, codes, scales, **options)
    expected = outputs(src.cpu(), block, scale_dtype)
    quantize_reference(src.cpu(), *expected, **options)
    assert same(scales, expected[1])
    assert same(codes, expected[0])
    return codes.cpu(), scales.cpu()


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def nearest_code(value: Fraction) -> int:
    """The e4m3 code nearest to ``value`` (at least 0, at most 448), ties to the even code, by exhaustion."""
    return min(range(0x7F), key=lambda code: (abs(E4M3_VALUES[code] - value), code & 1))


E4M3_VALUES = [
    Fraction(code & 7, 512) if code < 8 else (1 + Fraction(code & 7, 8)) * Fraction(2) ** ((code >> 3) - 7)
    for code in range(0x7F)
]


@hypothesis_settings
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_the_definition_in_rational_numbers(device: torch.device, values: list[float]) -> None:
    src = torch.tensor([values], dtype=torch.float32, device=device)
    codes, scales = check(src)
    amax = np.float32(max(abs(value) for value in values))
    scale = max(amax / np.float32(448), np.float32(1e-12))
    assert scales.item() == scale
    for value, code in zip(values, codes.view(torch.uint8)[0].tolist(), strict=True):
        quotient = float(np.float32(value) / scale)
        sign = 0x80 if math.copysign(1, value) < 0 else 0
        assert code == sign | nearest_code(min(Fraction(abs(quotient)), Fraction(448)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (127, 129), (576, 200), (130, 48), (3, 1000)])
def test_shapes_and_dtypes(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(normal(*shape, dtype=dtype).to(device))


@pytest.mark.parametrize("shape", [(3, 128, 256), (2, 130, 70), (4, 1, 5)])
def test_groups_have_grids_of_their_own(device: torch.device, shape: tuple[int, int, int]) -> None:
    src = normal(*shape, dtype=torch.bfloat16).to(device)
    codes, scales = check(src)
    for group in range(shape[0]):
        one = check(src[group])
        assert same(one[0], codes[group])
        assert same(one[1], scales[group])


@pytest.mark.parametrize("forward", DTYPES)
def test_the_cast_to_the_forward_dtype_comes_first(device: torch.device, forward: torch.dtype) -> None:
    """The fp32 master must give what the forward's dtype gives: quantising the master itself made a policy drift."""
    master = normal(200, 300, dtype=torch.float32, seed=4).to(device)
    fused = check(master, forward_dtype=forward)
    cast = check(master.to(forward))
    assert same(fused[0], cast[0])
    assert same(fused[1], cast[1])
    if forward == torch.bfloat16:
        assert not same(fused[0], check(master)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(device: torch.device, dtype: torch.dtype) -> None:
    base = normal(2, 150, 210, dtype=dtype).to(device)
    for src in (
        base.transpose(1, 2),
        base[:, ::2, 1::3],
        base[0].T,
        base[1:2, 5:140, 7:200],
        base[:, :3].permute(1, 0, 2),
    ):
        check(src)
    wide = torch.zeros(160, 400, dtype=torch.uint8, device=device)
    codes, scales = wide[3:153, 5:391:2].view(E4M3), torch.zeros(4, 7, device=device)[::2, 1:3]
    src = base[0, :150, :193]
    quantize_blocks(src, codes, scales)
    expected = check(src)
    assert same(codes.contiguous(), expected[0])
    assert same(scales.contiguous(), expected[1])
    untouched = wide.clone()
    untouched[3:153, 5:391:2] = 0
    assert not bool(untouched.any())


@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e-11, 1e-6, 1e-2, 1e4, 1e30])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_magnitudes(device: torch.device, scale: float, scale_format: str) -> None:
    src = normal(128, 128, dtype=torch.float32, scale=scale).to(device)
    codes, scales = check(src, scale_format=scale_format)
    if scale >= 1e-10:
        error = (codes.float() * scales - src.cpu()).abs().max() / src.cpu().abs().max()
        assert error <= 0.0625


def test_zero_blocks(device: torch.device) -> None:
    codes, scales = check(torch.zeros(130, 130, dtype=torch.bfloat16, device=device))
    assert bool((scales == torch.tensor(1e-12)).all())
    assert not bool(codes.view(torch.uint8).any())
    codes, _ = check(torch.full((2, 2), -0.0, dtype=torch.bfloat16, device=device))
    assert codes.view(torch.uint8).unique().tolist() == [0x80]


def test_tiny_blocks_keep_their_values(device: torch.device) -> None:
    """amax far below 0.0448, where a floor of 1e-4 would leave nothing."""
    src = normal(128, 128, dtype=torch.bfloat16, scale=1e-7).to(device)
    codes, scales = check(src)
    assert ((codes.float() * scales - src.cpu().float()).abs().max() / src.cpu().abs().max().float()) < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_and_extreme_values(device: torch.device, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    edge = [info.tiny, info.smallest_normal / 2, info.max, info.min, info.eps, 0.0, -0.0, 1.0, 448.0, 464.0, 2.0**-9]
    src = torch.tensor(edge * 30, dtype=torch.float64).to(dtype).repeat(4, 1).to(device)
    check(src)
    check(src[:, :2])
    check(src / 1024)


def test_every_e4m3_tie_rounds_to_even(device: torch.device) -> None:
    """amax 448 makes the scale one; then every value halfway between two codes, and its neighbours."""
    values = [float(value) for value in E4M3_VALUES]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    around = [math.nextafter(middle, end) for middle in np.float32(middles).tolist() for end in (0, 500)]
    src = torch.tensor([[448.0, *middles, *around, *values]], dtype=torch.float32, device=device)
    for part in src.split(100, dim=1):
        block = torch.cat([torch.full((1, 1), 448.0, device=device), part], dim=1)
        _, scales = check(torch.cat([block, -block]))
        assert scales.unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_marks_its_block_and_no_other(device: torch.device, dtype: torch.dtype) -> None:
    src = normal(128, 384, dtype=dtype)
    src[5, 130] = float("nan")
    codes, scales = check(src.to(device))
    assert scales.view(torch.int32)[0, 1].item() == 0x7FC00000
    assert (codes.view(torch.uint8)[:, 128:256] == 0x7F).all()
    assert scales[0, [0, 2]].isfinite().all()
    check((-src).to(device))
    payload = torch.full((2, 2), -1, dtype=torch.int32).view(torch.float32)
    codes, scales = check(payload.to(device))
    assert scales.view(torch.int32).unique().tolist() == [0x7FC00000]


@pytest.mark.parametrize(("scale_format", "scale_dtype"), [("fp32", torch.float32), ("ue8m0", torch.uint8)])
def test_infinity_marks_its_block_as_nan_does(
    device: torch.device, scale_format: str, scale_dtype: torch.dtype
) -> None:
    src = normal(4, 384, dtype=torch.bfloat16)
    src[1, 3], src[2, 300] = float("inf"), float("-inf")
    codes, scales = check(src.to(device), scale_format=scale_format, scale_dtype=scale_dtype)
    marked = scales == 0xFF if scale_dtype == torch.uint8 else scales.view(torch.int32) == 0x7FC00000
    assert marked.tolist() == [[True, False, True]]
    assert (codes.view(torch.uint8)[:, :128] == 0x7F).all()
    assert not (codes.view(torch.uint8)[:, 128:256] == 0x7F).any()


@pytest.mark.parametrize("block", [(128, 128), (1, 128), (1, 32)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
def test_power_of_two_scales(device: torch.device, block: tuple[int, int], scale_dtype: torch.dtype) -> None:
    src = normal(150, 210, dtype=torch.bfloat16).to(device)
    src[0, :32] = 0
    codes, scales = check(src, block=block, scale_format="ue8m0", scale_dtype=scale_dtype)
    exact = check(src, block=block)[1]
    values = scales if scale_dtype == torch.float32 else torch.exp2(scales.view(torch.uint8).float() - 127)
    assert torch.equal(torch.frexp(values)[0], torch.full_like(values, 0.5))
    assert bool(((values >= exact) & (values < 2 * exact)).all())
    spread = values.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:150, :210]
    assert ((codes.float() * spread - src.cpu().float()).abs() <= 0.0625 * src.cpu().float().abs() + spread / 512).all()


@pytest.mark.parametrize("beside", [None, "batches", "wire"])
def test_many_sources_land_side_by_side_in_one_slot(device: torch.device, beside: Beside | None) -> None:
    """q, k, v into one parameter: each on its own grid, codes by rows, scale tiles by ceil(rows / 128)."""
    sources = [normal(rows, 256, dtype=torch.bfloat16, seed=rows).to(device) for rows in (256, 130, 576, 1)]
    sources += [normal(2, 100, 256, dtype=torch.bfloat16).to(device)]
    slot = torch.full((256 + 130 + 576 + 1 + 200, 256), 0xEE, dtype=torch.uint8, device=device)
    tile = torch.full((2 + 2 + 5 + 1 + 2, 2), -1.0, device=device)
    jobs, row, block_row = [], 0, 0
    for src in sources:
        rows = src.shape[-2] * (src.shape[0] if src.dim() == 3 else 1)
        blocks = -(-src.shape[-2] // 128) * (src.shape[0] if src.dim() == 3 else 1)
        out, scale = slot[row : row + rows].view(E4M3), tile[block_row : block_row + blocks]
        jobs.append(QuantizeJob(src, out.view(src.shape), scale.view(*src.shape[:-2], -1, 2)))
        row, block_row = row + rows, block_row + blocks
    launch = prepare_quantize(jobs, beside=beside)
    launch(sources)
    for job in jobs:
        codes, scales = check(job.src)
        assert same(job.out.contiguous(), codes)
        assert same(job.scale_out.contiguous(), scales)
    others = [torch.randn_like(src) for src in sources]
    launch(others)
    for job, src in zip(jobs, others, strict=True):
        assert same(job.out.contiguous(), check(src)[0])
    shifted = [torch.randn(src.numel() + 1).to(src)[1:].view(src.shape) for src in sources]
    launch(shifted)
    for job, src in zip(jobs, shifted, strict=True):
        assert same(job.out.contiguous(), check(src)[0])
    launch(sources)
    assert same(jobs[0].out.contiguous(), check(sources[0])[0])


def test_mixed_dtypes_in_one_call(device: torch.device) -> None:
    sources = [normal(60, 70, dtype=dtype).to(device) for dtype in DTYPES]
    jobs = [QuantizeJob(src, *outputs(src)) for src in sources]
    prepare_quantize(jobs, forward_dtype=torch.bfloat16)(sources)
    for job in jobs:
        assert same(job.out, check(job.src, forward_dtype=torch.bfloat16)[0])


def test_nothing_to_do(device: torch.device) -> None:
    prepare_quantize([])([])
    check(torch.zeros(0, 128, dtype=torch.bfloat16, device=device))
    check(torch.zeros(2, 128, 0, dtype=torch.bfloat16, device=device))


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    src = normal(130, 100, dtype=torch.bfloat16).to(device)
    codes, scales = outputs(src)
    for arguments, options, words in [
        ((src.double(), codes, scales), {}, "cannot quantise torch.float64"),
        ((src, codes[:-1], scales), {}, "out must be"),
        ((src, codes, scales.T), {}, r"scale_out must be torch.float32 \[2, 1\]"),
        ((src, codes, scales.to(torch.uint8)), {}, "scale_out must be"),
        ((src, codes, scales), {"block": (64, 64)}, "blocks of"),
        ((src, codes, scales), {"scale_format": "bf16"}, "scale format"),
        ((src, codes, scales), {"forward_dtype": torch.int8}, "no forward dtype"),
        ((src[0], codes[0], scales), {}, "a source is"),
    ]:
        with pytest.raises(KernelError, match=words):
            quantize_blocks(*arguments, **options)
    launch = prepare_quantize([QuantizeJob(src, codes, scales)])
    with pytest.raises(KernelError, match="source 0 was prepared as"):
        launch([src.float()])
    with pytest.raises(KernelError, match="2 sources for 1 jobs"):
        launch([src, src])
    assert bool((codes.view(torch.uint8) == 0xEE).all())


def test_sources_are_not_kept(device: torch.device) -> None:
    src = normal(130, 100, dtype=torch.bfloat16).to(device)
    kept = weakref.ref(src)
    launch = prepare_quantize([QuantizeJob(src, *outputs(src))])
    launch([src])
    del src
    assert kept() is None


def test_outputs_are_kept(device: torch.device) -> None:
    """Their addresses are in tables, and others would be written to in their place."""
    src = normal(130, 100, dtype=torch.bfloat16).to(device)
    codes, scales = outputs(src)
    kept = [weakref.ref(codes), weakref.ref(scales)]
    launch = prepare_quantize([QuantizeJob(src, codes, scales)])
    del codes, scales
    assert all(ref() is not None for ref in kept)
    launch([src])
