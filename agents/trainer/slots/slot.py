"""Slots: registered memory that holds converted weights ready to send.

Each slot owns its places in the arena and its rows of the layout. Slots are made once; converting (``LocalBatch``,
``gathering``) allocates nothing. Sharded and Expert slots are filled from what this rank has; Gathered ones take part
in collectives on every rank, also where they own no bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

import torch
from weightsync.agents.tables.box import Box
from weightsync.agents.tables.runs import runs
from weightsync.agents.trainer.slots.arena import ArenaPlan, Reservation
from weightsync.agents.trainer.slots.boxes import LocalShare
from weightsync.agents.trainer.slots.conversion import ConversionSpec
from weightsync.agents.trainer.slots.merged import together
from weightsync.agents.trainer.slots.quantization import Conversion, QuantizationSpec
from weightsync.agents.trainer.slots.reading import Picks, Readings, Taken
from weightsync.agents.trainer.slots.routing import Kind, Route, SlotPiece
from weightsync.orchestrator.protocol.layout import COPY_ROW, Layout, Matrix, Tensor

MOST_PARTS: Final = 16
PART_BYTES: Final = 64 << 20
"""What is converted in one go: at least so much, and an arena in at most so many parts. A part costs some launches."""


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """One row of the layout: ``box`` of the logical ``tensor`` lies at ``offset`` of the arena, with byte strides.

    ``first_replica``: whether this rank is the first of those that hold the same box (it is the one that saves it).
    """

    tensor: Tensor
    box: Box
    offset: int
    stride: tuple[int, ...]
    first_replica: bool


@dataclass(frozen=True, slots=True)
class SlotNote:
    """Why a slot is what it is, for ``plan explain``. ``bytes``: held by this rank."""

    tensor: str
    kind: Kind
    reason: str
    sources: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    piece: SlotPiece
    values: Reservation
    scales: Reservation | None


@dataclass(frozen=True, slots=True)
class Move:
    """One conversion of a slot: which source, what of it, into which bound memory."""

    source: int
    index: tuple[slice, ...]
    out: torch.Tensor
    scale_out: torch.Tensor | None


@dataclass(slots=True)
class Slot:
    """What all kinds share. ``rows``: this slot's rows of the layout, once it has been laid out."""

    spec: ConversionSpec
    route: Route
    shares: tuple[LocalShare, ...]
    places: tuple[_Place, ...]
    rows: range = range(0)
    moves: tuple[Move, ...] = field(default=(), repr=False)

    kind: ClassVar[Kind]

    @classmethod
    def planned(cls, spec: ConversionSpec, route: Route, shares: tuple[LocalShare, ...], arena: ArenaPlan) -> "Slot":
        """The slot, with its places reserved in ``arena``."""
        places = []
        for piece in route.pieces:
            values = arena.reserve(piece.box.extent, spec.quantization.dtype)
            scales = None
            if spec.quantization.quantizes:
                scales = arena.reserve(spec.quantization.scale_shape(piece.box.extent), spec.quantization.scale_dtype)
            places.append(_Place(piece, values, scales))
        return cls(spec, route, shares, tuple(places))

    def bind(self, arena: torch.Tensor) -> None:
        """Point the slot at its memory; ``arena`` is uint8 and holds all that was reserved."""
        self.moves = tuple(
            Move(
                place.piece.source,
                place.piece.index,
                place.values.view(arena),
                place.scales.view(arena) if place.scales else None,
            )
            for place in self.places
        )

    @property
    def entries(self) -> Iterator[LayoutEntry]:
        """The rows of this slot: one per logical tensor, box and place."""
        for place in self.places:
            yield from _entries(self.spec, self.route, place.piece.box, place.values, scales=False)
            if place.scales is not None:
                box = _scale_box(place.piece.box, self.spec.quantization)
                yield from _entries(self.spec, self.route, box, place.scales, scales=True)

    def writes(self, copies: Matrix, layout: Layout) -> Matrix:
        """The contiguous writes of this slot among a rank's ``copies``, as from ``tables.runs``."""
        own = (copies[:, COPY_ROW] >= self.rows.start) & (copies[:, COPY_ROW] < self.rows.stop)
        return runs(copies[own], layout)

    def explain(self) -> SlotNote:
        """What this slot is and why."""
        size = sum(p.values.nbytes + (p.scales.nbytes if p.scales else 0) for p in self.places)
        keys = tuple(key for s in self.spec.sources for key in (s.key, self.spec.per_source_scale_key(s)) if key)
        return SlotNote(self.spec.dst, self.kind, self.route.reason, keys, size)

    @property
    def source_dtypes(self) -> frozenset[torch.dtype]:
        """Dtypes of what is converted into ``moves`` on this rank; empty where the slot has no bytes."""
        return frozenset(held.dtype for held in self.shares) if self.places else frozenset()


@dataclass(slots=True)
class ShardedSlot(Slot):
    """This rank's own share of a logical tensor."""

    kind: ClassVar[Kind] = "sharded"


@dataclass(slots=True)
class ExpertSlot(ShardedSlot):
    """This rank's experts of one projection, stacked; each is a logical tensor of its own."""

    kind: ClassVar[Kind] = "expert"


@dataclass(slots=True)
class GatheredSlot(Slot):
    """A whole logical tensor at one owner; every rank of its mesh takes part in the gathering (``gathering``).

    Masters are cast before they are gathered, which halves what travels and changes no byte of the result.
    """

    kind: ClassVar[Kind] = "gathered"

    @property
    def source_dtypes(self) -> frozenset[torch.dtype]:
        return frozenset({self.spec.quantization.gather_dtype}) if self.places else frozenset()


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


def parts_of(slots: Sequence[Slot], size: int) -> Iterator[tuple[int, list[Slot]]]:
    """Slots that need no other rank, in parts that fill an arena of ``size`` bytes from its beginning to its end, each
    with the offset below which the arena is full when it and those before are, and the gathered slots."""
    local = [slot for slot in slots if slot.kind != "gathered" and slot.places]
    most, part = max(size // MOST_PARTS, PART_BYTES), list[Slot]()
    for slot in local:
        begin = slot.places[0].values.offset
        if part and begin - part[0].places[0].values.offset >= most:
            yield begin, part
            part = []
        part.append(slot)
    yield size, part


def local_batches(local: Sequence[Slot], readings: Readings, taken: Taken) -> Iterator[LocalBatch]:
    """Slots that need no other rank, one batch for each treatment; more where weights are merged on the way."""
    for treatment in dict.fromkeys(slot.spec.quantization for slot in local):
        alike = [slot for slot in local if slot.spec.quantization == treatment]
        keys = ({source.key for source in slot.spec.sources} for slot in alike)
        for group in together([sum(taken.merged_bytes(readings.numbers[key]) for key in own) for own in keys]):
            yield LocalBatch([alike[number] for number in group], readings, taken)


def _pick(slot: Slot, move: Move, readings: Readings) -> tuple[int, tuple[slice, ...] | None]:
    shape = slot.shares[move.source].local_shape
    whole = move.index == tuple(slice(0, extent) for extent in shape)
    return readings.numbers[slot.spec.sources[move.source].key], None if whole else move.index


KINDS: dict[Kind, type[Slot]] = {"sharded": ShardedSlot, "gathered": GatheredSlot, "expert": ExpertSlot}


def dtype_name(dtype: torch.dtype) -> str:
    """The protocol's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def _scale_box(box: Box, quantization: QuantizationSpec) -> Box:
    """The blocks of ``box``, which begins on the grid."""
    *leading, rows, columns = box.offset
    offset = (*leading, rows // quantization.block[0], columns // quantization.block[1])
    return Box(offset, quantization.scale_shape(box.extent))


def _entries(
    spec: ConversionSpec, route: Route, box: Box, place: Reservation, *, scales: bool
) -> Iterator[LayoutEntry]:
    shape, strides = route.shape, place.stride
    if scales:
        stored = spec.quantization.stored
        shape, strides = stored(spec.quantization.scale_shape(shape)), stored(strides)
        box = Box(stored(box.offset), stored(box.extent))
    dtype = dtype_name(place.dtype)
    if not spec.experts:
        tensor = Tensor(spec.logical(0)[int(scales)], dtype, shape)
        yield LayoutEntry(tensor, box, place.offset, strides, route.first_replica)
        return
    # One logical tensor per expert: the stack's first dimension becomes a number in the name and a byte offset.
    own = Box(box.offset[1:], box.extent[1:])
    for position in range(box.extent[0]):
        tensor = Tensor(spec.logical(box.offset[0] + position)[int(scales)], dtype, shape[1:])
        offset = place.offset + position * strides[0]
        yield LayoutEntry(tensor, own, offset, strides[1:], route.first_replica)


def made_slots(
    routed: Sequence[tuple[ConversionSpec, Route]], shares: Mapping[str, LocalShare], arena: ArenaPlan
) -> tuple[Slot, ...]:
    """The slots of all routed specifications, their places reserved in ``arena``."""
    return tuple(
        KINDS[route.kind].planned(spec, route, tuple(shares[s.key] for s in spec.sources), arena)
        for spec, route in routed
    )
