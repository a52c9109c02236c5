"""Where the bytes of a parameter are after post-load processing, if they are all still there.

Most parameters come through processing as they were, some as another parameter over the same bytes or a copy of them,
some as a transposed view, and fused expert weights with their halves exchanged (kernels that want ``[up; gate]`` where
the loader leaves ``[gate; up]``). All of these are written directly; each is proved by an order-sensitive digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.trace import Landing


@dataclass(frozen=True, slots=True)
class LoadedParameter:
    """A parameter as the loader left it: its place, its strides in elements and the digest of its elements."""

    parameter: ParameterPlace
    stride: tuple[int, ...]
    digest: int


@dataclass(frozen=True, slots=True)
class LocatedParameter:
    """The live tensor (same geometry as loaded) and whether its halves along dimension 1 are exchanged."""

    tensor: torch.Tensor
    halves_exchanged: bool = False


def locate(loaded: LoadedParameter, live: torch.Tensor, *, may_exchange_halves: bool) -> LocatedParameter | None:
    """How ``live`` holds the loaded bytes; None if it does not, or not in a way known here.

    ``may_exchange_halves``: whether the engine may have exchanged the two halves along dimension 1.
    """
    views = (live, live.transpose(-1, -2)) if live.dim() > 1 else (live,)
    for view in views:
        # Same strides too: rows are written by the strides that were recorded, whatever the values are.
        same_geometry = tuple(view.shape) == loaded.parameter.shape and tuple(view.stride()) == loaded.stride
        if not same_geometry or view.dtype != loaded.parameter.dtype:
            continue
        if order_sensitive_digest(view) == loaded.digest:
            return LocatedParameter(view)
        if may_exchange_halves and _has_halves(view) and order_sensitive_digest(_exchanged(view)) == loaded.digest:
            return LocatedParameter(view, halves_exchanged=True)
    return None


def _has_halves(view: torch.Tensor) -> bool:
    return view.dim() == 3 and view.shape[1] % 2 == 0


def _exchanged(view: torch.Tensor) -> torch.Tensor:
    # As bytes, which every torch can roll, also where it cannot roll float8.
    bits = view.view(torch.uint8) if view.element_size() == 1 else view
    return bits.roll(bits.shape[1] // 2, dims=1)


def with_halves_exchanged(landings: Sequence[Landing], loaded: LoadedParameter) -> tuple[Landing, ...] | None:
    """``landings`` moved to the other half of each expert; None if one lies in both."""
    size = loaded.parameter.dtype.itemsize
    expert, half = loaded.stride[0] * size, loaded.stride[1] * size * (loaded.parameter.shape[1] // 2)
    moved = []
    for landing in landings:
        place = landing.place
        first = (place.offset - loaded.parameter.place.offset) % expert
        last = first + sum((n - 1) * s for n, s in zip(place.sizes, place.strides, strict=True))
        if first // half != last // half:
            return None  # the box would have to be cut in two where the halves meet
        shift = half if first < half else -half
        moved.append(replace(landing, place=replace(place, offset=place.offset + shift)))
    return tuple(moved)


# --------------------------------------------------------------------------------------------------------- digest
CHUNK_ELEMENTS: Final = 1 << 22
"""Elements digested at once: bounds the temporary memory to 64 MiB whatever the parameter's size."""

_GOLDEN: Final = -7046029254386353131
"""2**64 divided by the golden ratio, as a signed number: an odd multiplier that spreads consecutive positions."""
_ODD: Final = -4417276706812531889
"""0xC2B2AE3D27D4EB4F as a signed number (the second prime of xxHash64)."""

_INTEGER_OF_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def order_sensitive_digest(tensor: torch.Tensor) -> int:
    """A 64-bit digest of the elements' bytes in logical (row-major) order, whatever the strides.

    Each element's bits are mixed with its position before they are added up, so that moving elements changes the sum.
    It compares a tensor with itself within one process; what travels is digested by ``weightsync.kernels.digest``.

    Raises:
        TypeError: a complex dtype, or elements of another size than 1, 2, 4 or 8 bytes.
    """
    bits = tensor.detach()
    if bits.is_complex() or bits.element_size() not in _INTEGER_OF_SIZE:
        raise TypeError(f"no digest for {tensor.dtype}")
    bits = bits.view(_INTEGER_OF_SIZE[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    position = 0
    for part in _parts(bits):
        flat = part.reshape(-1).to(torch.int64)  # sign extension is harmless: it is the same on both sides
        index = torch.arange(position, position + flat.numel(), dtype=torch.int64, device=tensor.device)
        # Plus one, so that zeros count as well. int64 products wrap: arithmetic modulo 2**64 is meant.
        mixed = (flat + 1) * _ODD ^ (index + 1) * _GOLDEN
        mixed = (mixed ^ (mixed >> 29)) * _GOLDEN
        total += (mixed ^ (mixed >> 32)).sum()
        position += flat.numel()
    return int(total.item())


def _parts(bits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Consecutive pieces in logical order, each of at most CHUNK_ELEMENTS where the leading dimension allows it."""
    if bits.numel() <= CHUNK_ELEMENTS or bits.dim() == 0:
        return (bits,)
    if bits.is_contiguous():
        return torch.split(bits.view(-1), CHUNK_ELEMENTS)
    rows = max(1, CHUNK_ELEMENTS // max(1, bits[0].numel()))
    return torch.split(bits, rows)
