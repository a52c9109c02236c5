"""Where the bytes of a parameter are after post-load processing, if they are all still there.

Most parameters come through processing as they were, some as another parameter over the same bytes or a copy of them,
some as a transposed view, and fused expert weights with their halves exchanged (FlashInfer's CUTLASS kernels want
``[up; gate]`` where the loader leaves ``[gate; up]``). All of these are written directly; each is proved by digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from weightsync.agents.recorder.blueprint import Slot
from weightsync.agents.recorder.proof import order_sensitive_digest
from weightsync.agents.recorder.trace import Landing


@dataclass(frozen=True, slots=True)
class Loaded:
    """A parameter as the loader left it: its place, its strides in elements and the digest of its elements."""

    slot: Slot
    stride: tuple[int, ...]
    digest: int


@dataclass(frozen=True, slots=True)
class Found:
    """The live tensor (same geometry as loaded) and whether its halves along dimension 1 are exchanged."""

    tensor: torch.Tensor
    halves_exchanged: bool = False


def find(loaded: Loaded, live: torch.Tensor) -> Found | None:
    """How ``live`` holds the loaded bytes; None if it does not, or not in a way known here."""
    views = (live, live.transpose(-1, -2)) if live.dim() > 1 else (live,)
    for view in views:
        same_geometry = tuple(view.shape) == loaded.slot.shape and tuple(view.stride()) == loaded.stride
        if not same_geometry or view.dtype != loaded.slot.dtype:
            continue
        if order_sensitive_digest(view) == loaded.digest:
            return Found(view)
        if _may_exchange_halves(loaded.slot) and order_sensitive_digest(_exchanged(view)) == loaded.digest:
            return Found(view, halves_exchanged=True)
    return None


def _may_exchange_halves(slot: Slot) -> bool:
    return slot.attribute.startswith("w13_") and len(slot.shape) == 3 and slot.shape[1] % 2 == 0


def _exchanged(view: torch.Tensor) -> torch.Tensor:
    bits = view.view(torch.uint8) if view.element_size() == 1 else view
    return bits.roll(bits.shape[1] // 2, dims=1)


def with_halves_exchanged(landings: Sequence[Landing], loaded: Loaded) -> tuple[Landing, ...] | None:
    """``landings`` moved to the other half of each expert; None if one lies in both."""
    size = loaded.slot.dtype.itemsize
    expert, half = loaded.stride[0] * size, loaded.stride[1] * size * (loaded.slot.shape[1] // 2)
    moved = []
    for landing in landings:
        place = landing.place
        first = (place.offset - loaded.slot.place.offset) % expert
        last = first + sum((n - 1) * s for n, s in zip(place.sizes, place.strides, strict=True))
        if first // half != last // half:
            return None
        shift = half if first < half else -half
        moved.append(replace(landing, place=replace(place, offset=place.offset + shift)))
    return tuple(moved)
