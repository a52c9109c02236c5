"""One axis-aligned range of a tensor: what slots hold, saved parts contain and checks compare."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


def with_entry(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    """``values`` with another entry at ``dim``."""
    return (*values[:dim], value, *values[dim + 1 :])


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned range of a tensor: offset and extent per dimension, in elements."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Elements."""
        return math.prod(self.extent)

    @property
    def end(self) -> tuple[int, ...]:
        """First index behind the box, per dimension."""
        return tuple(o + e for o, e in zip(self.offset, self.extent, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of the tensor that it is a range of."""
        return tuple(slice(o, e) for o, e in zip(self.offset, self.end, strict=True))

    @staticmethod
    def whole(shape: Sequence[int]) -> "Box":
        """All of a tensor of ``shape``."""
        return Box((0,) * len(shape), tuple(shape))

    def shifted(self, dim: int, by: int) -> "Box":
        """The same box ``by`` elements further along ``dim``."""
        return replace(self, offset=with_entry(self.offset, dim, self.offset[dim] + by))

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share an element."""
        return all(
            max(a, b) < min(a + x, b + y)
            for a, x, b, y in zip(self.offset, self.extent, other.offset, other.extent, strict=True)
        )
