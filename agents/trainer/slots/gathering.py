"""All gathered tensors of a publish in few collectives: packed, exchanged, unpacked, through buffers that are kept.

One collective per tensor costs its own latency each time; a model has some hundred tensors that are too small to be
sent by the shard. Here all of a round travel together, cast to what they need before they leave, and each only to its
owner. What arrives equals ``DTensor.full_tensor()`` bit for bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch
from torch.distributed.device_mesh import DeviceMesh
from weightsync.agents.trainer.slots.quantization import Conversion, Prepared, QuantizationSpec
from weightsync.agents.trainer.slots.reading import Readings, Taken
from weightsync.agents.trainer.slots.slot import Slot
from weightsync.agents.trainer.slots.transit import Item, Transit, items_of, padded

GATHER_BYTES: Final = 128 * 1024 * 1024
"""Most that a rank sends or receives in one round, unless a single tensor is larger. Enough for links to be busy; the
buffers stay allocated between publishes, beside a model that fills the device."""

Meshes = tuple[DeviceMesh | None, ...]
"""The meshes of a slot's sources, each once; None for plain tensors."""


class Gathering:
    """The gathered slots of a rank, filled by all ranks together.

    Args:
        slots: gathered ones, bound, in the table's order.
        readings: of the rank.
        taken: the local tensors now; the later ones lie on the same devices.
        most: bytes, as GATHER_BYTES.
    """

    def __init__(self, slots: Sequence[Slot], readings: Readings, taken: Taken, most: int = GATHER_BYTES) -> None:
        families: dict[Meshes, list[list[Item]]] = {}
        for slot in slots:
            items = list(items_of(slot, readings.numbers, readings.meshes))
            if items:
                families.setdefault(tuple(dict.fromkeys(item.mesh for item in items)), []).append(items)
        # By meshes, and cut by global sizes alone: ranks that share a mesh enter its collectives in one order, whatever
        # other meshes each of them is in.
        self._rounds = [_Round(part, taken) for family in families.values() for part in _parts_of(family, most)]
        spaces = _spaces((each.device, each.size) for each in self._rounds)
        wholes = _spaces((each.target_device, each.whole_size) for each in self._rounds)
        for each in self._rounds:
            each.bind(spaces[each.device], wholes[each.target_device])

    @torch.no_grad()
    def convert(self, taken: Taken) -> None:
        """Fill the slots with what is taken now. Collective over the meshes of the sources."""
        for each in self._rounds:
            each.run(taken)


class _Round:
    """Slots that travel together. Laid out first; bound once it is known how much memory all rounds need."""

    def __init__(self, slots: Sequence[Sequence[Item]], taken: Taken) -> None:
        items = [item for own in slots for item in own]
        self._kept = [own[0].slot for own in slots if own[0].slot.moves]
        self.device = taken.locals[items[0].number].device
        self.target_device = self._kept[0].moves[0].out.device if self._kept else self.device
        self._transits: list[Transit] = []
        self.size = 0
        for mesh in dict.fromkeys(item.mesh for item in items):
            self._transits.append(Transit([item for item in items if item.mesh == mesh], self.size))
            self.size = self._transits[-1].end
        self.whole_size = sum(_whole_size(slot) for slot in self._kept)
        self._quantizing: list[tuple[Prepared, list[torch.Tensor]]] = []

    def bind(self, space: torch.Tensor, wholes: torch.Tensor) -> None:
        """Take memory: uint8, of ``size`` and ``whole_size`` or more. What is only cast arrives in its slot."""
        targets, place = {}, 0
        jobs: dict[QuantizationSpec, list[Conversion]] = {}
        for slot in self._kept:
            move, treatment = slot.moves[0], slot.spec.quantization
            targets[id(slot)] = move.out
            if treatment.quantizes:
                size = move.out.numel() * treatment.gather_dtype.itemsize
                whole = wholes.narrow(0, place, size).view(treatment.gather_dtype).view(move.out.shape)
                place += padded(size)
                targets[id(slot)] = whole
                jobs.setdefault(treatment, []).append(Conversion(whole, move.out, move.scale_out))
        for transit in self._transits:
            transit.bind(space, targets)
        self._quantizing = [(treatment.prepare(own), [job.src for job in own]) for treatment, own in jobs.items()]

    def run(self, taken: Taken) -> None:
        for transit in self._transits:
            transit.run(taken)
        for quantize, wholes in self._quantizing:
            quantize(wholes)


def _parts_of(family: Sequence[list[Item]], most: int) -> Iterator[list[list[Item]]]:
    """Slots in their order, as many together as no rank sends or receives more than ``most`` for."""
    part: list[list[Item]] = []
    sent, received = 0, dict[int, int]()
    for items in family:
        owner = items[0].slot.route.owner
        sends = sum(max(item.journey.sizes.values()) for item in items)
        receives = sum(sum(item.journey.sizes.values()) for item in items)
        if part and (sent + sends > most or received.get(owner, 0) + receives > most):
            yield part
            part, sent, received = [], 0, {}
        part.append(items)
        sent += sends
        received[owner] = received.get(owner, 0) + receives
    if part:
        yield part


def _whole_size(slot: Slot) -> int:
    """Bytes of the tensor that a slot is quantised from; none where it is only cast."""
    treatment = slot.spec.quantization
    return padded(slot.moves[0].out.numel() * treatment.gather_dtype.itemsize) if treatment.quantizes else 0


def _spaces(needs: Iterable[tuple[torch.device, int]]) -> dict[torch.device, torch.Tensor]:
    """One buffer for each device, for whichever needs most: rounds follow one another."""
    most: dict[torch.device, int] = {}
    for device, size in needs:
        most[device] = max(most.get(device, 0), size)
    return {device: torch.empty(size, dtype=torch.uint8, device=device) for device, size in most.items()}
