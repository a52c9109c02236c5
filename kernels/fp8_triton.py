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
"""Of int64: out, scale, rows, columns, 3 source strides, 3 code strides, 3 scale strides, 3 unused."""
ITEM_COLUMNS: Final = 4
"""Of int32: job, group, row of tiles, column of tiles."""
VECTORS, ROWS, ANY = range(3)
"""How a tile is reached: rows of aligned 16-byte vectors, rows at any alignment, any strides."""
MAX_ROW_STRIDE: Final = 1 << 23
"""Rows of at most this many elements let a tile's offsets be 32 bits wide."""
OPTIONS: Final = {"num_warps": 8}
DTYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _at(address, kind: tl.constexpr, ACCESS: tl.constexpr):
    """``address`` as a pointer; the compiler is told of its alignment where the table promises one."""
    pointer = address.to(tl.pointer_type(kind))
    if ACCESS == 0:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(address, offsets, mask, DTYPE: tl.constexpr, ACCESS: tl.constexpr):
    """Source values as fp32, and 0 where ``mask`` is false."""
    if tl.bfloat16 == DTYPE:
        raw = tl.load(_at(address, tl.uint16, ACCESS) + offsets, mask=mask, other=0)
        values = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        values = tl.load(_at(address, DTYPE, ACCESS) + offsets, mask=mask, other=0.0).to(tl.float32)
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
    """The scale, fp32, from the largest magnitude's bits: infinity and NaN sort above all numbers there."""
    scale = tl.maximum(tl.div_rn(amax_bits.to(tl.float32, bitcast=True), 448.0), 1e-12)
    bits = scale.to(tl.int32, bitcast=True)
    if POW2:
        bits = ((bits + 0x7FFFFF) >> 23) << 23
    return tl.where(amax_bits >= 0x7F800000, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _divide(values, scale, NATIVE: tl.constexpr):
    """``values / scale`` as IEEE rounds it, except that quotients below 2**-60 may differ in their last place.

    Markstein's theorem: with the correctly rounded reciprocal, the second correction of a product gives the correctly
    rounded quotient, while remainders are exact, which they are for values of at least 2**-100. The reciprocal is one
    per scale, and five multiplications replace a division. The interpreter has no fused multiplication.
    """
    if NATIVE:
        reciprocal = tl.div_rn(1.0, scale)
        quotient = values * reciprocal
        quotient = tl.fma(tl.fma(-quotient, scale, values), reciprocal, quotient)
        quotient = tl.fma(tl.fma(-quotient, scale, values), reciprocal, quotient)
    else:
        quotient = tl.div_rn(values, scale)
    return quotient


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
def _quantize_kernel(
    sources, jobs, items, ACCESS: tl.constexpr, DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, FORWARD: tl.constexpr,
    SCALE_BYTES: tl.constexpr, POW2: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * 4
    job, group = tl.load(item), tl.load(item + 1).to(tl.int64)
    first_row, first_column = tl.load(item + 2) * 128, tl.load(item + 3) * 128
    at = jobs + job * 16
    source, out, scales = tl.load(sources + job), tl.load(at), tl.load(at + 1)
    rows, columns = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
    source_row, out_row = tl.load(at + 5), tl.load(at + 8)
    scale_row, scale_column = tl.load(at + 11), tl.load(at + 12)
    row, column = tl.arange(0, 128)[:, None], tl.arange(0, 128)[None, :]
    if ACCESS == 2:
        source_column, out_column = tl.load(at + 6), tl.load(at + 9)
        source += (group * tl.load(at + 4) + first_row * source_row + first_column * source_column) * ITEMSIZE
        out += group * tl.load(at + 7) + first_row * out_row + first_column * out_column
        source_offsets, out_offsets = row * source_row + column * source_column, row * out_row + column * out_column
    else:
        source += (group * tl.load(at + 4) + first_row * source_row + first_column) * ITEMSIZE
        out += group * tl.load(at + 7) + first_row * out_row + first_column
        source_pitch, out_pitch = source_row.to(tl.int32), out_row.to(tl.int32)
        if ACCESS == 0:
            # Shifting down and up again shows the compiler what the table promises: 16-byte vectors.
            source_pitch, out_pitch, columns = (source_pitch >> 4) * 16, (out_pitch >> 4) * 16, (columns >> 4) * 16
        source_offsets, out_offsets = row * source_pitch + column, row * out_pitch + column
    block_row, block_column = first_row // HEIGHT, first_column // WIDTH
    scales += (group * tl.load(at + 10) + block_row * scale_row + block_column * scale_column) * SCALE_BYTES
    mask = (first_row + row < rows) & (first_column + column < columns)
    values = _forward(_load(source, source_offsets, mask, DTYPE, ACCESS), FORWARD, NATIVE)
    if HEIGHT == 128:
        amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        scale = _scale_of(amax, POW2)
        _store_scale(scales, 0, scale, True, SCALE_BYTES)
        codes = _encode(_divide(values, scale, NATIVE), NATIVE)
    else:
        parts: tl.constexpr = 128 // WIDTH
        grouped = tl.reshape(values, (128, parts, WIDTH))
        amax = tl.max(grouped.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
        scale = _scale_of(amax, POW2)
        part = tl.arange(0, parts)[None, :]
        inside = (first_row + row < rows) & (first_column + part * WIDTH < columns)
        _store_scale(scales, row * scale_row + part * scale_column, scale, inside, SCALE_BYTES)
        codes = tl.reshape(_encode(_divide(grouped, tl.expand_dims(scale, 2), NATIVE), NATIVE), (128, 128))
    tl.store(_at(out, tl.uint8, ACCESS) + out_offsets, codes, mask=mask)


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch: all jobs of one kind."""

    dtype: torch.dtype
    scale_bytes: int
    access: int
    which: list[int]
    jobs: torch.Tensor
    items: torch.Tensor


class TritonQuantize:
    """Many tensors in one launch; see :func:`weightsync.kernels.fp8.prepare_quantize`."""

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
        kinds: dict[tuple[torch.dtype, int, int], list[int]] = {}
        for index, job in enumerate(self._jobs):
            if job.src.numel():
                kinds.setdefault((job.src.dtype, job.scale_out.element_size(), _access(job)), []).append(index)
        self._launches = [self._launch(*kind, which) for kind, which in kinds.items()]
        self._addresses = [_Addresses(self._device) for _ in self._launches]

    def _launch(self, dtype: torch.dtype, scale_bytes: int, access: int, which: list[int]) -> _Launch:
        table = np.array([_job_row(self._jobs[index]) for index in which], np.int64)
        items = np.concatenate([_tiles(place, self._jobs[index].src.shape) for place, index in enumerate(which)])
        return _Launch(
            dtype,
            scale_bytes,
            access,
            which,
            torch.from_numpy(table).to(self._device),
            torch.from_numpy(np.ascontiguousarray(items)).to(self._device),
        )

    def __call__(self, sources: Sequence[torch.Tensor] | None = None) -> None:
        """Quantise on the current stream; sources as in :class:`weightsync.kernels.fp8.PreparedQuantize`."""
        chosen = stand_ins(self._jobs, sources)
        for launch, upload in zip(self._launches, self._addresses, strict=True):
            addresses = [chosen[index].data_ptr() for index in launch.which]
            access = launch.access
            if access == VECTORS and any(address % 16 for address in addresses):
                access = ROWS  # a source that stands in may be aligned worse than the one it was prepared with
            with on_device(self._device):
                _quantize_kernel[(len(launch.items),)](
                    upload(addresses),
                    launch.jobs,
                    launch.items,
                    ACCESS=access,
                    DTYPE=DTYPES[launch.dtype],
                    ITEMSIZE=launch.dtype.itemsize,
                    FORWARD=self._forward if self._forward != DTYPES[launch.dtype] else None,
                    SCALE_BYTES=launch.scale_bytes,
                    POW2=self._scale_format == "ue8m0",
                    HEIGHT=self._block[0],
                    WIDTH=self._block[1],
                    NATIVE=self._native,
                    **OPTIONS,
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


def _three_dimensional(job: QuantizeJob) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source, codes and scales of a job; two-dimensional tensors are one group."""
    tensors = (job.src, job.out, job.scale_out)
    return tensors if job.src.dim() == 3 else (job.src[None], job.out[None], job.scale_out[None])


def _access(job: QuantizeJob) -> int:
    """The widest access that a job's tensors allow."""
    src, out, _ = _three_dimensional(job)
    if not src.stride(2) == out.stride(2) == 1 or max(src.stride(1), out.stride(1)) > MAX_ROW_STRIDE:
        return ANY
    units = (src.stride(0), src.stride(1), src.shape[2], out.stride(0), out.stride(1), src.data_ptr(), out.data_ptr())
    return VECTORS if all(unit % 16 == 0 for unit in units) else ROWS


def _job_row(job: QuantizeJob) -> list[int]:
    """A job's columns."""
    src, out, scale = _three_dimensional(job)
    strides = [*src.stride(), *out.stride(), *scale.stride()]
    return [out.data_ptr(), scale.data_ptr(), src.shape[1], src.shape[2], *strides, 0, 0, 0]


def _tiles(job: int, shape: torch.Size) -> npt.NDArray[np.int32]:
    """Items of one job: its tiles, those of a row side by side."""
    groups = shape[0] if len(shape) == 3 else 1
    grid = np.indices((groups, -(-shape[-2] // TILE), -(-shape[-1] // TILE)), dtype=np.int32).reshape(3, -1).T
    return np.column_stack([np.full(len(grid), job, np.int32), grid])
