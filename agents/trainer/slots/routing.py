"""Sharded, Gathered or Expert, and why: decided alike on every rank from global shapes and the mesh alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from weightsync.agents.tables.box import Box, with_entry
from weightsync.agents.trainer.errors import ConversionTableError, ExpertPartitionError, OffGridError
from weightsync.agents.trainer.slots.boxes import HeldBox, LocalShare
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.orchestrator.protocol.landing import usual_ring

Kind = Literal["sharded", "gathered", "expert"]

MIN_SHARDED_BYTES: Final = 2 * 1024 * 1024
"""Tensors below go out whole from one rank if their shares are small, too."""

MIN_SHARE_BYTES: Final = 64 * 1024
"""Shares below are small: each has rows in every table and a part of a kernel's launch. To pack larger ones costs less
than to gather them: experts of 1.6 MB that two ranks held took 150 ms for 16 GB a rank, the longest part of a publish.
"""


def ring_bytes(asked: int | None, device: torch.device, slots: int) -> int:
    """Bytes of the ring that is packed in on ``device``: those that were ``asked`` for, or the usual ones, and then no
    more than the ``slots`` themselves have."""
    if asked is not None:
        return asked
    return usual_ring(slots, on_device=device.type == "cuda")


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """Expert parallelism that the tensors' own meshes do not show: this rank's place on an axis of ``size`` ranks."""

    size: int
    rank: int
    name: str = "ep"


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """How slots are chosen.

    ``hsdp``: whether only the first replica holds slots, or all do; ``replicate_dim`` names the mesh dimension.
    ``tensor_parallel_dims``: mesh dimensions whose slices must lie on the quantisation grid.
    ``staging_bytes``: of the ring that is packed in before it leaves, 0 for none; None: see ``ring_bytes``.
    ``pipeline``: a rank may lack whole layers and tensors outside the layers.
    ``replicas``: whether ranks that hold the same boxes compare what they hold before each version; that reads it once.
    ``slots_on``: ``device``, where most of the rank's sources are, or ``cpu``, host memory, pinned where there is CUDA.
    Blocks are quantised where their source is, so FP8 slots of sources on a GPU cannot lie on the host.
    """

    min_sharded_bytes: int = MIN_SHARDED_BYTES
    min_share_bytes: int = MIN_SHARE_BYTES
    staging_bytes: int | None = None
    hsdp: Literal["primary", "shared"] = "shared"
    replicate_dim: str = "dp_replicate"
    tensor_parallel_dims: tuple[str, ...] = ("tp",)
    expert_parallel: ExpertParallel | None = None
    pipeline: bool = False
    replicas: Literal["compare", "trust"] = "compare"
    slots_on: Literal["device", "cpu"] = "device"

    def __post_init__(self) -> None:
        if self.slots_on not in ("device", "cpu"):
            raise ValueError(f"slots_on={self.slots_on!r}; it is 'device' or 'cpu'")
        if self.replicas not in ("compare", "trust"):
            raise ValueError(f"replicas={self.replicas!r}; it is 'compare' or 'trust'")


@dataclass(frozen=True, slots=True)
class SlotPiece:
    """One box of the logical tensor (with the global expert id as its first dimension, if stacked) and where the
    source numbered ``source`` has it: an index of this rank's local tensor, or of the whole one when gathered."""

    source: int
    index: tuple[slice, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class Route:
    """What becomes of one specification. ``shape``: of the logical tensor, stacked ones with all experts first.
    ``pieces``: what this rank keeps in a slot. ``reason`` is a sentence for ``plan explain``. ``offsets``: where each
    source's part begins along the specification's ``cat_dim``. ``owner``: the rank that keeps a gathered tensor, as
    device meshes number it; -1 for other kinds."""

    kind: Kind
    reason: str
    shape: tuple[int, ...]
    pieces: tuple[SlotPiece, ...]
    first_replica: bool
    offsets: tuple[int, ...] = ()
    owner: int = -1


@dataclass(slots=True)
class Turns:
    """Whose turn it is to own the next gathered tensor, per group of candidate ranks."""

    taken: dict[tuple[int, ...], int] = field(default_factory=dict)

    def next_owner(self, candidates: tuple[int, ...]) -> int:
        """The next of ``candidates``, round robin."""
        turn = self.taken.get(candidates, 0)
        self.taken[candidates] = turn + 1
        return candidates[turn % len(candidates)]


class Router:
    """Chooses the route of each specification. All ranks call ``route`` in the same order.

    Args:
        options: see SlotOptions.
        rank: this rank, as device meshes number it.
        primary: whether this rank's replica holds slots.
    """

    def __init__(self, options: SlotOptions, rank: int, primary: bool) -> None:
        self._options = options
        self._rank = rank
        self._primary = primary
        self._turns = Turns()

    def route(self, spec: ConversionSpec, shares: Mapping[str, LocalShare]) -> Route:
        """The route of ``spec``.

        Raises:
            ConversionTableError: sources whose shapes do not fit each other or the specification.
            ExpertPartitionError: stacked experts that do not add up to the model's.
            OffGridError: a tensor-parallel slice that cuts a quantisation block.
        """
        held = [shares[source.key] for source in spec.sources]
        shape, offsets, first_expert = self._geometry(spec, held)
        self._check_grid(spec, held)
        # Every rank comes to the same answer, from global shapes and the mesh: the turns of owners depend on it.
        obstacle = self._obstacle(spec, held, shape, offsets)
        if obstacle:
            return self._gathered(spec, held, shape, tuple(offsets), obstacle)
        pieces = tuple(_local_pieces(spec, held, offsets, first_expert)) if self._primary else ()
        first = all(h.first_replica for h in held)
        if spec.experts:
            ids = sorted({p.box.offset[0] for p in pieces} | {p.box.end[0] - 1 for p in pieces})
            return Route("expert", f"routed by global expert id ({_span(ids)} here)", shape, pieces, first)
        if all(h.grid is None for h in held):
            return Route("sharded", "a plain tensor, held whole", shape, pieces, first)
        return Route("sharded", "each rank's share stands alone", shape, pieces, first)

    # ------------------------------------------------------------------------------------------------- geometry
    def _geometry(self, spec: ConversionSpec, held: Sequence[LocalShare]) -> tuple[tuple[int, ...], list[int], int]:
        """Logical shape, offset of each source's part along ``cat_dim``, and the first expert of the sources."""
        stacked = int(spec.experts > 0)
        parts = [_part_shape(source, h, stacked, spec.dst) for source, h in zip(spec.sources, held, strict=True)]
        if parts == [()]:
            return (), [0], 0  # a scalar has no dimension to be joined along
        cat = spec.cat_dim + stacked
        if any(len(p) != len(parts[0]) or cat >= len(p) for p in parts) or any(
            p[:cat] + p[cat + 1 :] != parts[0][:cat] + parts[0][cat + 1 :] for p in parts
        ):
            raise ConversionTableError(
                f"{spec.dst!r}: sources of shapes {parts} cannot be joined along dimension {spec.cat_dim}"
            )
        if spec.quantization.quantizes and len(parts[0]) - stacked != 2:
            raise ConversionTableError(f"{spec.dst!r}: blocks are of matrices; its shape is {parts[0]}")
        ends = [sum(p[cat] for p in parts[: i + 1]) for i in range(len(parts))]
        offsets = [end - part[cat] for end, part in zip(ends, parts, strict=True)]
        shape = with_entry(parts[0], cat, ends[-1])
        if not stacked:
            return shape, offsets, 0
        # The trainer's tensor may stack this rank's experts only; the logical shape has all of the model.
        return (spec.experts, *shape[1:]), offsets, self._first_expert(spec, held[0])

    def _first_expert(self, spec: ConversionSpec, held: LocalShare) -> int:
        own = held.shape[0]
        if own == spec.experts:
            return 0  # the tensor's own mesh shows which of them are here
        parallel = self._options.expert_parallel
        if parallel is not None and own * parallel.size == spec.experts and 0 <= parallel.rank < parallel.size:
            return own * parallel.rank
        local, sharded = held.local_shape[0], math.prod(cut.parts for cut in held.cuts_of(0))
        ep, name = (parallel.size, parallel.name) if parallel else (1, "ep")
        raise ExpertPartitionError(
            f"{spec.sources[0].key!r}: {local} local experts × {sharded} (fsdp) × {ep} ({name}) ="
            f" {local * sharded * ep}, but the model has {spec.experts}; the tensor's mesh is {held.grid or 'none'},"
            f" its global shape {held.shape}. Declare the axis that its mesh lacks with SlotOptions.expert_parallel"
        )

    # ------------------------------------------------------------------------------------------------- the rule
    def _obstacle(
        self, spec: ConversionSpec, held: Sequence[LocalShare], shape: tuple[int, ...], offsets: Sequence[int]
    ) -> str:
        """Why the ranks' shares cannot stand alone; empty if they can."""
        meshed = any(h.grid is not None for h in held)
        for source, h in zip(spec.sources, held, strict=True):
            if not h.even:
                return f"{source.key} of shape {h.shape} is not divisible over {h.grid}"
        if spec.quantization.quantizes:
            for source, h, offset in zip(spec.sources, held, offsets, strict=True):
                for dim, block in enumerate(spec.quantization.block):
                    base = offset if dim == spec.cat_dim else 0
                    if base % block:
                        return f"{source.key} begins at {base} of dimension {dim}, inside a block of {block}"
                    cut = _first_off_grid(spec, source, h, dim, block, None)
                    if cut is not None:
                        return f"a shard of {source.key} ends at {cut} of dimension {dim}, inside a block of {block}"
        # Bytes on the wire, not of the masters.
        size = math.prod(shape) * spec.quantization.dtype.itemsize
        share = size * math.prod(held[0].local_shape) // max(1, math.prod(held[0].shape))
        most, least = self._options.min_sharded_bytes, self._options.min_share_bytes
        if meshed and not spec.experts and size < most and share < least:
            return f"{size} bytes are fewer than {most}, and {share} of a rank fewer than {least}"
        return ""

    def _check_grid(self, spec: ConversionSpec, held: Sequence[LocalShare]) -> None:
        if not spec.quantization.quantizes:
            return
        # Shares of FSDP that cut a block are gathered; a tensor-parallel slice that does is the configuration's error.
        for source, h in zip(spec.sources, held, strict=True):
            named = h.grid.names if h.grid else ()
            slicing = [i for i, name in enumerate(named) if name in self._options.tensor_parallel_dims]
            for dim, block in enumerate(spec.quantization.block):
                cut = _first_off_grid(spec, source, h, dim, block, slicing)
                if cut is not None:
                    raise OffGridError(
                        f"{source.key!r}: a tensor-parallel slice ends at {cut} of dimension {dim} (shape {h.shape},"
                        f" mesh {h.grid}), inside a quantisation block of {block}; {spec.dst!r} cannot be quantised"
                    )

    def _gathered(
        self,
        spec: ConversionSpec,
        held: Sequence[LocalShare],
        shape: tuple[int, ...],
        offsets: tuple[int, ...],
        reason: str,
    ) -> Route:
        # On every rank, also those that will not hold it: the ranks count turns without asking one another.
        owner = self._turns.next_owner(self._candidates(held))
        pieces: tuple[SlotPiece, ...] = ()
        if owner == self._rank and self._primary:
            box = Box.whole(shape)
            if spec.experts:
                first = self._first_expert(spec, held[0])
                box = Box((first,) + (0,) * (len(shape) - 1), (held[0].shape[0], *shape[1:]))
            pieces = (SlotPiece(0, tuple(slice(0, extent) for extent in box.extent), box),)
        return Route("gathered", f"{reason}; rank {owner} has it", shape, pieces, True, offsets, owner)

    def _candidates(self, held: Sequence[LocalShare]) -> tuple[int, ...]:
        grid = next((h.grid for h in held if h.grid is not None), None)
        if grid is None:
            return (self._rank,)  # a plain tensor is whole on every rank, and each sends its own
        replicas = [i for i, name in enumerate(grid.names) if name == self._options.replicate_dim]
        if self._options.hsdp == "primary":
            return grid.ranks_where(dict.fromkeys(replicas, 0))
        return grid.ranks


def _part_shape(source: Source, held: LocalShare, stacked: int, dst: str) -> tuple[int, ...]:
    """Shape of the cut of the whole tensor that ``source`` names."""
    if source.length is None:
        return held.shape
    dim = source.dim + stacked
    if dim >= len(held.shape) or source.start + source.length > held.shape[dim]:
        raise ConversionTableError(
            f"{dst!r}: {source.key!r} of shape {held.shape} has no {source.start}…+{source.length} along {source.dim}"
        )
    return with_entry(held.shape, dim, source.length)


def _first_off_grid(
    spec: ConversionSpec, source: Source, held: LocalShare, dim: int, block: int, mesh_dims: Sequence[int] | None
) -> int | None:
    """The first boundary of shares inside the source's part that lies inside a block, or None."""
    start = source.start if source.length is not None and source.dim == dim else 0
    length = source.length if source.length is not None and source.dim == dim else None
    stacked = int(spec.experts > 0)
    stop = held.shape[dim + stacked] if length is None else start + length
    inside = (cut - start for cut in held.boundaries(dim + stacked, mesh_dims) if start < cut < stop)
    return next((cut for cut in inside if cut % block), None)


def _local_pieces(
    spec: ConversionSpec, held: Sequence[LocalShare], offsets: Sequence[int], first_expert: int
) -> Iterator[SlotPiece]:
    stacked = int(spec.experts > 0)
    for number, (source, h, offset) in enumerate(zip(spec.sources, held, offsets, strict=True)):
        for held_box in h.boxes:
            cut = part_of(held_box, source, stacked)
            if cut is None:
                continue
            box = cut.box.shifted(spec.cat_dim + stacked, offset) if offset else cut.box
            yield SlotPiece(number, cut.local, box.shifted(0, first_expert) if stacked else box)


def part_of(held: HeldBox, source: Source, stacked: int) -> HeldBox | None:
    """The share of ``held`` in the source's part, in the part's coordinates; None where it has none."""
    if source.length is None:
        return held if held.box.volume else None
    dim = source.dim + stacked
    low = max(held.box.offset[dim], source.start)
    high = min(held.box.end[dim], source.start + source.length)
    if low >= high:
        return None
    start = with_entry(held.start, dim, held.start[dim] + low - held.box.offset[dim])
    extent = with_entry(held.box.extent, dim, high - low)
    offset = with_entry(held.box.offset, dim, low - source.start)
    return HeldBox(Box(offset, extent), start)


def _span(ids: Sequence[int]) -> str:
    return f"{ids[0]}–{ids[-1]}" if ids else "none"
