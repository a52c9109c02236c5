"""Strided views of a dense tensor as boxes of it: pure integer arithmetic, no torch.

A weight loader narrows, transposes and reshapes before it copies. What arrives is a pair of strided views over the
same index space, one in the source's memory, one in the destination's; a layout row wants a box of the source and the
destination's stride per dimension of the source. Offsets and strides are in elements throughout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

Ints = tuple[int, ...]

MAX_PIECES: Final = 65_536
"""Boxes that one copy may fall apart into. Interleaved heads need one per head; more means a shuffle of elements,
which no plan could carry, and enumerating it would take the engine's start for hours."""


class TooManyPieces(ValueError):
    """A copy shuffles its source too finely to be written as boxes."""


@dataclass(frozen=True, slots=True)
class StridedView:
    """Sizes of an index space, and where its elements lie: ``offset + sum(i[d] * strides[d])``."""

    sizes: Ints
    strides: Ints
    offset: int = 0


@dataclass(frozen=True, slots=True)
class BoxPiece:
    """A box of the near tensor, and in the far memory the place of its corner and the stride per near dimension."""

    corner: Ints
    extent: Ints
    offset: int
    strides: Ints

    def as_far_view(self) -> StridedView:
        """The box's elements in the far memory."""
        return StridedView(self.extent, self.strides, self.offset)


@dataclass(frozen=True, slots=True)
class _Walk:
    """One loop of the shared index space: how often, and how far both memories move each time."""

    count: int
    near: int
    far: int


def dense_strides(shape: Sequence[int]) -> Ints:
    """Row-major strides of a contiguous tensor of ``shape``."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def decompose(base: StridedView, near: StridedView, far: StridedView) -> list[BoxPiece]:
    """Boxes of the dense tensor ``base`` that ``near``, a view over its memory, covers, with their places in ``far``.

    ``near`` and ``far`` have the same sizes; ``base`` must be dense (any order of dimensions) with offset 0.

    Raises:
        TooManyPieces: more than MAX_PIECES boxes.
    """
    if 0 in near.sizes:
        return []
    walks = [_Walk(n, s, d) for n, s, d in zip(near.sizes, near.strides, far.strides, strict=True) if n != 1]
    pieces: list[BoxPiece] = []
    for piece in _solve(base, _joined(walks), near.offset, far.offset):
        if len(pieces) == MAX_PIECES:
            raise TooManyPieces(f"a view of sizes {near.sizes} over {base.sizes} is more than {MAX_PIECES} boxes")
        pieces.append(piece)
    return pieces


def _joined(walks: list[_Walk]) -> list[_Walk]:
    """Outermost first (by the near stride), loops that continue one another in both memories made one."""
    joined: list[_Walk] = []
    for walk in sorted(walks, key=lambda w: -w.near):
        if joined and joined[-1].near == walk.count * walk.near and joined[-1].far == walk.count * walk.far:
            outer = joined.pop()
            joined.append(_Walk(outer.count * walk.count, walk.near, walk.far))
        else:
            joined.append(walk)
    return joined


def _solve(base: StridedView, walks: list[_Walk], near: int, far: int) -> Iterator[BoxPiece]:
    """Split loops until each walks along one dimension of ``base`` of its own, element by element."""
    corner = _unravel(base, near)
    extent, strides = [1] * len(base.sizes), [0] * len(base.sizes)
    for index, walk in enumerate(walks):
        others = walks[:index] + walks[index + 1 :]
        dim = _dimension_of(base, walk.near)
        if dim is None or extent[dim] != 1:
            # Several steps inside one dimension (interleaving), or none at all (a broadcast): one box per step.
            for step in range(walk.count):
                yield from _solve(base, others, near + step * walk.near, far + step * walk.far)
            return
        room = base.sizes[dim] - corner[dim]
        if walk.count > room:
            yield from _split(base, walk, others, near, far, corner[dim], base.sizes[dim])
            return
        extent[dim], strides[dim] = walk.count, walk.far
    yield BoxPiece(corner, tuple(extent), far, tuple(strides))


def _split(
    base: StridedView, walk: _Walk, others: list[_Walk], near: int, far: int, start: int, size: int
) -> Iterator[BoxPiece]:
    """A loop that runs over the end of its dimension: the rest of the first row, whole rows, a part of the last."""

    def from_step(step: int, loops: list[_Walk]) -> Iterator[BoxPiece]:
        yield from _solve(base, sorted(loops, key=lambda w: -w.near), near + step * walk.near, far + step * walk.far)

    head = size - start if start else 0
    rows, tail = divmod(walk.count - head, size)
    if head:
        yield from from_step(0, [*others, *_loop(head, walk.near, walk.far)])
    if rows:
        whole = _loop(rows, walk.near * size, walk.far * size)
        yield from from_step(head, [*others, *whole, *_loop(size, walk.near, walk.far)])
    if tail:
        yield from from_step(head + rows * size, [*others, *_loop(tail, walk.near, walk.far)])


def _loop(count: int, near: int, far: int) -> list[_Walk]:
    return [_Walk(count, near, far)] if count > 1 else []


def _dimension_of(base: StridedView, step: int) -> int | None:
    """The dimension of ``base`` whose neighbours are ``step`` elements apart."""
    for dim, (extent, stride) in enumerate(zip(base.sizes, base.strides, strict=True)):
        if extent > 1 and stride == step:
            return dim
    return None


def _unravel(base: StridedView, offset: int) -> Ints:
    index = [0] * len(base.sizes)
    for dim in sorted(range(len(base.sizes)), key=lambda d: -base.strides[d]):
        if base.sizes[dim] > 1:
            index[dim], offset = divmod(offset, base.strides[dim])
    return tuple(index)


def intersection(corner: Ints, extent: Ints, other_corner: Ints, other_extent: Ints) -> tuple[Ints, Ints] | None:
    """Corner and extent of what two boxes share, None if nothing."""
    low = tuple(max(a, b) for a, b in zip(corner, other_corner, strict=True))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(corner, extent, other_corner, other_extent, strict=True))
    sizes = tuple(h - lo for lo, h in zip(low, high, strict=True))
    return None if any(size <= 0 for size in sizes) else (low, sizes)


def outside(corner: Ints, extent: Ints, hole_corner: Ints, hole_extent: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Disjoint boxes (corner, extent) that make up a box without what a second one, which meets it, shares with it."""
    low, size = list(corner), list(extent)
    for dim, (start, count) in enumerate(zip(hole_corner, hole_extent, strict=True)):
        for first, last in ((low[dim], start), (start + count, low[dim] + size[dim])):
            if last > first:
                yield (*low[:dim], first, *low[dim + 1 :]), (*size[:dim], last - first, *size[dim + 1 :])
        # What is left lies beside the hole in later dimensions only.
        first, last = max(low[dim], start), min(low[dim] + size[dim], start + count)
        low[dim], size[dim] = first, last - first


def is_dense(view: StridedView) -> bool:
    """Whether the elements of ``view`` lie without gaps and overlaps, in any order of dimensions."""
    step = 1
    for size, stride in sorted(zip(view.sizes, view.strides, strict=True), key=lambda d: d[1]):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True
