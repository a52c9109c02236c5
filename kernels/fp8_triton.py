"""FP8 block quantise in Triton by tiles of 128 × 128, any number of tensors in one launch.

A table on the device says what a program does: addresses, shape and strides of its tile. Addresses are raw, so that
no launch depends on how many tensors there are.
"""
# Triton's functions are compiled from their source and have types of their own.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from weightsync.kernels.dispatch import Beside, interpreting, on_device, programs_beside
from weightsync.kernels.fp8_jobs import Look, QuantizeJob, checked_sources
from weightsync.kernels.fp8_reference import ScaleFormat
from weightsync.kernels.strided import Table

TILE: Final = 128
TILE_COLUMNS: Final = 10
"""Of int64: addresses of codes and of the first scale, rows and columns left, strides of rows (source, codes), of
columns (source, codes) and of scales (rows, columns)."""
_TILE_COLUMNS: Final = tl.constexpr(TILE_COLUMNS)
"""The same for the kernel: compiled functions read no other globals than constexpr ones."""
VECTORS, ROWS, ANY = range(3)
"""How a tile is reached: rows of aligned 16-byte vectors, rows at any alignment, any strides."""
MAX_ROW_STRIDE: Final = 1 << 23
"""Rows of at most this many elements let a tile's offsets be 32 bits wide."""
OPTIONS: Final = {2: {"num_warps": 8}, 4: {"num_warps": 8, "maxnreg": 80}}
"""Per bytes of a source element. At 64 and 80 registers four and three tiles of 48 and 80 KiB of traffic share a
multiprocessor, which is what hides the memory's latency; fp32 tiles would otherwise take 115 registers, for two."""
DTYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _at(address, kind: tl.constexpr, ACCESS: tl.constexpr):
    """``address`` as a pointer; the compiler is told of its alignment where the table promises one."""
    pointer = address.to(tl.pointer_type(kind))
    if ACCESS == 0:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _narrow(values, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 as the bits of DTYPE, rounded to nearest even."""
    if tl.bfloat16 == DTYPE:
        if NATIVE:
            bits = values.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        else:
            wide = values.to(tl.uint32, bitcast=True)
            rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
            bits = tl.where((wide & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    elif tl.float16 == DTYPE:
        bits = values.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        bits = values.to(tl.uint32, bitcast=True)
    return bits


@triton.jit
def _widen(bits, DTYPE: tl.constexpr):
    """The bits of DTYPE as fp32."""
    if tl.bfloat16 == DTYPE:
        values = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif tl.float16 == DTYPE:
        values = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        values = bits.to(tl.float32, bitcast=True)
    return values


@triton.jit
def _magnitude(bits, DTYPE: tl.constexpr):
    """The bits without the sign, int32: they sort as the numbers do, infinity and NaN above all."""
    if tl.float32 == DTYPE:
        magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
    else:
        magnitude = (bits & 0x7FFF).to(tl.int32)
    return magnitude


@triton.jit
def _scale_of(largest, DTYPE: tl.constexpr, POW2: tl.constexpr):
    """The scale, fp32, from the largest magnitude; the quiet NaN where that is not finite."""
    if tl.float32 == DTYPE:
        amax = largest.to(tl.float32, bitcast=True)
    else:
        amax = _widen(largest.to(tl.uint16), DTYPE)
    bits = tl.maximum(tl.div_rn(amax, 448.0), 1e-12).to(tl.int32, bitcast=True)
    if POW2:
        bits = ((bits + 0x7FFFFF) >> 23) << 23
    infinite = amax.to(tl.int32, bitcast=True) >= 0x7F800000
    return tl.where(infinite, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _divide(values, scale, NATIVE: tl.constexpr):
    """``values / scale`` as IEEE rounds it, except that quotients below 2**-60 may differ in their last place.

    Markstein's theorem: with the correctly rounded reciprocal, the second correction of a product gives the correctly
    rounded quotient, while remainders are exact, which they are for values of at least 2**-100. The reciprocal is one
    per scale, and five multiplications replace a division. The interpreter has no fused multiplication.
    """
    if NATIVE:
        # With signs turned round twice, so that -0 stays -0: an exact remainder of zero is +0, whatever the value.
        opposite = (values.to(tl.int32, bitcast=True) ^ -0x80000000).to(tl.float32, bitcast=True)
        reciprocal = tl.div_rn(-1.0, scale)
        quotient = opposite * reciprocal
        quotient = tl.fma(tl.fma(quotient, scale, opposite), reciprocal, quotient)
        quotient = tl.fma(tl.fma(quotient, scale, opposite), reciprocal, quotient)
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
def _load(
    source, offsets, mask, ACCESS: tl.constexpr, DTYPE: tl.constexpr, FORWARD: tl.constexpr, NATIVE: tl.constexpr
):
    """Bits of the forward dtype, 0 where ``mask`` is false."""
    if tl.float32 == DTYPE:
        bits = tl.load(_at(source, tl.uint32, ACCESS) + offsets, mask=mask, other=0)
    else:
        bits = tl.load(_at(source, tl.uint16, ACCESS) + offsets, mask=mask, other=0)
    if FORWARD != DTYPE:
        bits = _narrow(_widen(bits, DTYPE), FORWARD, NATIVE)
    return bits


@triton.jit
def _encode_rows(
    bits, scales, scale_row, scale_column, first, rows, columns, FORWARD: tl.constexpr, SCALE_BYTES: tl.constexpr,
    POW2: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Codes of 64 rows from row ``first`` of the tile on, with a scale for every WIDTH columns, which is stored."""
    parts: tl.constexpr = 128 // WIDTH
    grouped = tl.reshape(bits, (64, parts, WIDTH))
    scale = _scale_of(tl.max(_magnitude(grouped, FORWARD), axis=2), FORWARD, POW2)
    row, part = first + tl.arange(0, 64)[:, None], tl.arange(0, parts)[None, :]
    inside = (row < rows) & (part * WIDTH < columns)
    _store_scale(scales, row * scale_row + part * scale_column, scale, inside, SCALE_BYTES)
    quotient = _divide(_widen(grouped, FORWARD), tl.expand_dims(scale, 2), NATIVE)
    return tl.reshape(_encode(quotient, NATIVE), (64, 128))


@triton.jit
def _quantize_tile(
    tile, sources, tiles, ACCESS: tl.constexpr, DTYPE: tl.constexpr, FORWARD: tl.constexpr, SCALE_BYTES: tl.constexpr,
    POW2: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    at = tiles + tile.to(tl.int64) * _TILE_COLUMNS
    source, out, scales = tl.load(sources + tile), tl.load(at), tl.load(at + 1)
    rows, columns = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
    source_row, out_row = tl.load(at + 4), tl.load(at + 5)
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 128)[None, :]
    if ACCESS == 2:
        source_offsets = row * source_row + column * tl.load(at + 6)
        out_offsets = row * out_row + column * tl.load(at + 7)
    else:
        source_row, out_row = source_row.to(tl.int32), out_row.to(tl.int32)
        if ACCESS == 0:
            # Shifting down and up again shows the compiler what the table promises: 16-byte vectors.
            source_row, out_row, columns = (source_row >> 4) * 16, (out_row >> 4) * 16, (columns >> 4) * 16
        source_offsets, out_offsets = row * source_row + column, row * out_row + column
    # In two halves, and in the forward dtype's own width until the scale is known: registers decide how many tiles
    # are in flight, and those how much of the memory's speed is reached.
    upper_mask, lower_mask = (row < rows) & (column < columns), (64 + row < rows) & (column < columns)
    upper = _load(source, source_offsets, upper_mask, ACCESS, DTYPE, FORWARD, NATIVE)
    lower = _load(source, source_offsets + 64 * source_row, lower_mask, ACCESS, DTYPE, FORWARD, NATIVE)
    pointer = _at(out, tl.uint8, ACCESS)
    if HEIGHT == 128:
        largest = tl.max(tl.maximum(_magnitude(upper, FORWARD), _magnitude(lower, FORWARD)))
        scale = _scale_of(largest, FORWARD, POW2)
        _store_scale(scales, 0, scale, True, SCALE_BYTES)
        codes = _encode(_divide(_widen(upper, FORWARD), scale, NATIVE), NATIVE)
        tl.store(pointer + out_offsets, codes, mask=upper_mask)
        codes = _encode(_divide(_widen(lower, FORWARD), scale, NATIVE), NATIVE)
        tl.store(pointer + (out_offsets + 64 * out_row), codes, mask=lower_mask)
    else:
        scale_row, scale_column = tl.load(at + 8), tl.load(at + 9)
        codes = _encode_rows(
            upper, scales, scale_row, scale_column, 0, rows, columns, FORWARD, SCALE_BYTES, POW2, WIDTH, NATIVE
        )
        tl.store(pointer + out_offsets, codes, mask=upper_mask)
        codes = _encode_rows(
            lower, scales, scale_row, scale_column, 64, rows, columns, FORWARD, SCALE_BYTES, POW2, WIDTH, NATIVE
        )
        tl.store(pointer + (out_offsets + 64 * out_row), codes, mask=lower_mask)


@triton.jit(do_not_specialize=["count"])
def _quantize_kernel(
    sources, tiles, count, ACCESS: tl.constexpr, DTYPE: tl.constexpr, FORWARD: tl.constexpr, SCALE_BYTES: tl.constexpr,
    POW2: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for number in range(tl.program_id(0), count, tl.num_programs(0)):
            tile = number + tl.full([], 0, tl.int32)
            _quantize_tile(tile, sources, tiles, ACCESS, DTYPE, FORWARD, SCALE_BYTES, POW2, HEIGHT, WIDTH, NATIVE)
    else:
        tile = tl.program_id(0)
        _quantize_tile(tile, sources, tiles, ACCESS, DTYPE, FORWARD, SCALE_BYTES, POW2, HEIGHT, WIDTH, NATIVE)


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch: all jobs of one kind. A program finds at its tile what it needs, so that one load leads to data."""

    dtype: torch.dtype
    scale_bytes: int
    access: int
    which: list[int]
    tiles: torch.Tensor
    sources: "_Addresses"


class TritonQuantize:
    """Many tensors in one launch; see :func:`weightsync.kernels.fp8.prepare_quantize`."""

    def __init__(
        self,
        jobs: Sequence[QuantizeJob],
        block: tuple[int, int],
        forward_dtype: torch.dtype | None,
        scale_format: ScaleFormat,
        beside: Beside | None,
    ) -> None:
        """Arguments as checked by ``prepare_quantize``. Tables are uploaded here."""
        self._block, self._scale_format = block, scale_format
        self._looks = [Look.of(job.src) for job in jobs]
        self._outputs = [(job.out, job.scale_out) for job in jobs]  # must outlive the addresses in the tiles
        self._forward = forward_dtype
        self._device = self._looks[0].device if self._looks else torch.device("cpu")
        self._most = programs_beside(beside, self._device) if beside else 0
        self._native = not interpreting() and torch.cuda.get_device_capability(self._device) >= (8, 9)
        kinds: dict[tuple[torch.dtype, int, int], list[int]] = {}
        for index, job in enumerate(jobs):
            if job.src.numel():
                kinds.setdefault((job.src.dtype, job.scale_out.element_size(), _access(job)), []).append(index)
        self._launches = [self._launch(*kind, which, jobs) for kind, which in kinds.items()]

    def _launch(
        self, dtype: torch.dtype, scale_bytes: int, access: int, which: list[int], jobs: Sequence[QuantizeJob]
    ) -> _Launch:
        parts = [_tiles(jobs[index], self._block) for index in which]
        owners = np.repeat(np.arange(len(which)), [len(part[0]) for part in parts])
        offsets, tiles = (np.concatenate(side) for side in zip(*parts, strict=True))
        return _Launch(
            dtype,
            scale_bytes,
            access,
            which,
            torch.from_numpy(np.ascontiguousarray(tiles)).to(self._device),
            _Addresses(self._device, owners, offsets),
        )

    def __call__(self, sources: Sequence[torch.Tensor]) -> None:
        """Quantise on the current stream; sources as in :class:`weightsync.kernels.fp8.PreparedQuantize`."""
        chosen = checked_sources(self._looks, sources)
        for launch in self._launches:
            addresses = [chosen[index].data_ptr() for index in launch.which]
            access = launch.access
            if access == VECTORS and any(address % 16 for address in addresses):
                access = ROWS  # a source that stands in may be aligned worse than the one it was prepared with
            with on_device(self._device):
                count = len(launch.tiles)
                _quantize_kernel[(min(count, self._most or count),)](
                    launch.sources.at(addresses),
                    launch.tiles,
                    count,
                    ACCESS=access,
                    DTYPE=DTYPES[launch.dtype],
                    FORWARD=DTYPES[self._forward or launch.dtype],
                    SCALE_BYTES=launch.scale_bytes,
                    POW2=self._scale_format == "ue8m0",
                    HEIGHT=self._block[0],
                    WIDTH=self._block[1],
                    NATIVE=self._native,
                    PERSISTENT=self._most > 0,
                    **OPTIONS[launch.dtype.itemsize],
                )


class _Addresses:
    """Where each tile of a launch begins in its source; computed again only when the sources move."""

    def __init__(self, device: torch.device, jobs: Table, offsets: Table) -> None:
        """``jobs`` and ``offsets`` are int64[tiles]: each tile's job, and its byte offset in that job's source."""
        self._device = device
        self._jobs, self._offsets = torch.from_numpy(jobs).to(device), torch.from_numpy(offsets).to(device)
        self._bases: list[int] = []
        self._tiles = self._offsets

    def at(self, bases: list[int]) -> torch.Tensor:
        """Addresses of all tiles, int64[tiles] on the device, for sources at ``bases``."""
        if bases != self._bases:
            host = torch.tensor(bases, dtype=torch.int64)
            if self._device.type == "cuda":
                host = host.pin_memory()  # so that a round does not wait for the copy
            self._tiles = host.to(self._device, non_blocking=True)[self._jobs] + self._offsets
            self._bases = bases
        return self._tiles


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


def _tiles(job: QuantizeJob, block: tuple[int, int]) -> tuple[Table, Table]:
    """A job's tiles, those of a row side by side: byte offsets in the source, and int64[n, TILE_COLUMNS]."""
    src, out, scale = _three_dimensional(job)
    grid = (src.shape[0], -(-src.shape[1] // TILE), -(-src.shape[2] // TILE))
    group, down, across = (axis.reshape(-1) for axis in np.indices(grid, dtype=np.int64))
    row, column = down * TILE, across * TILE

    def place(tensor: torch.Tensor, height: int, width: int) -> Table:
        steps = tensor.stride()
        elements = group * steps[0] + row // height * steps[1] + column // width * steps[2]
        return np.asarray(elements * tensor.element_size(), np.int64)

    columns = [
        out.data_ptr() + place(out, 1, 1), scale.data_ptr() + place(scale, *block),
        np.minimum(src.shape[1] - row, TILE), np.minimum(src.shape[2] - column, TILE),
    ]  # fmt: skip
    fixed = [src.stride(1), out.stride(1), src.stride(2), out.stride(2), scale.stride(1), scale.stride(2)]
    return place(src, 1, 1), np.column_stack([*columns, *(np.full(len(row), value, np.int64) for value in fixed)])
