"""Small vectorised helpers that the planner's steps share."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.protocol.limits import MAX_RANK

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

DENSE_KEYS_PER_ITEM: Final = 4
"""A table over all possible keys is cheaper than sorting while it has at most this many entries per item."""


def starts(counts: npt.NDArray[Any]) -> Ints:
    """Exclusive prefix sum, with the total as the last of ``n + 1`` entries."""
    result = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=result[1:])
    return result


def expand(counts: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """For each of ``sum(counts)`` items: which entry it belongs to, and its ordinal within that entry."""
    # [2, 0, 3] gives owners [0, 0, 2, 2, 2] and ordinals [0, 1, 0, 1, 2].
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - starts(counts)[:-1][owner]


def stable_order(keys: npt.NDArray[Any], bound: int) -> Ints:
    """Stable argsort of non-negative ``keys`` below ``bound``, 16 bits at a time: NumPy sorts those by radix."""
    # From the lowest digit up: each stable pass keeps the order of the ones before among equal digits.
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    shift = 16
    while bound > 1 << shift:
        order = order[np.argsort((keys >> shift).astype(np.uint16)[order], kind="stable")]
        shift += 16
    return order


def boundaries(ordered: npt.NDArray[Any]) -> Ints:
    """Where a sorted array takes a new value: the first index of each run, and the length as the last entry."""
    if len(ordered) == 0:
        return np.zeros(1, np.int64)
    return np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1, [len(ordered)]))


def compress(keys: Ints, bound: int) -> tuple[Ints, Ints]:
    """The sorted distinct values of ``keys [n]``, all in ``[0, bound)``, and each key's index among them ``[n]``."""
    if bound > DENSE_KEYS_PER_ITEM * len(keys) + 65536:
        distinct, index = np.unique(keys, return_inverse=True)
        return distinct, index.reshape(-1)
    seen = np.zeros(bound, np.bool_)
    seen[keys] = True
    distinct = np.flatnonzero(seen)
    index = np.empty(bound, np.int64)
    index[distinct] = np.arange(len(distinct))
    return distinct, index[keys]


def distinct_rows(matrix: Ints) -> tuple[Ints, Ints]:
    """The distinct rows of ``matrix`` in order of first occurrence, and each row's index among them. Exact.

    Rows are grouped by a hash first, which is right unless two different rows collide; that is checked.
    """
    if len(matrix) == 0:
        return matrix, np.zeros(0, np.int64)
    weights = mix(np.arange(1, matrix.shape[1] + 1)) | np.uint64(1)
    hashes = matrix @ weights.astype(np.int64)
    _, first, index = np.unique(hashes, return_index=True, return_inverse=True)
    if not np.array_equal(matrix[first][index], matrix):
        _, first, index = np.unique(matrix, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    # np.unique sorts by value; numbers must not depend on the hash, so that they are given by first occurrence.
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return matrix[first[order]], rank[index.reshape(-1)]


def mix(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A fixed bijection of 64-bit words that looks random (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class Growing:
    """An int32 array that values are appended to."""

    def __init__(self) -> None:
        self._store = np.zeros(1024, np.int32)
        self._used = 0

    def extend(self, values: list[int]) -> None:
        """Append ``values``; views handed out earlier keep their length and values."""
        end = self._used + len(values)
        if end > len(self._store):
            grown = np.zeros(max(end, 2 * len(self._store)), np.int32)
            grown[: self._used] = self.view()
            self._store = grown
        self._store[self._used : end] = values
        self._used = end

    def view(self) -> Ids:
        """The values so far."""
        return self._store[: self._used]


def dense_strides(extents: Ints, itemsize: Ints) -> Ints:
    """Byte strides ``[n, MAX_RANK]`` of boxes packed row by row; arguments as for ``count_runs``."""
    strides = np.empty_like(extents)
    strides[:, -1] = itemsize
    for dim in range(MAX_RANK - 2, -1, -1):
        strides[:, dim] = strides[:, dim + 1] * extents[:, dim + 1]
    return strides


def count_runs(extents: Ints, itemsize: Ints, *strides: Ints) -> Ints:
    """Into how many runs, contiguous under each of ``strides``, boxes fall.

    Args:
        extents: elements per dimension ``[n, MAX_RANK]``, the innermost dimension last.
        itemsize: bytes per element ``[n]``.
        strides: one or more of bytes ``[n, MAX_RANK]``; a run must be contiguous in all of these memories.

    Returns:
        Runs per box ``[n]``; 0 for a box without elements.
    """
    length = itemsize.astype(np.int64)
    count = np.ones(len(extents), np.int64)
    whole = np.ones(len(extents), np.bool_)
    for dim in range(MAX_RANK - 1, -1, -1):
        extent = extents[:, dim]
        # The stride of a dimension of one element leads nowhere: whatever it says, it does not break a run.
        single = extent == 1
        joins = whole.copy()
        for stride in strides:
            joins &= stride[:, dim] == length
        length = np.where(joins & ~single, length * extent, length)
        count = np.where(joins | single, count, count * extent)
        # Once a dimension has a gap, no dimension further out can join: the inner ones are not one run any more.
        whole &= joins | single
    return count
