"""Slots that a stream fills: pairs of a name and a tensor that pass once for each version.

Training frameworks hand their weights over like this: a generator gathers one tensor, yields it, and lets go of it
before the next. Each tensor is therefore converted into its slot as it passes; the model is never in memory a second
time beside the slots. Slots are made from declared metadata, or during the first pass from what passes: then the arenas
grow segment by segment, because nothing is known beforehand. Later passes bring the same names, in any order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch.distributed.tensor import DTensor
from weightsync.agents.memory.arena import ALIGNMENT, arena, region_of
from weightsync.agents.tables.box import Box
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.errors import ChangedTensor
from weightsync.agents.trainer.slots.arena import ArenaPlan
from weightsync.agents.trainer.slots.boxes import LocalShare
from weightsync.agents.trainer.slots.conversion import ConversionSpec, ConversionTable, Source
from weightsync.agents.trainer.slots.finite import FiniteCheck, NonFinite
from weightsync.agents.trainer.slots.fitness import objection
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.slots.routing import Route, SlotPiece, ring_bytes
from weightsync.agents.trainer.slots.slot import LayoutEntry, ShardedSlot, Slot, SlotNote
from weightsync.agents.trainer.slots.slots import Allocate, layout_of
from weightsync.agents.trainer.sources.unread import ADAPTER
from weightsync.agents.trainer.streams.heads import refuse_lost_head
from weightsync.agents.trainer.streams.streamed import StreamedTensor, StreamError
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.limits import MAX_NAME_CHARS, MAX_RANK

Pairs = Iterable[tuple[str, torch.Tensor]]

SMALLEST_SEGMENT: Final = 64 * 1024 * 1024
LARGEST_SEGMENT: Final = 1024 * 1024 * 1024
"""Of an arena that grows: each registration costs about a millisecond, and the end of each segment is wasted."""
GROWTH: Final = 8
"""A further segment is an eighth of what there is, so that at most so much is wasted."""

CODES: Final = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
"""May pass where nothing is made of them: engines that hold the same get them, and their scales, as they are."""

GIVE: Final = "leave it out, or yield"
"""What to do about a tensor that cannot travel as it is."""

NAMES_SHOWN: Final = 5
"""Of a list in an error; the rest is counted."""


class StreamSlots:
    """The slots of one trainer rank that streams its weights.

    Args:
        metadata: all tensors of the model, the same on every rank; None: learnt from the first pass, in which this rank
            must then see every tensor whole.
        rank: this rank, as ``StreamedTensor.owners`` counts.
        treatments: what a tensor becomes on the wire, by name; one without an entry is cast to ``forward_dtype``.
        forward_dtype: what masters are rounded to; None: tensors travel in the dtype that they have.
        staging_bytes: of the ring that is packed in, 0 for none; None: see ``ring_bytes``.
        allocate: makes a segment or the staging region; None: memory that may be registered, on the tensors' device.

    Attributes:
        layout: for Announce, once a first pass has succeeded; before it, empty.
        arenas: uint8 tensors, one for each region, in the regions' order; the staging region is the last.
        primary: a stream is sent by every rank that has one.

    Raises:
        StreamError: of ``metadata``: a name twice, or a tensor that cannot travel.
    """

    primary = True

    def __init__(
        self,
        metadata: Sequence[StreamedTensor] | None = None,
        *,
        rank: int = 0,
        treatments: Mapping[str, QuantizationSpec] | None = None,
        forward_dtype: torch.dtype | None = None,
        staging_bytes: int | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        self._rank = rank
        self._treatments = treatments or {}
        self._made_of = {t.scale_name(name): name for name, t in self._treatments.items() if t.quantizes}
        self._forward_dtype = forward_dtype
        self._staging_bytes = staging_bytes
        self._allocate = allocate
        self._device = torch.device("cpu")
        self._slots: dict[str, Slot] = {}
        self._regions: dict[str, int] = {}
        self._looks: dict[str, tuple[object, ...]] = {}  # of what has been found fit; most passes bring the same
        self._room = ArenaPlan()  # what has been handed out of the last segment
        self._declared: dict[str, StreamedTensor] | None = None
        self._complete = False
        self._finite: list[FiniteCheck] = []  # one for each segment
        self.arenas: list[torch.Tensor] = []
        self.layout = Layout((), (), b"")
        if metadata is not None:
            self._declared = _by_name(metadata)

    @property
    def complete(self) -> bool:
        """Whether a first pass has succeeded, so that there is a layout."""
        return self._complete

    @property
    def slots(self) -> tuple[Slot, ...]:
        """In the order of the metadata or of the first pass."""
        return tuple(self._slots.values())

    def entries(self) -> Iterator[LayoutEntry]:
        """The rows of the layout, in its order."""
        for slot in self._slots.values():
            yield from slot.entries

    def explain(self) -> tuple[SlotNote, ...]:
        """What each slot is and why."""
        return tuple(slot.explain() for slot in self._slots.values())

    def nonfinite(self, finite: Spans = NOWHERE) -> tuple[NonFinite, ...]:
        """Tensors of the last pass with values that are no finite numbers. Waits for the device."""
        return tuple(found for check in self._finite for found in check.find(finite))

    @torch.no_grad()
    def fill(self, tensors: Pairs) -> None:
        """One pass: convert every tensor into its slot, on the caller's thread and stream; no device is waited for.

        The pass goes on to its end also when a tensor is refused: yielding one may be a collective, in which the other
        ranks wait for this one.

        Raises:
            StreamError: a tensor that cannot travel, a name twice or unknown, names that never came, a lost head.
            ChangedTensor: another shape or dtype than before or than declared.
            What the stream itself raises, at once.
        """
        seen: set[str] = set()
        unknown: list[str] = []
        trouble: Exception | None = None
        for pair in tensors:
            if trouble is None:
                try:
                    self._take(pair, seen, unknown)
                except Exception as error:
                    trouble = error
            del pair  # or it would stay in memory while the next one is gathered
        if trouble is not None:
            raise trouble
        self._account(seen, unknown)
        refuse_lost_head(self._slots, self._treatments)
        if not self._complete:
            self._seal()

    # ------------------------------------------------------------------------------------------------- one tensor
    def _take(self, pair: tuple[str, torch.Tensor], seen: set[str], unknown: list[str]) -> None:
        name, tensor = self._checked(pair)
        if name in seen:
            raise StreamError(f"tensor {name!r} came twice in one pass; a version has one value for each name")
        seen.add(name)
        if self._declared is not None and not self._slots:
            self._make_declared(self._declared, tensor.device)
        if name not in self._slots:
            if self._complete or self._declared is not None:
                unknown.append(name)
                return
            if not tensor.numel():
                raise StreamError(f"tensor {name!r} has no elements: a placeholder (ZeRO-3); gather it first")
            self._make_seen(StreamedTensor(name, tensor.dtype, tuple(tensor.shape)), tensor.device)
        slot = self._slots[name]
        if self._looks.get(name) != _look(tensor):
            _compare(name, tensor, slot.shares[0])
            self._looks[name] = _look(tensor)
        here = tensor.to(self._device)
        for move in slot.moves:
            slot.spec.quantization.apply(here[move.index], move.out, move.scale_out)

    def _checked(self, pair: object) -> tuple[str, torch.Tensor]:
        """A pair that may travel.

        Raises:
            StreamError: it may not; with the tensor's name, what is wrong, and what to do.
        """
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise StreamError(f"a stream yields (name, tensor) pairs, not {type(pair).__name__}")
        name, tensor = pair
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
            raise StreamError(f"a tensor's name is a string of 1 to {MAX_NAME_CHARS} characters, not {name!r:.200}")
        if not isinstance(tensor, torch.Tensor):
            raise StreamError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        wrong = "" if self._looks.get(name) == _look(tensor) else self._unfit(name, tensor)
        if wrong:
            raise StreamError(f"tensor {name!r} {wrong}")
        return name, tensor

    def _unfit(self, name: str, tensor: torch.Tensor) -> str:
        """Why ``tensor`` cannot travel; empty if it can."""
        if name in self._made_of:
            return f"holds scales, and {self._made_of[name]!r} is quantised here, which makes them; leave it out"
        if self._treatments and name not in self._treatments and ADAPTER.search(name):
            return (
                "is an adapter's and read by nobody, engines would serve a model without it; yield merged weights (and"
                " leave it out)"
            )
        if isinstance(tensor, DTensor):
            return "is a DTensor; yield full_tensor(), or declare its pieces in the metadata and yield to_local()"
        if tensor.ndim > MAX_RANK:
            return f"has {tensor.ndim} dimensions; at most {MAX_RANK} can travel"
        made = name in self._treatments or self._forward_dtype is not None
        unchanged = self._treatment(name, tensor.dtype).unchanged if made else CODES
        return objection(tensor, as_they_are=unchanged, give=GIVE)

    def _account(self, seen: set[str], unknown: list[str]) -> None:
        known = self._slots or self._owned(self._declared or {})
        if not seen and (known or self._declared is None):
            raise StreamError("the stream ended without a tensor; a generator that was used before yields nothing")
        missing = [name for name in known if name not in seen]
        wrong = [f"lacks {len(missing)} of its {len(known)} tensors ({_some(missing)})"] if missing else []
        wrong += [f"has {len(unknown)} that it did not have before ({_some(unknown)})"] if unknown else []
        if wrong:
            origin = "first pass" if self._declared is None else "metadata"
            raise StreamError(
                f"the stream {' and '.join(wrong)}; its {origin} named them, and every pass brings all and no others"
            )

    # ------------------------------------------------------------------------------------------------- slots
    def _owned(self, declared: Mapping[str, StreamedTensor]) -> dict[str, LocalShare]:
        shares = {name: tensor.share(self._rank) for name, tensor in declared.items()}
        return {name: share for name, share in shares.items() if share is not None}

    def _make_declared(self, declared: Mapping[str, StreamedTensor], device: torch.device) -> None:
        """All slots in one segment of exactly their size."""
        owned = self._owned(declared)
        specs = {name: self._spec(declared[name]) for name in owned}
        whole = ArenaPlan()
        for name, share in owned.items():
            _planned(specs[name], share, whole)
        self._device = device
        self._grow(whole.size)
        for name, share in owned.items():
            self._add(specs[name], share)

    def _make_seen(self, tensor: StreamedTensor, device: torch.device) -> None:
        """One slot, in a further segment where the last one has no room left."""
        share = LocalShare(tensor.shape, tensor.dtype)
        spec = self._spec(tensor)
        if not self.arenas:
            self._device = device
        alone = ArenaPlan()
        _planned(spec, share, alone)
        if not self.arenas or self._room.size + alone.size > self.arenas[-1].numel():
            self._grow(max(alone.size, _next_segment(sum(segment.numel() for segment in self.arenas))))
        self._add(spec, share)

    def _add(self, spec: ConversionSpec, share: LocalShare) -> None:
        slot = _planned(spec, share, self._room)
        slot.bind(self.arenas[-1])
        self._slots[spec.dst] = slot
        self._regions[spec.dst] = len(self.arenas) - 1

    def _grow(self, size: int) -> None:
        # At least one unit, also on ranks that own nothing: there is an arena everywhere.
        self.arenas.append(self._make(max(size, ALIGNMENT)))
        self._room = ArenaPlan()

    def _make(self, size: int) -> torch.Tensor:
        return self._allocate(size) if self._allocate is not None else arena(size, self._device)

    def _seal(self) -> None:
        """The first pass has succeeded: from here on the slots are what they are."""
        if not self.arenas:
            self._grow(0)
        ring = ring_bytes(self._staging_bytes, self._device, sum(memory.numel() for memory in self.arenas))
        staging = len(self.arenas) if ring else -1
        if ring:
            self.arenas.append(self._make(ring))
        placed = [(slot, self._regions[name]) for name, slot in self._slots.items()]
        self.layout = layout_of(placed, [region_of(memory) for memory in self.arenas], staging)
        for region in sorted({number for _, number in placed}):
            own = [slot for slot, number in placed if number == region]
            self._finite.append(FiniteCheck(own, self.arenas[region], region))
        self._complete = True

    def _spec(self, tensor: StreamedTensor) -> ConversionSpec:
        treatment = self._treatment(tensor.name, tensor.dtype)
        return ConversionSpec(tensor.name, (Source(tensor.name),), quantization=treatment)

    def _treatment(self, name: str, dtype: torch.dtype) -> QuantizationSpec:
        plain = self._forward_dtype or dtype
        return self._treatments.get(name) or QuantizationSpec(plain, forward_dtype=plain)


def drain(tensors: Pairs) -> None:
    """Read a stream to its end for the sake of other ranks, which may stand in its collectives."""
    for _ in tensors:
        pass


def treatments_of(table: ConversionTable) -> dict[str, QuantizationSpec]:
    """What each tensor of a model becomes on the wire, by its name in the checkpoint.

    Raises:
        StreamError: the table is for a trainer that names, fuses or stacks its tensors otherwise than the checkpoint.
    """
    specs = [*table.non_layer_specs(), *(s for layer in range(table.layers) for s in table.conversion_specs(layer))]
    for spec in specs:
        if spec.sources != (Source(spec.dst),):
            key = spec.sources[0].key
            raise StreamError(f"the table reads {key!r} for {spec.dst!r}; a stream has the checkpoint's tensors")
    return {spec.dst: spec.quantization for spec in specs}


def _by_name(metadata: Iterable[StreamedTensor]) -> dict[str, StreamedTensor]:
    declared: dict[str, StreamedTensor] = {}
    for tensor in metadata:
        if tensor.name in declared:
            raise StreamError(f"the metadata declares {tensor.name!r} twice")
        declared[tensor.name] = tensor
    return declared


def _planned(spec: ConversionSpec, share: LocalShare, plan: ArenaPlan) -> Slot:
    """The slot of what this rank holds, with its places reserved in ``plan``.

    Raises:
        StreamError: a piece that cannot be quantised by itself.
    """
    treatment = spec.quantization
    if treatment.quantizes:
        if len(share.shape) != 2:
            raise StreamError(f"tensor {spec.dst!r} of shape {share.shape} is to be quantised in blocks of a matrix")
        for held in share.boxes:
            _check_grid(spec.dst, held.box, share.shape, treatment.block)
    pieces = tuple(SlotPiece(0, held.local, held.box) for held in share.boxes)
    reason = "as the stream has it" if share.grid is None else f"this rank's piece over {share.grid}"
    route = Route("sharded", reason, share.shape, pieces, share.first_replica)
    return ShardedSlot.planned(spec, route, (share,), plan)


def _check_grid(name: str, box: Box, shape: tuple[int, ...], block: tuple[int, int]) -> None:
    for dim, (start, end, whole, step) in enumerate(zip(box.offset, box.end, shape, block, strict=True)):
        if start % step or (end % step and end != whole):
            raise StreamError(
                f"tensor {name!r}: this rank's piece is {start}…{end} of dimension {dim}, which cuts a quantisation"
                f" block of {step}; stream it whole instead"
            )


def _next_segment(size: int) -> int:
    return min(LARGEST_SEGMENT, max(SMALLEST_SEGMENT, size // GROWTH))


def _look(tensor: torch.Tensor) -> tuple[object, ...]:
    """What decides whether a tensor may travel and fits its slot."""
    return type(tensor), tensor.dtype, tensor.shape, tensor.layout, tensor.device


def _compare(name: str, tensor: torch.Tensor, share: LocalShare) -> None:
    """The tensor is what its slot was made for.

    Raises:
        ChangedTensor: another shape or dtype.
    """
    if tensor.dtype != share.dtype:
        raise ChangedTensor(f"{name!r} has the dtype {tensor.dtype}; its slot was made for {share.dtype}")
    shape = tuple(tensor.shape)
    # A rank whose piece is empty may have whatever empty shape its framework gave it.
    if shape != share.local_shape and (share.boxes or tensor.numel()):
        piece = "" if share.grid is None else f", this rank's piece of {share.shape} over {share.grid}"
        raise ChangedTensor(f"{name!r} has the shape {shape}; its slot was made for {share.local_shape}{piece}")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
