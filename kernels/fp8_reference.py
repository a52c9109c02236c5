"""FP8 block quantise in plain torch: the definition, bit for bit, on any device.

A block of ``x`` (already in the forward dtype, read as fp32) with ``amax = max |x|`` gets::

    scale = max(amax / 448, 1e-12)          fp32, IEEE division
    q     = e4m3(clamp(x / scale, ±448))    IEEE division, round to nearest even

``ue8m0`` rounds the scale up to a power of two before the division. The outcome for every kind of input:

* zeros: scale 1e-12 (2**-39 in ue8m0), bytes 0x00 (0x80 for -0.0);
* tiny (amax < 4.48e-10): scale 1e-12, values kept down to half the smallest e4m3 subnormal times the scale;
* huge: scale up to 7.6e35, no overflow anywhere;
* NaN or ±inf anywhere in a block: its scale is the quiet NaN 0x7FC00000 (0xFF as an e8m0 byte) and all its bytes are
  0x7F, the NaN of e4m3, so that such a block is recognised by its scale and never looks like weights.
"""

from collections.abc import Iterator
from typing import Final, Literal

import torch

ScaleFormat = Literal["fp32", "ue8m0"]

E4M3_MAX: Final = 448.0
"""The largest finite number of float8_e4m3fn (OCP 8-bit Floating Point Specification, 2023)."""
SCALE_FLOOR: Final = 1e-12
"""1e-4, as some converters have it, makes zeros of blocks with amax below 0.0448, which LoRA-B and fresh heads have."""
NAN_BYTE: Final = 0x7F
SLAB_ELEMENTS: Final = 1 << 22
"""Elements converted at a time: bounds the fp32 temporaries to a few times 16 MiB."""


def quantize_reference(
    src: torch.Tensor,
    out: torch.Tensor,
    scale_out: torch.Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    forward_dtype: torch.dtype | None = None,
    scale_format: ScaleFormat = "fp32",
) -> None:
    """Quantise ``src`` into ``out`` and ``scale_out``; arguments as :func:`weightsync.kernels.fp8.quantize_blocks`."""
    if src.dim() == 2:
        src, out, scale_out = src[None], out[None], scale_out[None]
    out = out.view(torch.uint8)
    for groups, rows, tiles in _slabs(src.shape, block):
        values = src[groups, rows]
        if forward_dtype is not None:
            values = values.to(forward_dtype)
        codes, scales = _blocks(values.float(), block, scale_format)
        out[groups, rows] = codes
        _store_scales(scale_out[groups, tiles], scales)


def _slabs(shape: torch.Size, block: tuple[int, int]) -> Iterator[tuple[slice, slice, slice]]:
    """Groups, rows and rows of blocks of each step of about ``SLAB_ELEMENTS`` (or one row of blocks)."""
    groups, rows, columns = shape
    together = max(1, SLAB_ELEMENTS // max(1, rows * columns))
    step = max(1, SLAB_ELEMENTS // max(1, columns * block[0]))
    for group in range(0, groups, together):
        for first in range(0, -(-rows // block[0]), step):
            rows_here = slice(first * block[0], (first + step) * block[0])
            yield slice(group, group + together), rows_here, slice(first, first + step)


def _blocks(
    values: torch.Tensor, block: tuple[int, int], scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8[g, r, c] and scales fp32 of one fp32[g, r, c]."""
    groups, rows, columns = values.shape
    height, width = block
    # Zeros at the edges change no maximum of magnitudes.
    padded = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
    grid = padded.view(groups, padded.shape[1] // height, height, padded.shape[2] // width, width)
    amax = grid.abs().amax(dim=(2, 4))
    # A divisor on the tensor's own device: torch turns the division by a Python number into a product on CUDA.
    limit = values.new_full((), E4M3_MAX)
    scale = torch.maximum(amax / limit, torch.full_like(limit, SCALE_FLOOR))
    if scale_format == "ue8m0":
        scale = round_up_to_power_of_two(scale)
    scale = torch.where(amax.isfinite(), scale, torch.full_like(limit, float("nan")))
    quotient = (grid / scale[:, :, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    codes = quotient.to(torch.float8_e4m3fn).view(torch.uint8)
    codes.masked_fill_(quotient.isnan(), NAN_BYTE)  # one code for every NaN, whatever its sign
    return codes.view(padded.shape)[:, :rows, :columns], scale


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is at least ``scale`` (normal fp32 above 0; anything for what is not finite)."""
    return ((scale.view(torch.int32) + 0x7FFFFF) >> 23 << 23).view(torch.float32)


def _store_scales(target: torch.Tensor, scale: torch.Tensor) -> None:
    """Write fp32 scales as they are, or as e8m0 bytes (the biased exponent; 0xFF is NaN)."""
    if target.dtype == torch.float32:
        target.copy_(scale)
    else:
        target.view(torch.uint8).copy_(((scale.view(torch.int32) >> 23) & 0xFF).to(torch.uint8))
