"""The transfers into one engine: planned on top of what earlier engines load, and kept as they are when others come."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from weightsync.orchestrator.planner.arrays import (
    Flags,
    Ids,
    Ints,
    boundaries,
    compress,
    count_runs,
    dense_strides,
    stable_order,
)
from weightsync.orchestrator.planner.catalogue import Catalogue
from weightsync.orchestrator.planner.choose import choose
from weightsync.orchestrator.planner.coalesce import load_cargo, shadow
from weightsync.orchestrator.planner.decode import Decoded, FormTable
from weightsync.orchestrator.planner.inputs import CostModel, Party
from weightsync.orchestrator.planner.match import Cells, Pieces, Wanted, match
from weightsync.orchestrator.planner.names import NO_LAYER
from weightsync.orchestrator.protocol.landing import PIECE_ALIGNMENT, Berth
from weightsync.orchestrator.protocol.limits import MAX_RANK

MAX_GROUPS: Final = 64
"""Pipelining groups of a plan: enough to overlap, few enough that a group's packed run is worth a descriptor."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Distinct transfers up to their place: ``box [m, 2 * MAX_RANK]`` (offset, extent per dimension, in elements),
    ``stride [m, MAX_RANK]`` at the target in bytes, and ``dense`` those of the box packed row by row; ``bytes``, and
    descriptors if it is not packed: ``runs`` to its row, ``source_runs`` to the landing ``[m]``."""

    box: Ints
    stride: Ints
    dense: Ints
    bytes: Ints
    runs: Ints
    source_runs: Ints


@dataclass(frozen=True, slots=True)
class EnginePart:
    """Transfers into the ranks of one engine in columns ``[n]``, sorted by source, target, group, place.

    ``source`` and ``target`` index the plan's sources and this engine's ``targets``, ``source_row`` and ``target_row``
    the rows of their layouts, ``tensor`` the decoder's names, ``shape`` the ``shapes``. ``region`` and ``offset``
    (bytes) are the place at the target. ``place`` is that in the edge's cargo (see ``coalesce``), -1 for what goes
    straight to its row; ``packed`` is gathered by the sender first, and what is not has ``runs`` descriptors.
    ``merged``: the transfer continues the one before in both memories, so they share a descriptor. ``berths`` are those
    of the ``edges()``. ``load [sources]`` is the bytes that this engine adds to each source.
    """

    targets: tuple[Decoded, ...]
    shapes: Shapes
    source: Ids
    target: Ids
    tensor: Ids
    group: Ids
    source_row: Ids
    target_row: Ids
    region: Ids
    offset: Ints
    shape: Ids
    place: Ints
    packed: Flags
    runs: Ids
    merged: Flags
    berths: tuple[Berth | None, ...]
    load: Ints

    @property
    def name(self) -> str:
        """Name of the engine whose ranks these are."""
        return self.targets[0].party.member.engine

    def of_source(self, sources: int) -> Ints:
        """First transfer of each of the plan's ``sources``, and the number of transfers as the last entry."""
        return np.searchsorted(self.source, np.arange(sources + 1, dtype=np.int32))

    def edges(self) -> Ints:
        """First transfer of each (source, target), and the number of transfers as the last entry."""
        return boundaries(self.source.astype(np.int64) * max(1, len(self.targets)) + self.target)

    def descriptors(self) -> Ints:
        """Of each transfer: its own, 0 where it shares another's, and all packed chunks of an edge at its first packed
        one. Where a berth is gone through again, what goes straight may be cut at each of its chunks besides."""
        # ``merged`` is a flag, and only set where a transfer is one run: the difference is that run or nothing.
        own = np.where(self.packed, 0, self.runs - self.merged).astype(np.int64)
        edges = self.edges()
        if self.packed.any():
            edge = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
            at = np.flatnonzero(self.packed)
            first = boundaries(edge[at])[:-1]
            begins = np.minimum.reduceat(self.place[at], first)
            ends = np.maximum.reduceat(self.place[at] + self.shapes.bytes[self.shape[at]], first)
            chunks = np.array([1 if berth is None else berth.chunk_bytes for berth in self.berths], np.int64)
            chunk = chunks[edge[at[first]]]
            own[at[first]] = -(-ends // chunk) - begins // chunk
        return own


def plan_engine(catalogue: Catalogue, targets: tuple[Party, ...], cost: CostModel, load: Ints) -> EnginePart:
    """Plan the transfers into ``targets``, the ranks of one engine.

    Args:
        catalogue: what the sources hold.
        targets: the ranks.
        cost: decides what is packed.
        load: bytes that each source sends to other engines ``[sources]``; not changed.

    Raises:
        PlanError: see ``decode``, ``match`` and ``coalesce``.
    """
    load_before = load
    load = load.copy()
    decoded = tuple(catalogue.decoder.decode(party) for party in targets)
    wanted = _in_memory_order(decoded, catalogue.decoder.form_table())
    pieces, cells = match(catalogue, targets, wanted)
    held_row = choose(catalogue, pieces.shard, cells.bytes[pieces.cell], load)
    order, edge_group = _order(catalogue, targets, wanted, pieces, held_row)
    pieces = Pieces(pieces.row[order], pieces.shard[order], pieces.cell[order])
    held_row = held_row[order]

    shapes, shape, source_shift, target_shift = _shapes(catalogue, cells, pieces.cell, held_row)
    source = catalogue.held.source[held_row]
    target = wanted.target[pieces.row]
    offset = wanted.offset[pieces.row] + target_shift[shape]
    region = wanted.region[pieces.row]
    size = shapes.bytes[shape]
    runs = np.where(shadow(decoded)[target], shapes.source_runs[shape], shapes.runs[shape])
    edge = source.astype(np.int64) * len(targets) + target
    # A transfer joins the one before where both are single runs of one edge and group and adjoin in both memories.
    # Cargo adjoins wherever no padding comes between.
    there = np.where(shadow(decoded)[target[1:]], size[:-1] % PIECE_ALIGNMENT == 0, _adjoins(region, offset, size))
    joins = np.zeros(len(size), np.bool_)
    joins[1:] = (
        (runs[1:] == 1) & (runs[:-1] == 1) & (edge_group[1:] == edge_group[:-1]) & there
        & _adjoins(catalogue.held.region[held_row], catalogue.held.offset[held_row] + source_shift[shape], size)
    )  # fmt: skip
    cargo = load_cargo(edge, source, target, size, runs, joins, cost, catalogue.sources, decoded)
    group = edge_group % MAX_GROUPS
    return EnginePart(
        decoded, shapes, source, target, wanted.tensor[pieces.row],
        group.astype(np.int32),
        catalogue.held.index[held_row], wanted.index[pieces.row], region, offset, shape.astype(np.int32),
        cargo.place, cargo.packed, runs.astype(np.int32), joins & ~cargo.packed, cargo.berths, load - load_before,
    )  # fmt: skip


def groups(catalogue: Catalogue) -> Ids:
    """Pipelining group of each tensor: its layer, several layers where there are many; what has no layer comes last.

    Only the sources' tensors decide the number of layers, so that a joining engine moves no group.
    """
    layers = catalogue.decoder.names.layers()
    count = int(layers[: len(catalogue.pattern)].max(initial=0)) + 1
    group = layers.astype(np.int64)
    if count >= MAX_GROUPS:
        group = np.minimum(group, count - 1) * (MAX_GROUPS - 1) // count
    return np.where(layers == NO_LAYER, min(count, MAX_GROUPS - 1), group).astype(np.int32)


def _in_memory_order(targets: Sequence[Decoded], forms: FormTable) -> Wanted:
    """The rows of all targets, each target's by place in memory, so that neighbours can share descriptors."""
    parts = []
    for number, target in enumerate(targets):
        rows = target.rows
        order = np.lexsort((rows.offset, rows.region)).astype(np.int32)
        order = order[forms.elements[rows.form[order]] > 0]
        at = np.full(len(order), number, np.int32)
        parts.append((at, order, rows.tensor[order], rows.form[order], rows.region[order], rows.offset[order]))
    return Wanted(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _order(
    catalogue: Catalogue, targets: tuple[Party, ...], wanted: Wanted, pieces: Pieces, held_row: Ints
) -> tuple[Ints, Ints]:
    """The order by source, target, group, and the sorted key whose remainder by MAX_GROUPS is the group."""
    edge = catalogue.held.source[held_row].astype(np.int64) * len(targets) + wanted.target[pieces.row]
    # One integer per piece, so that one radix sort orders by all three; it is stable, which keeps the place in memory.
    key = edge * MAX_GROUPS + groups(catalogue)[wanted.tensor[pieces.row]]
    order = stable_order(key, len(catalogue.sources) * len(targets) * MAX_GROUPS)
    return order, key[order]


def _shapes(catalogue: Catalogue, cells: Cells, cell: Ints, held_row: Ints) -> tuple[Shapes, Ints, Ints, Ints]:
    """The distinct pairs of a cell and a source's form, in which all geometry of a transfer lies.

    Returns:
        The ``m`` shapes; the shape of each piece ``[n]``; and, per shape ``[m]``, how many bytes the cell's corner lies
        behind the beginning of the source's row and of the target's row.
    """
    forms = catalogue.decoder.form_table()
    key = cell * len(forms) + catalogue.held.form[held_row]
    distinct, shape = compress(key, len(cells.bytes) * len(forms) + 1)
    of_cell, of_source = distinct // max(1, len(forms)), distinct % max(1, len(forms))
    of_target = cells.form[of_cell]
    offset, extent = cells.offset[of_cell], cells.extent[of_cell]
    source_shift = ((offset - forms.offset[of_source]) * forms.stride[of_source]).sum(axis=1)
    target_shift = ((offset - forms.offset[of_target]) * forms.stride[of_target]).sum(axis=1)
    item = forms.itemsize[of_target]
    runs = count_runs(extent, item, forms.stride[of_source], forms.stride[of_target])
    dense = dense_strides(extent, item)
    source_runs = count_runs(extent, item, forms.stride[of_source], dense)
    box = np.stack([offset, extent], axis=2).reshape(-1, 2 * MAX_RANK)
    shapes = Shapes(box, forms.stride[of_target], dense, cells.bytes[of_cell], runs, source_runs)
    return shapes, shape, source_shift, target_shift


def _adjoins(region: Ids, offset: Ints, size: Ints) -> Flags:
    """Whether each piece but the first begins where the one before ends."""
    return np.asarray((region[1:] == region[:-1]) & (offset[1:] == offset[:-1] + size[:-1]))
