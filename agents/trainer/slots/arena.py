"""One large allocation that slots are cut from: first reserved, then bound to memory, so that nothing moves later."""

import math
from dataclasses import dataclass

import torch
from weightsync.agents.memory.arena import ALIGNMENT


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
