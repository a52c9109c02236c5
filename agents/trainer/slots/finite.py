"""Values that are no numbers, found in the slots after the conversion: what overflowed in the cast is among them.

The digests of what is sent read every byte and say whether all is finite (:mod:`weightsync.agents.transport.shares`).
Looked at here is what they have not read; and everything, if they have found something, to name and count it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Final

import numpy as np
import torch
from weightsync.agents.memory.arena import ALIGNMENT
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.slots.arena import Reservation
from weightsync.agents.trainer.slots.slot import Slot, dtype_name
from weightsync.kernels.columns import CODES, KINDS, Element

LARGE_BYTES: Final = 1 << 20
"""From here on a launch of its own costs less than its reading; smaller ones share a launch where the device can."""

RUN_BYTES: Final = 1 << 31
"""Of one reduction, unless one tensor is larger; far above, kernels need wider indices."""


@dataclass(frozen=True, slots=True)
class NonFinite:
    """How many of a tensor's ``total`` values, or blocks where it is quantised, are NaN or infinite on this rank."""

    tensor: str
    count: int
    total: int
    blocks: bool

    def __str__(self) -> str:
        return f"{self.tensor} ({self.count} of {self.total} {'blocks' if self.blocks else 'values'})"


@dataclass(frozen=True, slots=True)
class Watched:
    """What shows a tensor's state: its values, or the scales of its blocks, which are NaN where a value was none."""

    tensor: str
    blocks: bool
    place: Reservation


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Neighbours of one dtype, and their memory in it; ``element``: of numbers of one byte, which are seen as bytes."""

    watched: Sequence[Watched]
    view: torch.Tensor
    element: Element | None


class FiniteCheck:
    """A look at the slots' memory, in as few reductions as there are runs of one dtype.

    Args:
        slots: bound to ``arena``.
        arena: uint8. The padding between neighbours of a run is set to zero here, once, and read with them.
        region: its number in the layout.
    """

    def __init__(self, slots: Sequence[Slot], arena: torch.Tensor, region: int = 0) -> None:
        self._arena, self._region = arena, region
        self._watched = sorted(_watched(slots), key=lambda each: each.place.offset)
        runs = list(self._runs(self._watched))
        for run in runs:
            for before, after in pairwise(run.watched):
                arena[before.place.offset + before.place.nbytes : after.place.offset].zero_()
        self._left = (NOWHERE, runs)

    @torch.no_grad()
    def find(self, finite: Spans = NOWHERE) -> tuple[NonFinite, ...]:
        """All tensors with values that are no finite numbers, in the arena's order.

        Args:
            finite: memory that is known to hold none, and is not read. Where it is all, no device is waited for.
        """
        if finite is not self._left[0]:  # the same object for as long as the plan is
            self._left = (finite, list(self._runs(self._outside(finite))))
        runs = self._left[1]
        suspects = [run for run, fine in zip(runs, _fine(runs), strict=True) if not fine]
        counted = (self._count(watched) for run in suspects for watched in run.watched)
        return tuple(found for found in counted if found.count)

    def _outside(self, finite: Spans) -> Iterator[Watched]:
        """What is not all in ``finite``."""
        offsets = np.array([each.place.offset for each in self._watched], np.int64)
        sizes = np.array([each.place.nbytes for each in self._watched], np.int64)
        known = finite.hold(self._region, offsets, sizes)
        return (each for each, inside in zip(self._watched, known, strict=True) if not inside)

    def _runs(self, watched: Iterable[Watched]) -> Iterator[_Run]:
        for run in _neighbours(watched):
            yield _Run(run, self._memory(run), _byte_sized(run[0].place.dtype))

    def _memory(self, run: Sequence[Watched]) -> torch.Tensor:
        start, last = run[0].place.offset, run[-1].place
        memory = self._arena.narrow(0, start, last.offset + last.nbytes - start)
        return memory if last.dtype.itemsize == 1 else memory.view(last.dtype)

    def _count(self, watched: Watched) -> NonFinite:
        values, element = self._memory([watched]), _byte_sized(watched.place.dtype)
        wrong = ~values.isfinite() if element is None else values & element.exponent == element.exponent
        return NonFinite(watched.tensor, int(wrong.sum()), values.numel(), watched.blocks)


def _fine(runs: Sequence[_Run]) -> list[bool]:
    """Of each run, whether all of it is finite."""
    shared = {n: run.view for n, run in enumerate(runs) if run.element is None and run.view.nbytes < LARGE_BYTES}
    spans = {n: _span(run) for n, run in enumerate(runs) if n not in shared}
    if shared:
        spans |= dict(zip(shared, torch._foreach_norm(list(shared.values()), torch.inf), strict=True))
    ordered = [spans[n].double() for n in range(len(runs))]
    return torch.stack(ordered).isfinite().tolist() if ordered else []  # waits for the device once


def _span(run: _Run) -> torch.Tensor:
    """A number that is finite if all of the run is."""
    view, element = run.view, run.element
    if element is None:
        # Both are NaN if any value is; isfinite, which writes as much as it reads, takes a hundred times as long.
        low, high = torch.aminmax(view)
        return high.double() - low.double()
    # torch has no maximum of these, but as bytes they sort alike: the positive ones signed, the negative ones unsigned.
    beyond = view.max() >= element.exponent | element.sign
    if element.signed:
        beyond |= view.view(torch.int8).max() >= element.exponent
    return torch.where(beyond, torch.inf, 0.0)


def _byte_sized(dtype: torch.dtype) -> Element | None:
    """What numbers of one byte are; None for wider ones."""
    return KINDS[CODES[dtype_name(dtype)]] if dtype.itemsize == 1 else None


def _watched(slots: Iterable[Slot]) -> Iterator[Watched]:
    for slot in slots:
        for place in slot.places:
            shown = place.scales or place.values
            wide = shown.dtype.is_floating_point and shown.dtype.itemsize > 1
            # Narrower ones, and integers, have nothing but numbers unless their format is known to have more.
            if shown.nbytes and (wide or dtype_name(shown.dtype) in CODES):
                yield Watched(slot.spec.dst, place.scales is not None, shown)


def _neighbours(watched: Iterable[Watched]) -> Iterator[list[Watched]]:
    """Those of one dtype with nothing but padding between them, together."""
    number, end, size = 0, 0, 0
    numbered: list[tuple[int, Watched]] = []
    for each in watched:
        before = numbered[-1][1] if numbered else None
        apart = before is None or before.place.dtype != each.place.dtype or each.place.offset - end >= ALIGNMENT
        if apart or size + each.place.nbytes > RUN_BYTES:
            number, size = number + 1, 0
        numbered.append((number, each))
        end, size = each.place.offset + each.place.nbytes, size + each.place.nbytes
    for _, together in groupby(numbered, key=lambda pair: pair[0]):
        yield [each for _, each in together]
