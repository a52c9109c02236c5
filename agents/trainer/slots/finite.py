"""Values that are no numbers, found in the slots after the conversion: what overflowed in the cast is among them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Final

import torch
from weightsync.agents.memory.arena import ALIGNMENT
from weightsync.agents.trainer.slots.arena import Reservation
from weightsync.agents.trainer.slots.slot import Slot

LARGE_BYTES: Final = 1 << 20
"""From here on a launch of its own costs less than its reading; smaller ones share a launch where the device can."""

RUN_BYTES: Final = 1 << 31
"""Of one reduction, unless one tensor is larger; far above, kernels need wider indices."""

EXPONENTS: Final = frozenset({torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8)})
"""Dtypes of scales that are biased exponents; 0xFF is NaN (OCP Microscaling Formats, 2023)."""


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


class FiniteCheck:
    """One pass over the slots' memory, in as few reductions as there are runs of one dtype.

    Args:
        slots: bound to ``arena``.
        arena: uint8. The padding between neighbours of a run is set to zero here, once, and read with them.
    """

    def __init__(self, slots: Sequence[Slot], arena: torch.Tensor) -> None:
        self._arena = arena
        self._runs = list(_runs(sorted(_watched(slots), key=lambda w: w.place.offset)))
        for run in self._runs:
            for before, after in pairwise(run):
                arena[before.place.offset + before.place.nbytes : after.place.offset].zero_()

    @torch.no_grad()
    def find(self) -> tuple[NonFinite, ...]:
        """All tensors with values that are no finite numbers, in the arena's order. Waits for the device."""
        suspects = [run for run, fine in zip(self._runs, self._fine(), strict=True) if not fine]
        counted = (self._count(watched) for run in suspects for watched in run)
        return tuple(found for found in counted if found.count)

    def _fine(self) -> list[bool]:
        """Of each run, whether all of it is finite."""
        views = [_view(self._arena, run) for run in self._runs]
        shared = {n: v for n, v in enumerate(views) if v.dtype.is_floating_point and v.nbytes < LARGE_BYTES}
        spans = {n: _span(view) for n, view in enumerate(views) if n not in shared}
        if shared:
            spans |= dict(zip(shared, torch._foreach_norm(list(shared.values()), torch.inf), strict=True))
        ordered = [spans[n].double() for n in range(len(views))]
        return torch.stack(ordered).isfinite().tolist() if ordered else []  # waits for the device once

    def _count(self, watched: Watched) -> NonFinite:
        values = _view(self._arena, [watched])
        wrong = ~values.isfinite() if values.dtype.is_floating_point else values == 255
        return NonFinite(watched.tensor, int(wrong.sum()), values.numel(), watched.blocks)


def _span(view: torch.Tensor) -> torch.Tensor:
    """A number that is finite if all of ``view`` is."""
    # Both are NaN if any value is; isfinite, which writes as much as it reads, takes a hundred times as long.
    low, high = torch.aminmax(view)
    if view.dtype.is_floating_point:
        return high.double() - low.double()
    return torch.where(high == 255, torch.inf, 0.0)


def _watched(slots: Iterable[Slot]) -> Iterator[Watched]:
    for slot in slots:
        for place in slot.places:
            shown = place.scales or place.values
            if shown.nbytes:
                yield Watched(slot.spec.dst, place.scales is not None, shown)


def _runs(watched: Sequence[Watched]) -> Iterator[list[Watched]]:
    """Neighbours of one dtype with nothing but padding between them, together."""
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


def _view(arena: torch.Tensor, run: Sequence[Watched]) -> torch.Tensor:
    """All of a run in its dtype; exponents as the bytes that they are."""
    start, last = run[0].place.offset, run[-1].place
    dtype = last.dtype
    memory = arena.narrow(0, start, last.offset + last.nbytes - start)
    return memory if dtype in EXPONENTS else memory.view(dtype)
