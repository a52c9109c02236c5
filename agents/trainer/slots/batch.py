"""Slots of one treatment that need no other rank, converted together by prepared tables."""

from collections.abc import Iterator, Sequence

import torch
from weightsync.agents.trainer.slots.merged import together
from weightsync.agents.trainer.slots.quantization import Conversion
from weightsync.agents.trainer.slots.reading import Picks, Readings, Taken
from weightsync.agents.trainer.slots.slot import Move, Slot


class LocalBatch:
    """Sharded and Expert slots, converted in few launches with tables that stay on the device.

    Args:
        slots: bound, all of one ``QuantizationSpec``.
        readings: of the rank.
        taken: the local tensors now; the later ones look like them.
    """

    @torch.no_grad()
    def __init__(self, slots: Sequence[Slot], readings: Readings, taken: Taken) -> None:
        self._picks = Picks([_pick(slot, move, readings) for slot in slots for move in slot.moves])
        moves = [move for slot in slots for move in slot.moves]
        jobs = [
            Conversion(src, move.out, move.scale_out) for src, move in zip(self._picks.like(taken), moves, strict=True)
        ]
        self._convert = slots[0].spec.quantization.prepare(jobs)

    @torch.no_grad()
    def convert(self, taken: Taken) -> None:
        """Fill the slots with what is taken now, on the caller's stream."""
        self._convert(self._picks.of(taken))


def local_batches(slots: Sequence[Slot], readings: Readings, taken: Taken) -> Iterator[LocalBatch]:
    """All slots that need no other rank, one batch for each treatment; more where weights are merged on the way."""
    local = [slot for slot in slots if slot.kind != "gathered"]
    for treatment in dict.fromkeys(slot.spec.quantization for slot in local):
        alike = [slot for slot in local if slot.spec.quantization == treatment]
        keys = ({source.key for source in slot.spec.sources} for slot in alike)
        for group in together([sum(taken.merged_bytes(readings.numbers[key]) for key in own) for own in keys]):
            yield LocalBatch([alike[number] for number in group], readings, taken)


def _pick(slot: Slot, move: Move, readings: Readings) -> tuple[int, tuple[slice, ...] | None]:
    shape = slot.shares[move.source].local_shape
    whole = move.index == tuple(slice(0, extent) for extent in shape)
    return readings.numbers[slot.spec.sources[move.source].key], None if whole else move.index
