"""All slots of one trainer rank: made once from the state, the table and the options; filled at every publish."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Final, Protocol

import numpy as np
import torch
import torch.distributed as dist
from weightsync.agents.memory.arena import ALIGNMENT, arena, region_of
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.errors import ExpertPartitionError, MissingTensor, NoRoomForSlots, UnfitTensor
from weightsync.agents.trainer.slots.arena import ArenaPlan
from weightsync.agents.trainer.slots.boxes import LocalShare, local_share
from weightsync.agents.trainer.slots.conversion import ConversionSpec, ConversionTable, refuse_doubles
from weightsync.agents.trainer.slots.finite import FiniteCheck, NonFinite
from weightsync.agents.trainer.slots.fitness import hint, refuse_unfit
from weightsync.agents.trainer.slots.gathering import Gathering
from weightsync.agents.trainer.slots.merged import MergedState
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.slots.reading import Read, Readings, State, Taken
from weightsync.agents.trainer.slots.routing import ExpertParallel, Router, SlotOptions, ring_bytes
from weightsync.agents.trainer.slots.slot import (
    ExpertSlot,
    GatheredSlot,
    LayoutEntry,
    ShardedSlot,
    Slot,
    SlotNote,
    local_batches,
    made_slots,
    parts_of,
)
from weightsync.orchestrator.protocol.layout import Layout, Note, Region, Tensor, row
from weightsync.orchestrator.protocol.limits import MAX_UNREAD
from weightsync.orchestrator.protocol.text import clean

__all__ = [
    "ExpertParallel",
    "ExpertSlot",
    "GatheredSlot",
    "LayoutEntry",
    "ShardedSlot",
    "Slot",
    "SlotNote",
    "SlotOptions",
    "TrainerSlots",
]

log = logging.getLogger(__name__)

ARENA_REGION: Final = 0
STAGING_REGION: Final = 1

Allocate = Callable[[int], torch.Tensor]
"""Bytes → a one-dimensional contiguous uint8 tensor of that size, aligned to ALIGNMENT, that may be registered."""


def nobody(offset: int) -> None:
    """Who asks how far the slots are filled, where nobody does."""


class FilledSlots(Protocol):
    """What is sent from, however it was filled. ``arenas``: one for each region of ``layout``, in their order."""

    @property
    def slots(self) -> Sequence[Slot]:
        """In the layout's order."""
        ...

    @property
    def layout(self) -> Layout:
        """For Announce."""
        ...

    @property
    def arenas(self) -> Sequence[torch.Tensor]:
        """Of uint8, in the regions' order."""
        ...

    def entries(self) -> Iterator[LayoutEntry]:
        """The rows of the layout, in its order."""
        ...

    def nonfinite(self, finite: Spans = NOWHERE) -> tuple[NonFinite, ...]:
        """Tensors with values that are NaN or infinite, as converted; ``finite``: memory that is known to hold none."""
        ...


class TrainerSlots:
    """The slots of this rank, their memory and their layout.

    Args:
        state: the trainer's tensors now. Values are not read, only shapes, dtypes and sharding.
        table: of the model; its form is recognised from the state's names unless given.
        options: see SlotOptions.
        rank: this rank, as device meshes number it; None: torch.distributed's, or 0 without it.
        world: number of ranks; None likewise.
        allocate: makes the arena and the staging region; None: memory that may be registered, on the tensors' device.

    Attributes:
        layout: for Announce. Region 0 is the arena, region 1 (if any) the staging region.
        arenas: uint8 tensors, one per region, in the regions' order.
        slots: in the table's order.
        read: names of the state that the table reads, in its order.
        unrouted: names of the state that no specification reads.
        primary: whether this rank's replica holds slots (always, unless ``hsdp`` is ``primary``).

    Raises:
        MissingTensor: the table reads a tensor that the state lacks.
        UnfitTensor: one that the table reads can be no weight as it is. (Tensors on meta are accepted with an
            ``allocate`` of the caller's, for plans without values; ``check`` refuses them.)
        NoRoomForSlots: there is no memory for them.
        TrainerError: of other kinds, see ``Router.route`` and ``local_share``.
    """

    def __init__(
        self,
        state: State,
        table: ConversionTable,
        *,
        options: SlotOptions | None = None,
        rank: int | None = None,
        world: int | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        options = options or SlotOptions()
        self.rank, self.world = _own_place(rank, world)
        specs = tuple(_held_specs(table.for_keys(state.keys()), state.keys(), options))
        refuse_doubles(specs)
        self.read = tuple(dict.fromkeys(source.key for spec in specs for source in spec.sources))
        unchanged = _unchanged(specs)
        shares = {key: _share(key, state, unchanged[key], values=allocate is None) for key in self.read}
        self.primary = options.hsdp == "shared" or _in_first_replica(shares.values(), options.replicate_dim)
        self.unrouted = tuple(sorted(set(state) - set(shares)))
        router, plan = Router(options, self.rank, self.primary), ArenaPlan()
        self.slots = made_slots([(s, router.route(s, shares)) for s in specs], shares, plan)
        # At least one unit, also on ranks that hold nothing: region 0 is the arena everywhere.
        device = _device([state[key] for key in shares], options)
        ring = ring_bytes(options.staging_bytes, device, plan.size) if self.primary else 0
        staging = [ring] if ring else []
        self.arenas = _allocated([max(plan.size, ALIGNMENT), *staging], device, allocate)
        _refuse_elsewhere(specs, state, self.arenas[ARENA_REGION].device)
        for slot in self.slots:
            slot.bind(self.arenas[ARENA_REGION])
        region = STAGING_REGION if staging else -1
        placed = [(slot, ARENA_REGION) for slot in self.slots]
        self.layout = layout_of(placed, [region_of(memory) for memory in self.arenas], region, self.unrouted)
        self._finite = FiniteCheck(self.slots, self.arenas[ARENA_REGION], ARENA_REGION)
        self._readings = Readings(state, (Read(s.key, spec.dst, shares[s.key]) for spec in specs for s in spec.sources))
        first = self._readings.first(state)
        self._gathering = Gathering([s for s in self.slots if s.kind == "gathered"], self._readings, first)
        self._prepare(first)
        self._warm_up()

    def check(self, state: State) -> Taken:
        """What ``fill`` is to convert: whatever is wrong with this rank's tensors is found without any other rank.

        Ranks that agree on its outcome before they convert never leave one another waiting in a collective.

        Raises:
            MissingTensor: the state lacks a tensor.
            UnfitTensor: a tensor can be no weight as it is now.
            ChangedTensor: a tensor's dtype, shape or sharding is not the one that its slot was made for.
        """
        return self._readings.take(state)

    def fill(self, taken: Taken, reached: Callable[[int], object] = nobody) -> None:
        """Write the weights that were taken into all slots, on the caller's thread and stream, waiting for no device.

        Collective: all ranks of the tensors' meshes call it together. No slot may have a write in flight. Allocates
        nothing but merged weights, a few at a time: buffers and tables were made with the slots.

        Args:
            reached: called as the arena is filled: with the offset, in bytes, below which all of it will be.
        """
        taken.gather()
        if taken.merged.keys() != self._merged:
            self._prepare(taken)  # adapters have come or gone, and merged weights have a dtype of their own
        self._gathering.convert(taken)
        for end, batches in self._parts:
            for batch in batches:
                batch.convert(taken)
            reached(end)

    def convert(self, state: State) -> None:
        """``check``, then ``fill``.

        Raises:
            MissingTensor, UnfitTensor, ChangedTensor: as ``check``, before anything is written.
        """
        self.fill(self.check(state))

    def nonfinite(self, finite: Spans = NOWHERE) -> tuple[NonFinite, ...]:
        """Tensors of this rank's slots with values that are NaN or infinite, as converted. Waits for the device."""
        return self._finite.find(finite)

    def _prepare(self, taken: Taken) -> None:
        self._merged = frozenset(taken.merged)
        parts = parts_of(self.slots, self.arenas[ARENA_REGION].numel())
        self._parts = [(end, list(local_batches(own, self._readings, taken))) for end, own in parts]

    def _warm_up(self) -> None:
        """Compile the kernels of every treatment here, so that the first publish does not."""
        dtypes: dict[QuantizationSpec, set[torch.dtype]] = defaultdict(set)
        for slot in self.slots:
            dtypes[slot.spec.quantization] |= slot.source_dtypes
        for treatment, found in dtypes.items():
            treatment.warm_up(self.arenas[ARENA_REGION].device, found)

    def entries(self) -> Iterator[LayoutEntry]:
        """The rows of the layout, in its order."""
        for slot in self.slots:
            yield from slot.entries

    def explain(self) -> tuple[SlotNote, ...]:
        """What each slot is and why, in the table's order."""
        return tuple(slot.explain() for slot in self.slots)


def _unchanged(specs: Iterable[ConversionSpec]) -> dict[str, frozenset[torch.dtype]]:
    """Of each source, the dtypes that all of its specifications pass on as they are."""
    found: dict[str, frozenset[torch.dtype]] = {}
    for spec in specs:
        for source in spec.sources:
            own = spec.quantization.unchanged
            found[source.key] = found.get(source.key, own) & own
    return found


def _share(key: str, state: State, unchanged: Collection[torch.dtype], *, values: bool) -> LocalShare:
    tensor = state[key]
    refuse_unfit(key, tensor, values=values, as_they_are=unchanged)
    share = local_share(key, tensor)
    merged = isinstance(state, MergedState) and state.is_merged(key)
    return replace(share, dtype=torch.float32) if merged else share


def holds_slots(state: State, options: SlotOptions) -> bool:
    """Whether this rank's replica holds slots (always, unless ``hsdp`` is ``primary``); ``TrainerSlots.primary``."""
    if options.hsdp == "shared":
        return True
    tensors = ((name, value) for name, value in state.items() if isinstance(value, torch.Tensor))  # else extra state
    return _in_first_replica([local_share(name, tensor) for name, tensor in tensors], options.replicate_dim)


def _own_place(rank: int | None, world: int | None) -> tuple[int, int]:
    """This rank and the number of ranks: as given, else torch.distributed's, else alone."""
    distributed = dist.is_available() and dist.is_initialized()
    if rank is None:
        rank = dist.get_rank() if distributed else 0
    if world is None:
        world = dist.get_world_size() if distributed else 1
    return rank, world


def layout_of(
    placed: Sequence[tuple[Slot, int]], regions: Sequence[Region], staging: int, unrouted: Sequence[str] = ()
) -> Layout:
    """The layout of slots, each bound to the memory of the region beside it; also numbers the slots' rows."""
    tensors: dict[Tensor, int] = {}
    rows: list[list[int]] = []
    for slot, region in placed:
        first = len(rows)
        for entry in slot.entries:
            number = tensors.setdefault(entry.tensor, len(tensors))
            rows.append(row(number, region, entry.offset, entry.box.offset, entry.box.extent, entry.stride))
        slot.rows = range(first, len(rows))
    matrix = np.array(rows, dtype="<i8")
    notes, unread = tuple(_notes([slot for slot, _ in placed])), tuple(unrouted[:MAX_UNREAD])
    return Layout(tuple(tensors), tuple(regions), matrix.tobytes(), staging, notes=notes, unread=unread)


def _notes(slots: Sequence[Slot]) -> Iterator[Note]:
    """Kind and reason of all rows, neighbours of one kind and reason together."""
    # Neighbours only, because a note names a range of rows; slots without rows on this rank would break ranges up.
    owning = (slot for slot in slots if slot.rows)
    for (kind, reason), alike in groupby(owning, key=lambda slot: (slot.kind, slot.route.reason)):
        rows = [slot.rows for slot in alike]
        yield Note(rows[0].start, rows[-1].stop, kind, clean(reason))


def _held_specs(table: ConversionTable, keys: Collection[str], options: SlotOptions) -> Iterator[ConversionSpec]:
    """The specifications that this rank takes part in.

    Raises:
        MissingTensor: a tensor is lacking that the rank's place in the pipeline or among the experts does not excuse.
    """
    # A stage may lack a layer or a tensor outside the layers, but not one source of what it has.
    for spec in table.non_layer_specs():
        if not options.pipeline or any(source.key in keys for source in spec.sources):
            yield _complete(spec, keys)
    for layer_idx in range(table.layers):
        specs = tuple(table.conversion_specs(layer_idx))
        if options.pipeline and not any(source.key in keys for s in specs for source in s.sources):
            continue
        # Experts of other ranks may be absent here; whatever else is missing is an error by name.
        foreign = _foreign_experts(specs, keys, options.expert_parallel)
        yield from (_complete(s, keys) for s in specs if s.expert_id is None or s.expert_id not in foreign)


def _complete(spec: ConversionSpec, keys: Collection[str]) -> ConversionSpec:
    for source in spec.sources:
        if source.key not in keys:
            raise MissingTensor(source.key, spec.dst, hint(source.key, keys))
    return spec


def _foreign_experts(
    specs: Sequence[ConversionSpec], keys: Collection[str], parallel: ExpertParallel | None
) -> frozenset[int]:
    """Experts of a layer that other ranks have, where each expert has tensors of its own.

    Raises:
        ExpertPartitionError: the present ones times the expert parallelism are not all of them.
    """
    every = {s.expert_id for s in specs if s.expert_id is not None}
    if parallel is None or not every:
        return frozenset()
    present = {s.expert_id for s in specs if s.expert_id is not None and s.sources[0].key in keys}
    if len(present) not in (len(every), len(every) // parallel.size) or len(every) % parallel.size:
        raise ExpertPartitionError(
            f"layer {specs[0].layer}: {len(present)} local experts × {parallel.size} ({parallel.name}) ="
            f" {len(present) * parallel.size}, but the model has {len(every)}"
        )
    return frozenset(every - present)


def _in_first_replica(shares: Collection[LocalShare], replicate_dim: str) -> bool:
    # Experts may lie on another mesh than the rest; a rank must be in the first replica of each.
    grids = [h.grid for h in shares if h.grid is not None and replicate_dim in h.grid.names]
    return all(grid.coordinate[grid.names.index(replicate_dim)] == 0 for grid in grids)


def _device(sources: Iterable[torch.Tensor], options: SlotOptions) -> torch.device:
    """Where the arenas lie: where most elements of the sources are, unless the options say otherwise."""
    elements: Counter[torch.device] = Counter()
    for tensor in sources:
        elements[tensor.device] += tensor.numel()
    host = torch.device("cpu")
    return host if options.slots_on == "cpu" else max(elements, key=elements.__getitem__, default=host)


def _refuse_elsewhere(specs: Iterable[ConversionSpec], state: State, device: torch.device) -> None:
    """That whatever is quantised lies on ``device``: a cast copies across devices, a quantisation does not.

    Raises:
        UnfitTensor: by the source's name.
    """
    for key in (source.key for spec in specs if spec.quantization.quantizes for source in spec.sources):
        if state[key].device != device:
            raise UnfitTensor(key, f"is on {state[key].device}, its slot on {device}: it is quantised where it is")


def _allocated(sizes: Sequence[int], device: torch.device, allocate: Allocate | None) -> list[torch.Tensor]:
    """The arenas; what they cost is logged before anything is allocated.

    Raises:
        NoRoomForSlots: with the cost, and what else could be done.
    """
    cost = " and ".join(f"{size / 2**30:.2f} GiB" for size in sizes)
    cost += f" on {device} (a wire copy of this rank's share{', and staging' if len(sizes) > 1 else ''})"
    log.info("slots need %s", cost)
    make = allocate or partial(arena, device=device)
    try:
        return [make(size) for size in sizes]
    except (MemoryPlacementError, MemoryError, torch.OutOfMemoryError) as error:
        advice = "" if device.type == "cpu" else "; SlotOptions(slots_on='cpu') takes host memory"
        raise NoRoomForSlots(f"slots need {cost}, and there is no room{advice}: {error}") from error
