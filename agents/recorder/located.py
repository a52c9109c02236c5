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
from weightsync.agents.recorder.contents import storage_key, view_of
from weightsync.agents.recorder.trace import Landing


@dataclass(frozen=True, slots=True)
class LoadedParameter:
    """A parameter as the loader left it: its place, its memory, its strides in elements and its elements' digest."""

    parameter: ParameterPlace
    key: int
    offset: int
    stride: tuple[int, ...]
    digest: int

    @classmethod
    def of(cls, parameter: ParameterPlace, tensor: torch.Tensor) -> LoadedParameter:
        """``tensor`` is what ``parameter`` holds now."""
        view = view_of(tensor)
        return cls(parameter, storage_key(tensor), view.offset, view.strides, order_sensitive_digest(tensor))


@dataclass(frozen=True, slots=True)
class LocatedParameter:
    """The live tensor (same geometry as loaded) and whether its halves along dimension 1 are exchanged.

    ``untouched``: it is the very memory that was loaded, to which nothing was written since.
    """

    tensor: torch.Tensor
    halves_exchanged: bool = False
    untouched: bool = False


def locate(
    loaded: LoadedParameter, live: torch.Tensor, *, may_exchange_halves: bool, touched: bool
) -> LocatedParameter | None:
    """How ``live`` holds the loaded bytes; None if it does not, or not in a way known here.

    ``may_exchange_halves``: whether the engine may have exchanged the two halves along dimension 1. ``touched``:
    whether something may have been written to the memory of ``live`` since it was loaded.
    """
    views = (live, live.transpose(-1, -2)) if live.dim() > 1 else (live,)
    for view in views:
        # Same strides too: rows are written by the strides that were recorded, whatever the values are.
        same_geometry = tuple(view.shape) == loaded.parameter.shape and tuple(view.stride()) == loaded.stride
        if not same_geometry or view.dtype != loaded.parameter.dtype:
            continue
        if not touched and storage_key(view) == loaded.key and view.storage_offset() == loaded.offset:
            return LocatedParameter(view, untouched=True)
        if order_sensitive_digest(view) == loaded.digest:
            return LocatedParameter(view)
        if may_exchange_halves and _has_halves(view) and order_sensitive_digest(_exchanged(view)) == loaded.digest:
            return LocatedParameter(view, halves_exchanged=True)
    return None


def repeated(tensor: torch.Tensor) -> str:
    """Why the elements of ``tensor`` do not tell their places by their values; empty if they do.

    An order-sensitive digest proves nothing about a permutation of what is equal. Slices along each dimension are
    compared: where more than half of them are the same, their exchange would not be seen.
    """
    bits = tensor.detach().reshape(tensor.shape or (1,)).view(_INTEGER_OF_SIZE[tensor.element_size()])
    for dim, extent in enumerate(bits.shape):
        if extent == 1:
            continue
        _, counts = torch.unique(_slice_hashes(bits, dim), return_counts=True)
        most = int(counts.max())
        if 2 * most > extent:
            return f"{most} of {extent} slices along dimension {dim} are equal"
    return ""


def _slice_hashes(bits: torch.Tensor, dim: int) -> torch.Tensor:
    """int64 ``[bits.shape[dim]]``: a hash of each slice along ``dim``."""
    slices = bits.movedim(dim, 0)
    rows = max(1, CHUNK_ELEMENTS // max(1, slices[0].numel()))
    hashes = []
    for part in torch.split(slices, rows):
        flat = part.reshape(part.shape[0], -1).to(torch.int64) + 1
        index = torch.arange(1, flat.shape[1] + 1, dtype=torch.int64, device=bits.device)
        hashes.append((flat * _ODD ^ index * _GOLDEN).mul_(_GOLDEN).sum(dim=1))
    return torch.cat(hashes)


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
"""Elements digested at once on a device: bounds the temporary memory to 64 MiB whatever the parameter's size."""
CACHED_ELEMENTS: Final = 1 << 18
"""The same on the CPU, whose caches hold what belongs to so many: twice as fast as CHUNK_ELEMENTS, measured."""

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
    words = bits.dim() > 0 and (bits.shape[-1] * bits.element_size()) % 8 == 0
    for part in _parts(bits):
        if words:
            part = _as_words(part)  # noqa: PLW2901  eight bytes are mixed as fast as one
        flat = part.reshape(-1).to(torch.int64)  # sign extension is harmless: it is the same on both sides
        index = torch.arange(position, position + flat.numel(), dtype=torch.int64, device=tensor.device)
        # Plus one, so that zeros count as well. int64 products wrap: arithmetic modulo 2**64 is meant.
        mixed = (flat + 1) * _ODD ^ (index + 1) * _GOLDEN
        mixed = (mixed ^ (mixed >> 29)) * _GOLDEN
        total += (mixed ^ (mixed >> 32)).sum()
        position += flat.numel()
    return int(total.item())


def _as_words(bits: torch.Tensor) -> torch.Tensor:
    flat = bits.contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words must begin at a multiple of their size
    return flat.view(torch.int64)


def _parts(bits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Consecutive pieces in logical order, small enough where the leading dimension allows it."""
    limit = CACHED_ELEMENTS if bits.device.type == "cpu" else CHUNK_ELEMENTS
    if bits.numel() <= limit or bits.dim() == 0:
        return (bits,)
    if bits.is_contiguous():
        return torch.split(bits.view(-1), limit)  # a multiple of eight, so that whole words stay whole
    rows = max(1, limit // max(1, bits[0].numel()))
    return torch.split(bits, rows)
