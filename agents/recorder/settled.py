"""From a loader's assignments, in their order, to the bytes that remain: each once, and what no assignment reached.

Bytes of a model that no checkpoint tensor fills are padding or constants, or else the layout is wrong and refused.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.trace import Landing, OpaqueBytes, RecordError, Write

Runs = npt.NDArray[np.int64]
"""``[n, 2]``: first byte and byte after the last of each contiguous run, sorted."""

MAX_RUNS: Final = 50_000_000
"""Runs of one storage. The largest fused expert weights have a few thousand; this many would take gigabytes."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a storage holds after loading: landings (disjoint), opaque bytes, and the runs that any of them covers.

    ``written`` are the runs of all assignments: what they cover beyond ``reached`` are constants of the loader's.
    """

    landings: tuple[Landing, ...]
    opaque: tuple[OpaqueBytes, ...]
    reached: Runs
    written: Runs


def runs_of(place: StridedView, itemsize: int) -> Runs:
    """Contiguous byte runs of a strided place (strides and offset in bytes), adjacent ones merged.

    Raises:
        RecordError: more than MAX_RUNS runs.
    """
    if 0 in place.sizes:
        return np.empty((0, 2), dtype=np.int64)
    length = itemsize
    loops: list[tuple[int, int]] = []
    for size, stride in sorted(zip(place.sizes, place.strides, strict=True), key=lambda d: d[1]):
        if size == 1:
            continue
        if stride == length and not loops:
            length *= size
        elif stride:  # a stride of 0 writes the same bytes again
            loops.append((size, stride))
    if int(np.prod([size for size, _ in loops], dtype=np.int64)) > MAX_RUNS:
        raise RecordError(f"a parameter is written in more than {MAX_RUNS} separate runs")
    starts = np.array([place.offset], dtype=np.int64)
    for size, stride in loops:
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    starts.sort()
    return np.stack([starts, starts + length], axis=1)


def union(parts: Iterable[Runs]) -> Runs:
    """Sorted union of runs, overlapping and adjacent ones merged."""
    stacked: Runs = np.concatenate([np.empty((0, 2), dtype=np.int64), *parts])
    if not len(stacked):
        return stacked
    stacked = stacked[np.argsort(stacked[:, 0], kind="stable")]
    # A run begins a new one only if it starts behind everything before it, not just behind its neighbour.
    ends = np.maximum.accumulate(stacked[:, 1])
    first = np.concatenate([[True], stacked[1:, 0] > ends[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([stacked[first, 0], ends[last]], axis=1)


def length(runs: Runs) -> int:
    """Bytes in disjoint runs."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def missing(reached: Runs, wanted: Runs) -> int:
    """Bytes of ``wanted`` that ``reached`` does not cover (both sorted and disjoint)."""
    return length(union([reached, wanted])) - length(reached)


def settle(writes: Sequence[Write]) -> dict[int, Settled]:
    """The final state of each storage that was written, by its index.

    Raises:
        RecordError: a write covers an earlier one only in part, so that no box of either is whole.
    """
    by_storage: dict[int, list[Write]] = defaultdict(list)
    for write in writes:
        by_storage[write.storage].append(write)
    return {storage: _settle_one(_last_of_each_place(group)) for storage, group in by_storage.items()}


def _last_of_each_place(writes: Sequence[Write]) -> list[Write]:
    last: dict[StridedView, Write] = {}
    for write in writes:
        last.pop(write.place, None)  # so that it moves to the end: the order of the last writes counts
        last[write.place] = write
    return list(last.values())


def _settle_one(writes: list[Write]) -> Settled:
    places = [runs_of(write.place, write.itemsize) for write in writes]
    written = union(places)
    # Only where writes overlap does their order matter; looking at each pair costs too much for thousands of experts.
    if length(written) != sum(length(runs) for runs in places):
        writes = _uncovered(writes, places)
    landings = [mark for write in writes for mark in write.marks if isinstance(mark, Landing)]
    opaque = [mark for write in writes for mark in write.marks if isinstance(mark, OpaqueBytes)]
    pieces = [runs_of(mark.place, mark.dtype.itemsize) for mark in landings]
    pieces += [runs_of(mark.place, mark.itemsize) for mark in opaque]
    reached = union(pieces)
    if length(reached) != sum(length(runs) for runs in pieces):
        names = sorted({mark.source.name for mark in landings})
        raise RecordError(f"bytes are loaded twice, from among {', '.join(names[:8])}")
    return Settled(tuple(landings), tuple(opaque), reached, written)


def _uncovered(writes: list[Write], places: list[Runs]) -> list[Write]:
    """The writes with marks that are still there after all later ones; constants leave nothing to record."""
    kept: list[Write] = []
    later: Runs = np.empty((0, 2), dtype=np.int64)
    for write, runs in zip(reversed(writes), reversed(places), strict=True):
        left = missing(later, runs)
        if write.marks and left == length(runs):
            kept.append(write)
        elif write.marks and left:
            raise RecordError(f"a later write covers a part of {_source(write)} only")
        later = union([later, runs])
    return kept[::-1]


def _source(write: Write) -> str:
    mark = write.marks[0]
    return mark.source.name if isinstance(mark, Landing) else mark.reason


# ------------------------------------------------------------------------------------------- what nothing reached
@dataclass(frozen=True, slots=True)
class Unrecorded:
    """``bytes`` of a parameter or buffer that stay as they were when the engine started, and why that is right."""

    name: str
    bytes: int
    reason: str


def judge_unreached(
    parameters: Sequence[ParameterPlace],
    settled: Mapping[int, Settled],
    reason_to_stay: Callable[[ParameterPlace, bool], str],
) -> list[Unrecorded]:
    """What stays as it was, each with the reason.

    ``reason_to_stay`` is asked with the parameter and whether none of its bytes is reached; empty means a fault.

    Raises:
        RecordError: names every parameter with bytes that a checkpoint ought to fill and does not.
    """
    kept: list[Unrecorded] = []
    faults: list[str] = []
    seen: set[tuple[int, int]] = set()
    for parameter in parameters:
        if not parameter.nbytes or (parameter.storage, parameter.place.offset) in seen:
            continue  # tied weights are judged once
        seen.add((parameter.storage, parameter.place.offset))
        wanted = union([runs_of(parameter.place, parameter.dtype.itemsize)])
        state = settled.get(parameter.storage)
        left = missing(state.reached, wanted) if state else length(wanted)
        if not left:
            continue
        whole = left == length(wanted)
        constant = state is not None and not missing(state.written, wanted)
        reason = "" if whole and constant else reason_to_stay(parameter, whole)
        if not reason and constant:
            reason = "a constant that the loader writes"
        if reason:
            kept.append(Unrecorded(parameter.name, left, reason))
        else:
            faults.append(f"{parameter.name} ({left} of {length(wanted)} bytes)")
    if faults:
        raise RecordError(f"no tensor of the checkpoint reaches {', '.join(sorted(faults))}")
    return kept


def opaque_names(settled: Mapping[int, Settled], names: Mapping[int, str]) -> list[str]:
    """Parameters with bytes that are not the checkpoint's own, and why, each once, sorted; ``names`` are by storage."""
    return sorted({f"{names[index]}: {opaque.reason}" for index, state in settled.items() for opaque in state.opaque})
