"""FP8 block quantise in Triton: one program per 128 × 128 tile, any number of tensors in one launch.

Tables on the device say what each program does: an item names a job and a tile of it, a job has addresses, shape and
strides. Sources, codes and scales are raw addresses, so that no launch depends on how many tensors there are.
"""
# Triton's functions are compiled from their source and have types of their own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from weightsync.kernels.dispatch import interpreting, on_device
from weightsync.kernels.fp8 import QuantizeJob, stand_ins
from weightsync.kernels.fp8_reference import ScaleFormat

TILE: Final = 128
JOB_COLUMNS: Final = 16
"""Of int64: out, scale, rows, columns, 3 source strides, 3 code strides, 3 scale strides, vectorised, 2 unused."""
ITEM_COLUMNS: Final = 4
"""Of int32: job, group, row of tiles, column of tiles."""
MAX_FAST_STRIDE: Final = 1 << 23
"""Rows of at most this many elements let a tile's offsets be 32 bits wide."""
WARPS: Final = 8
DTYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _load(address, offsets, mask, DTYPE: tl.constexpr):
    """Source values as fp32, and 0 where ``mask`` is false."""
    if tl.bfloat16 == DTYPE:
        raw = tl.load(address.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        values = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        values = tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _forward(values, FORWARD: tl.constexpr, NATIVE: tl.constexpr):
    """``values`` as the forward dtype holds them, in fp32."""
    if tl.bfloat16 == FORWARD:
        if NATIVE:
            values = values.to(tl.bfloat16).to(tl.float32)
        else:
            bits = values.to(tl.uint32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            values = tl.where(nan, bits, rounded).to(tl.float32, bitcast=True)
    elif tl.float16 == FORWARD:
        values = values.to(tl.float16).to(tl.float32)
    return values


@triton.jit
def _scale_of(amax_bits, POW2: tl.constexpr):
    """The scale, fp32, from the largest magnitude's bits; NaN sorts above infinity there, so it wins the maximum."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1e-12)
    bits = scale.to(tl.int32, bitcast=True)
    if POW2:
        bits = ((bits + 0x7FFFFF) >> 23) << 23
        bits = tl.where(amax_bits >= 0x7F800000, 0x7FC00000, bits)
    else:
        bits = tl.where(amax_bits > 0x7F800000, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _encode(quotient, NATIVE: tl.constexpr):
    """e4m3 codes, round to nearest even. Quotients are at most 448 and one rounding error, or NaN."""
    if NATIVE:
        codes = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = quotient.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0  # the last place of 2**14 is e4m3's smallest step
        subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        code = tl.where(magnitude > 0x7F800000, 0x7F, code | ((bits >> 24) & 0x80))
        codes = code.to(tl.uint8)
    return codes


@triton.jit
def _store_scale(address, offsets, scale, mask, SCALE_BYTES: tl.constexpr):
    """fp32 scales as they are, or their biased exponents (0xFF for NaN)."""
    if SCALE_BYTES == 1:
        exponent = (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
        tl.store(address.to(tl.pointer_type(tl.uint8)) + offsets, exponent.to(tl.uint8), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, scale, mask=mask)


@triton.jit
def _tile(
    source, out, scales, source_offsets, out_offsets, mask, scale_row, scale_column, first_row, first_column, rows,
    columns, DTYPE: tl.constexpr, FORWARD: tl.constexpr, SCALE_BYTES: tl.constexpr, POW2: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Quantise one tile; ``scales`` is the address of the tile's first scale."""
    values = _forward(_load(source, source_offsets, mask, DTYPE), FORWARD, NATIVE)
    if HEIGHT == 128:
        amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        scale = _scale_of(amax, POW2)
        _store_scale(scales, 0, scale, True, SCALE_BYTES)
        codes = _encode(tl.div_rn(values, tl.broadcast_to(scale, 128, 128)), NATIVE)
    else:
        parts: tl.constexpr = 128 // WIDTH
        grouped = tl.reshape(values, (128, parts, WIDTH))
        amax = tl.max(grouped.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
        scale = _scale_of(amax, POW2)
        row, part = tl.arange(0, 128)[:, None], tl.arange(0, parts)[None, :]
        inside = (first_row + row < rows) & (first_column + part * WIDTH < columns)
        _store_scale(scales, row * scale_row + part * scale_column, scale, inside, SCALE_BYTES)
        spread = tl.broadcast_to(tl.expand_dims(scale, 2), (128, parts, WIDTH))
        codes = tl.reshape(_encode(tl.div_rn(grouped, spread), NATIVE), (128, 128))
    tl.store(out.to(tl.pointer_type(tl.uint8)) + out_offsets, codes, mask=mask)


@triton.jit
def _quantize_kernel(
    sources, jobs, items, DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, FORWARD: tl.constexpr,
    SCALE_BYTES: tl.constexpr, POW2: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * 4
    job, group = tl.load(item), tl.load(item + 1).to(tl.int64)
    first_row, first_column = tl.load(item + 2) * 128, tl.load(item + 3) * 128
    at = jobs + job * 16
    source, out, scales = tl.load(sources + job), tl.load(at), tl.load(at + 1)
    rows, columns = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
    source_row, source_column = tl.load(at + 5), tl.load(at + 6)
    out_row, out_column = tl.load(at + 8), tl.load(at + 9)
    scale_row, scale_column = tl.load(at + 11), tl.load(at + 12)
    source += (group * tl.load(at + 4) + first_row * source_row + first_column * source_column) * ITEMSIZE
    out += group * tl.load(at + 7) + first_row * out_row + first_column * out_column
    block_row, block_column = first_row // HEIGHT, first_column // WIDTH
    scales += (group * tl.load(at + 10) + block_row * scale_row + block_column * scale_column) * SCALE_BYTES
    row, column = tl.arange(0, 128)[:, None], tl.arange(0, 128)[None, :]
    if (tl.load(at + 13) != 0) & ((source & 15) == 0):
        # Shifting down and up again shows the compiler what the table promises: 16-byte vectors.
        pitch, out_pitch = (source_row.to(tl.int32) >> 4) * 16, (out_row.to(tl.int32) >> 4) * 16
        mask = (first_row + row < rows) & (first_column + column < (columns >> 4) * 16)
        _tile(
            (source >> 4) * 16, (out >> 4) * 16, scales, row * pitch + column, row * out_pitch + column, mask,
            scale_row, scale_column, first_row, first_column, rows, columns,
            DTYPE, FORWARD, SCALE_BYTES, POW2, HEIGHT, WIDTH, NATIVE,
        )  # fmt: skip
    else:
        mask = (first_row + row < rows) & (first_column + column < columns)
        _tile(
            source, out, scales, row * source_row + column * source_column, row * out_row + column * out_column, mask,
            scale_row, scale_column, first_row, first_column, rows, columns,
            DTYPE, FORWARD, SCALE_BYTES, POW2, HEIGHT, WIDTH, NATIVE,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch: all jobs of one source dtype and one width of scales."""

    dtype: torch.dtype
    scale_bytes: int
    which: list[int]
    jobs: torch.Tensor
    items: torch.Tensor
    programs: int


class TritonQuantize:
    """Many tensors in one launch per source dtype; see :func:`weightsync.kernels.fp8.prepare_quantize`."""

    def __init__(
        self,
        jobs: Sequence[QuantizeJob],
        block: tuple[int, int],
        forward_dtype: torch.dtype | None,
        scale_format: ScaleFormat,
    ) -> None:
        """Arguments as checked by ``prepare_quantize``. Tables are uploaded here."""
        self._jobs, self._block, self._scale_format = list(jobs), block, scale_format
        self._forward = DTYPES[forward_dtype] if forward_dtype is not None else None
        self._device = self._jobs[0].src.device if self._jobs else torch.device("cpu")
        self._native = not interpreting() and torch.cuda.get_device_capability(self._device) >= (8, 9)
        kinds = sorted({(str(job.src.dtype), job.scale_out.element_size()) for job in self._jobs})
        self._launches = [self._launch(*kind) for kind in kinds]
        self._addresses = [_Addresses(self._device) for _ in self._launches]

    def _launch(self, dtype: str, scale_bytes: int) -> _Launch:
        which = [
            index
            for index, job in enumerate(self._jobs)
            if (str(job.src.dtype), job.scale_out.element_size()) == (dtype, scale_bytes) and job.src.numel()
        ]
        table = np.array([_job_row(self._jobs[index]) for index in which], np.int64).reshape(-1, JOB_COLUMNS)
        items = [_tiles(position, self._jobs[index].src.shape) for position, index in enumerate(which)]
        flat = np.concatenate(items) if items else np.zeros((0, ITEM_COLUMNS), np.int32)
        return _Launch(
            getattr(torch, dtype.removeprefix("torch.")),
            scale_bytes,
            which,
            torch.from_numpy(table).to(self._device),
            torch.from_numpy(np.ascontiguousarray(flat)).to(self._device),
            len(flat),
        )

    def __call__(self, sources: Sequence[torch.Tensor] | None = None) -> None:
        """Quantise on the current stream; sources as in :class:`weightsync.kernels.fp8.PreparedQuantize`."""
        chosen = stand_ins(self._jobs, sources)
        for launch, upload in zip(self._launches, self._addresses, strict=True):
            if not launch.programs:
                continue
            addresses = upload([chosen[index].data_ptr() for index in launch.which])
            with on_device(self._device):
                _quantize_kernel[(launch.programs,)](
                    addresses,
                    launch.jobs,
                    launch.items,
                    DTYPE=DTYPES[launch.dtype],
                    ITEMSIZE=launch.dtype.itemsize,
                    FORWARD=self._forward if self._forward != DTYPES[launch.dtype] else None,
                    SCALE_BYTES=launch.scale_bytes,
                    POW2=self._scale_format == "ue8m0",
                    HEIGHT=self._block[0],
                    WIDTH=self._block[1],
                    NATIVE=self._native,
                    num_warps=WARPS,
                )


class _Addresses:
    """Source addresses on the device, sent again only when they change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: list[int] = []
        self._tensor = torch.empty(0, dtype=torch.int64)

    def __call__(self, values: list[int]) -> torch.Tensor:
        """``values`` as int64[n] on the device, ordered with the current stream."""
        if values != self._values:
            host = torch.tensor(values, dtype=torch.int64)
            if self._device.type == "cuda":
                host = host.pin_memory()  # so that a round does not wait for the copy
            self._tensor, self._values = host.to(self._device, non_blocking=True), values
        return self._tensor


def _job_row(job: QuantizeJob) -> list[int]:
    """A job's columns; two-dimensional tensors are one group."""
    src, out, scale = (one if one.dim() == 3 else one[None] for one in (job.src, job.out, job.scale_out))
    aligned = (src.stride(0), src.stride(1), src.shape[2], out.stride(0), out.stride(1), out.data_ptr())
    fast = (
        src.stride(2) == out.stride(2) == 1
        and all(value % 16 == 0 for value in aligned)
        and max(src.stride(1), out.stride(1)) <= MAX_FAST_STRIDE
    )
    strides = [*src.stride(), *out.stride(), *scale.stride()]
    return [out.data_ptr(), scale.data_ptr(), src.shape[1], src.shape[2], *strides, int(fast), 0, 0]


def _tiles(job: int, shape: torch.Size) -> npt.NDArray[np.int32]:
    """Items of one job: its tiles, those of a row side by side."""
    groups = shape[0] if len(shape) == 3 else 1
    grid = np.indices((groups, -(-shape[-2] // TILE), -(-shape[-1] // TILE)), dtype=np.int32).reshape(3, -1).T
    return np.ascontiguousarray(np.column_stack([np.full(len(grid), job, np.int32), grid]), np.int32)
