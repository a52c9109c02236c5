"""One large allocation that slots are cut from: first reserved, then bound to memory, so that nothing moves later."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.orchestrator.protocol.layout import Region

ALIGNMENT: Final = 256
"""Bytes. What cudaMalloc gives and what the widest vector loads and DMA descriptors want."""

Allocate = Callable[[int], torch.Tensor]
"""Bytes → a one-dimensional contiguous uint8 tensor of that size, aligned to ALIGNMENT, that may be registered."""


def host_allocate(size: int) -> torch.Tensor:
    """``size`` bytes of ordinary host memory, aligned to ALIGNMENT."""
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    return memory.narrow(0, -memory.data_ptr() % ALIGNMENT, size)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A dense row-major array at ``offset`` bytes of the arena."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stride(self) -> tuple[int, ...]:
        """Row-major strides in bytes."""
        strides, step = [], self.dtype.itemsize
        for extent in reversed(self.shape):
            strides.append(step)
            step *= extent
        return tuple(reversed(strides))

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        """The array in ``arena``'s memory."""
        return arena.narrow(0, self.offset, self.nbytes).view(self.dtype).view(self.shape)


class ArenaPlan:
    """Hands out aligned places, one behind the other. ``size`` is what has been handed out so far, in bytes."""

    def __init__(self) -> None:
        self.size = 0

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation:
        """The next place for an array of ``shape`` and ``dtype``."""
        place = Reservation(self.size, shape, dtype)
        self.size += -(-place.nbytes // ALIGNMENT) * ALIGNMENT
        return place


def region_of(memory: torch.Tensor) -> Region:
    """``memory`` (uint8, contiguous) as the protocol names it."""
    if memory.is_cuda:
        return Region(memory.data_ptr(), memory.numel(), "VRAM", memory.device.index or 0)
    return Region(memory.data_ptr(), memory.numel())
