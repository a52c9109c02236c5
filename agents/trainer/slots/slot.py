"""Slots: registered memory that holds converted weights ready to send.

Each slot owns its places in the arena, its rows of the layout, and the conversion into them. Slots are made once;
converting allocates nothing for them. Sharded and Expert slots convert what this rank has; Gathered ones take part in
a collective on every rank, in the table's order, also where they own no bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar, Final, cast

import torch
from torch.distributed.tensor import DTensor
from weightsync.agents.tables.box import Box
from weightsync.agents.tables.runs import runs
from weightsync.agents.trainer.errors import ChangedTensor, MissingTensor
from weightsync.agents.trainer.slots.arena import ArenaPlan, Reservation
from weightsync.agents.trainer.slots.boxes import LocalShare
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.fitness import hint
from weightsync.agents.trainer.slots.quantization import SCALE_DTYPE, Conversion, QuantizationSpec
from weightsync.agents.trainer.slots.routing import Kind, Route, SlotPiece
from weightsync.orchestrator.protocol.layout import COPY_ROW, Layout, Matrix, Tensor

State = Mapping[str, torch.Tensor]
"""The trainer's tensors by its own names: plain ones, or DTensors."""

UNSHARDED: Final = (
    "; FSDP2 leaves parameters whole after a forward without backward: give the model itself, or a callable that calls"
    " reshard() on its FSDP modules first"
)
"""What to do about a tensor that lost its mesh."""


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
                scales = arena.reserve(spec.quantization.scale_shape(piece.box.extent), SCALE_DTYPE)
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

    def check(self, state: State) -> None:
        """That ``state`` has what the slot was made for, without touching a value or another rank.

        Raises:
            MissingTensor, ChangedTensor: as ``convert``.
        """
        for number in range(len(self.spec.sources)):
            self._take(state, number)

    @torch.no_grad()
    def convert(self, state: State) -> None:
        """Write the current weights into the slot.

        Raises:
            MissingTensor: the state lacks a source.
            ChangedTensor: a source's shape or sharding is not the one that the slot was made for.
        """
        for source, move in zip(self.sources(state), self.moves, strict=True):
            self.spec.quantization.apply(source, move.out, move.scale_out)

    def sources(self, state: State) -> list[torch.Tensor]:
        """What each of ``moves`` converts, now. Errors as ``convert``."""
        raise NotImplementedError

    @property
    def source_dtypes(self) -> frozenset[torch.dtype]:
        """Dtypes of what ``sources`` gives on this rank; empty where the slot has no bytes."""
        return frozenset(held.dtype for held in self.shares) if self.places else frozenset()

    def _take(self, state: State, number: int) -> torch.Tensor:
        source, held = self.spec.sources[number], self.shares[number]
        tensor = state.get(source.key)
        if tensor is None:
            raise MissingTensor(source.key, self.spec.dst, hint(source.key, state))
        shape = tuple(tensor.shape)
        if shape != held.shape or isinstance(tensor, DTensor) != (held.grid is not None):
            whole = held.grid is not None and not isinstance(tensor, DTensor)
            raise ChangedTensor(
                f"{source.key!r} is {type(tensor).__name__} {shape} now; its slot was made for {held.shape}"
                f" over {held.grid or 'no mesh'}{UNSHARDED if whole else ''}"
            )
        return tensor


@dataclass(slots=True)
class ShardedSlot(Slot):
    """This rank's own share of a logical tensor."""

    kind: ClassVar[Kind] = "sharded"

    @torch.no_grad()
    def check(self, state: State) -> None:
        for number in range(len(self.spec.sources)):
            self._local(state, number)

    def sources(self, state: State) -> list[torch.Tensor]:
        locals_ = [self._local(state, number) for number in range(len(self.spec.sources))]
        return [locals_[move.source][move.index] for move in self.moves]

    def _local(self, state: State, number: int) -> torch.Tensor:
        tensor, held = self._take(state, number), self.shares[number]
        if not isinstance(tensor, DTensor):
            return tensor
        local = tensor.to_local()
        # A rank without a share may have a local tensor of any empty shape.
        if tuple(local.shape) != held.local_shape and held.boxes:
            raise ChangedTensor(
                f"{self.spec.sources[number].key!r}: its local shape is {tuple(local.shape)} now,"
                f" its slot was made for {held.local_shape}"
            )
        return local


@dataclass(slots=True)
class ExpertSlot(ShardedSlot):
    """This rank's experts of one projection, stacked; each is a logical tensor of its own."""

    kind: ClassVar[Kind] = "expert"


@dataclass(slots=True)
class GatheredSlot(Slot):
    """A whole logical tensor at one owner; every rank of its mesh takes part in the gathering.

    Masters are cast before they are gathered, which halves what travels and changes no byte of the result.
    """

    kind: ClassVar[Kind] = "gathered"

    @property
    def source_dtypes(self) -> frozenset[torch.dtype]:
        if not self.places:
            return frozenset()
        narrow = self.spec.quantization.gather_dtype
        # Sources are joined before they are converted, and torch.cat gives the widest of their dtypes.
        return frozenset({reduce(torch.promote_types, (narrow if h.grid else h.dtype for h in self.shares))})

    def sources(self, state: State) -> list[torch.Tensor]:
        # Before the question whether anything is kept here: gathering is a collective, and other ranks wait in it.
        wholes = [self._whole(state, number, source) for number, source in enumerate(self.spec.sources)]
        if not self.moves:
            return []
        joined = wholes[0] if len(wholes) == 1 else torch.cat(wholes, self.spec.cat_dim)
        return [joined[move.index] for move in self.moves]

    def _whole(self, state: State, number: int, source: Source) -> torch.Tensor:
        tensor = self._take(state, number)
        if isinstance(tensor, DTensor):
            narrow = cast(DTensor, tensor.to(self.spec.quantization.gather_dtype))
            tensor = narrow.full_tensor()
        if source.length is None:
            return tensor
        return tensor.narrow(source.dim + int(self.spec.experts > 0), source.start, source.length)


class LocalBatch:
    """Slots of one treatment that need no other rank, converted in few launches with tables that stay on the device.

    Args:
        slots: Sharded and Expert ones, bound, all of one ``QuantizationSpec``.
        state: the trainer's tensors; the later ones look like them.

    Raises:
        As ``Slot.convert``.
    """

    @torch.no_grad()
    def __init__(self, slots: Sequence[Slot], state: State) -> None:
        self._slots = slots
        sources = self._sources(state)
        self._looks = [_look(source) for source in sources]
        moves = [move for slot in slots for move in slot.moves]
        jobs = [Conversion(src, m.out, m.scale_out) for src, m in zip(sources, moves, strict=True)]
        self._convert = slots[0].spec.quantization.prepare(jobs)

    @torch.no_grad()
    def convert(self, state: State) -> None:
        """Convert all slots. Errors as ``Slot.convert``."""
        sources = self._sources(state)
        looks = [_look(source) for source in sources]
        # The prepared tables hold dtypes, shapes and strides; only the addresses are read anew each time.
        if looks != self._looks:
            number = next(n for n, (now, then) in enumerate(zip(looks, self._looks, strict=True)) if now != then)
            spec = [slot.spec for slot in self._slots for _ in slot.moves][number]
            raise ChangedTensor(
                f"a source of {spec.dst!r} has dtype, shape, strides and device {looks[number]} now;"
                f" its slot was made for {self._looks[number]}"
            )
        self._convert(sources)

    def _sources(self, state: State) -> list[torch.Tensor]:
        return [source for slot in self._slots for source in slot.sources(state)]


def _look(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a prepared conversion depends on."""
    return (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


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
    shape = spec.quantization.scale_shape(route.shape) if scales else route.shape
    dtype = dtype_name(place.dtype)
    if not spec.experts:
        tensor = Tensor(spec.logical(0)[int(scales)], dtype, shape)
        yield LayoutEntry(tensor, box, place.offset, place.stride, route.first_replica)
        return
    # One logical tensor per expert: the stack's first dimension becomes a number in the name and a byte offset.
    own = Box(box.offset[1:], box.extent[1:])
    for position in range(box.extent[0]):
        tensor = Tensor(spec.logical(box.offset[0] + position)[int(scales)], dtype, shape[1:])
        offset = place.offset + position * place.stride[0]
        yield LayoutEntry(tensor, own, offset, place.stride[1:], route.first_replica)


def made_slots(
    routed: Sequence[tuple[ConversionSpec, Route]], shares: Mapping[str, LocalShare], arena: ArenaPlan
) -> tuple[Slot, ...]:
    """The slots of all routed specifications, their places reserved in ``arena``."""
    return tuple(
        KINDS[route.kind].planned(spec, route, tuple(shares[s.key] for s in spec.sources), arena)
        for spec, route in routed
    )
