"""Who holds what: the sources' rows grouped into shards, and the shards of each tensor into patterns.

A *shard* is one distinct box of one tensor together with the sources that hold it. A *pattern* is the set of boxes in
which a tensor is held; the tensors of all layers share a few. Where boxes of a tensor overlap without being equal
(replicas that are sharded differently) its rows are first cut into boxes that do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from weightsync.orchestrator.planner.arrays import (
    Ids,
    Ints,
    boundaries,
    distinct_rows,
    expand,
    mix,
    stable_order,
    starts,
)
from weightsync.orchestrator.planner.decode import Decoded, Decoder, FormTable, Rows
from weightsync.orchestrator.planner.errors import TooComplex
from weightsync.orchestrator.planner.inputs import Party
from weightsync.orchestrator.protocol.limits import MAX_RANK

MAX_CELLS: Final = 65_536
"""Boxes that overlapping shards of one tensor may be cut into: 256 ranks against 250 others along one dimension give
under 512."""

PAIRS_AT_ONCE: Final = 1 << 20
"""Box pairs compared in one go: 32 MB per temporary."""


@dataclass(frozen=True, slots=True)
class Held:
    """Source rows in columns ``[n]``, sorted by shard, then source.

    ``source`` is the index of the party and ``index`` of the row in its layout; ``region`` and ``offset`` (bytes) are
    where the box begins, after a row was cut the piece's own.
    """

    source: Ids
    tensor: Ids
    form: Ids
    region: Ids
    offset: Ints
    index: Ids


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything that targets are matched against; it does not depend on them.

    ``shard_first [shards + 1]``: where the rows of each shard begin in ``held``. ``shard_holders [shards]``: which of
    ``holder_sets`` holds it; a set is the sources' indices in ascending order. ``tensor_first [tensors]``: the first
    shard of each tensor. ``pattern [tensors]``: -1 for a tensor that no source holds. ``pattern_first [patterns + 1]``:
    where the boxes of each pattern begin in ``box_offset`` and ``box_extent [m, MAX_RANK]`` (elements), in the order
    of the shards of every tensor with that pattern: shard ``tensor_first[t] + k`` has box ``pattern_first[p] + k``.
    """

    sources: tuple[Decoded, ...]
    decoder: Decoder
    held: Held
    shard_first: Ints
    shard_holders: Ids
    holder_sets: tuple[Ids, ...]
    tensor_first: Ints
    pattern: Ids
    pattern_first: Ints
    box_offset: Ints
    box_extent: Ints


def make_catalogue(sources: Sequence[Party]) -> Catalogue:
    """Index what ``sources`` (at least one) hold.

    Raises:
        LayoutError, ShapeMismatch, DtypeMismatch: a layout is wrong or two disagree.
        TooComplex: overlapping shards would be cut into more than MAX_CELLS boxes.
    """
    decoder = Decoder()
    decoded = tuple(decoder.decode(party) for party in sources)
    held = _concatenate(decoded, decoder.form_table())
    tensors = len(decoder.names)
    boxes, held_box = _boxes(decoder.form_table(), held.form)
    held, held_box, shard_first = _group(held, held_box, len(boxes))
    pattern, pattern_boxes = _patterns(held, held_box, shard_first, tensors)
    overlapping = [p for p, members in enumerate(pattern_boxes) if _overlap(boxes[members])]
    if overlapping:
        # Cut rows are rows like others, with smaller boxes: they are grouped anew, and nothing overlaps any more.
        cut = {p: _cells(boxes[pattern_boxes[p]]) for p in overlapping}
        held = _cut_rows(held, held_box, boxes, pattern, cut, decoder)
        boxes, held_box = _boxes(decoder.form_table(), held.form)
        held, held_box, shard_first = _group(held, held_box, len(boxes))
        pattern, pattern_boxes = _patterns(held, held_box, shard_first, tensors)
    holders, holder_sets = _holder_sets(held.source, shard_first)
    shard_tensor = held.tensor[shard_first[:-1]]
    members = np.concatenate([np.zeros(0, np.int64), *pattern_boxes])
    return Catalogue(
        decoded, decoder, held, shard_first, holders, holder_sets,
        np.searchsorted(shard_tensor, np.arange(tensors, dtype=np.int32)), pattern,
        starts(np.array([len(p) for p in pattern_boxes], np.int64)),
        boxes[members, :MAX_RANK], boxes[members, MAX_RANK:],
    )  # fmt: skip


def _concatenate(sources: Sequence[Decoded], forms: FormTable) -> Held:
    """All rows of all sources but those with empty boxes."""
    counts = [len(s.rows.tensor) for s in sources]
    source = np.repeat(np.arange(len(sources), dtype=np.int32), counts)
    index = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    columns = {f.name: np.concatenate([getattr(s.rows, f.name) for s in sources]) for f in fields(Rows)}
    held = Held(source, index=index, **columns)
    full = forms.elements[held.form] > 0
    return held if full.all() else _take(held, np.flatnonzero(full))


def _take(held: Held, rows: Ints) -> Held:
    return Held(*(getattr(held, f.name)[rows] for f in fields(Held)))


def _boxes(forms: FormTable, form: Ids) -> tuple[Ints, Ints]:
    """The distinct boxes ``[n, 2 * MAX_RANK]`` (offsets, then extents) of all forms, and the box of each row."""
    boxes, of_form = distinct_rows(np.concatenate([forms.offset, forms.extent], axis=1))
    return boxes, of_form[form]


def _group(held: Held, box: Ints, boxes: int) -> tuple[Held, Ints, Ints]:
    """Sort rows, which come by source, by (tensor, box, source); of a shard that a source has twice the first stays."""
    # Rows come by source and the sort is stable, so that (tensor, box) as one integer is all there is to sort by.
    shard_key = held.tensor.astype(np.int64) * max(boxes, 1) + box
    order = stable_order(shard_key, int(shard_key.max(initial=0)) + 1)
    key, source = shard_key[order], held.source[order]
    if len(order):
        again = np.concatenate([[False], (key[1:] == key[:-1]) & (source[1:] == source[:-1])])
        order, key = order[~again], key[~again]
    return _take(held, order), box[order], boundaries(key)


def _patterns(held: Held, box: Ints, shard_first: Ints, tensors: int) -> tuple[Ids, list[Ints]]:
    """The pattern of each tensor ``[tensors]``, and per pattern the boxes (indices) in the order of shards."""
    shard_tensor, shard_box = held.tensor[shard_first[:-1]], box[shard_first[:-1]]
    first = boundaries(shard_tensor)
    counts = np.diff(first)
    pattern = np.full(tensors, -1, np.int32)
    found: list[Ints] = []
    # Tensors with equally many shards make a rectangle ``[tensors, count]`` of boxes, whose distinct rows are patterns.
    for count in np.unique(counts).tolist():
        of_count = np.flatnonzero(counts == count)
        members, index = distinct_rows(shard_box[first[of_count][:, None] + np.arange(count)])
        pattern[shard_tensor[first[of_count]]] = index + len(found)
        found.extend(members)
    return pattern, found


def _overlap(boxes: Ints) -> bool:
    """Whether any two of ``boxes [n, 2 * MAX_RANK]`` share an element."""
    low, high = boxes[:, :MAX_RANK], boxes[:, :MAX_RANK] + boxes[:, MAX_RANK:]
    step = max(1, PAIRS_AT_ONCE // max(1, len(boxes)))
    for at in range(0, len(boxes), step):
        here = slice(at, at + step)
        common = np.ones((len(low[here]), len(boxes)), np.bool_)
        for dim in range(MAX_RANK):
            common &= (low[here, dim, None] < high[None, :, dim]) & (low[None, :, dim] < high[here, dim, None])
        # Every box meets itself; one meeting more means that two overlap.
        if np.count_nonzero(common) > len(common):
            return True
    return False


def _cells(boxes: Ints) -> Ints:
    """The cells of the grid spanned by all faces of ``boxes``: any box is a union of cells.

    Both are ``[n, 2 * MAX_RANK]``: offsets, then extents.
    """
    edges = [np.unique(np.concatenate([boxes[:, d], boxes[:, d] + boxes[:, MAX_RANK + d]])) for d in range(MAX_RANK)]
    size = int(np.prod([max(1, len(e) - 1) for e in edges]))
    if size > MAX_CELLS:
        raise TooComplex(f"{len(boxes)} overlapping shards of one tensor would make {size} boxes; limit {MAX_CELLS}")
    grid = np.meshgrid(*(np.arange(len(e) - 1) for e in edges), indexing="ij")
    low = np.stack([e[g.ravel()] for e, g in zip(edges, grid, strict=True)], axis=1)
    high = np.stack([e[g.ravel() + 1] for e, g in zip(edges, grid, strict=True)], axis=1)
    return np.concatenate([low, high - low], axis=1)


def _cut_rows(held: Held, box: Ints, boxes: Ints, pattern: Ids, cut: dict[int, Ints], decoder: Decoder) -> Held:
    """Replace each row of an overlapping pattern by one row per cell inside its box.

    ``box`` is the box of each row of ``held``, as an index into ``boxes``; ``cut`` the cells of each pattern that
    overlaps. New boxes are new forms, which ``decoder`` numbers.
    """
    pieces: list[tuple[Ints, Ints]] = []
    row_pattern = pattern[held.tensor]
    kept = np.flatnonzero(~np.isin(row_pattern, list(cut)))
    pieces.append((kept, boxes[box[kept]]))
    for number, cells in cut.items():
        for of_box in np.unique(box[row_pattern == number]).tolist():
            rows = np.flatnonzero((row_pattern == number) & (box == of_box))
            outer = boxes[of_box]
            inside = (cells[:, :MAX_RANK] >= outer[:MAX_RANK]) & (
                cells[:, :MAX_RANK] + cells[:, MAX_RANK:] <= outer[:MAX_RANK] + outer[MAX_RANK:]
            )
            mine = cells[inside.all(axis=1)]
            owner, ordinal = expand(np.full(len(rows), len(mine)))
            pieces.append((rows[owner], mine[ordinal]))
    rows = np.concatenate([p[0] for p in pieces])
    cells = np.concatenate([p[1] for p in pieces])
    # By source, and by old row within it: ``_group`` relies on rows that come by source.
    order = np.lexsort((rows, held.source[rows]))
    rows, cells = rows[order], cells[order]
    forms = decoder.form_table()
    old = held.form[rows]
    keys = np.empty((len(rows), 1 + 3 * MAX_RANK), np.int64)
    keys[:, 0] = forms.kind[old]
    keys[:, 1::3], keys[:, 2::3], keys[:, 3::3] = cells[:, :MAX_RANK], cells[:, MAX_RANK:], forms.stride[old]
    distinct, index = distinct_rows(keys)
    # The cell's corner lies this many bytes behind the old box's.
    shift = ((cells[:, :MAX_RANK] - forms.offset[old]) * forms.stride[old]).sum(axis=1)
    return Held(
        held.source[rows], held.tensor[rows], decoder.forms.numbers(distinct)[index], held.region[rows],
        held.offset[rows] + shift, held.index[rows],
    )  # fmt: skip


def _holder_sets(source: Ids, shard_first: Ints) -> tuple[Ids, tuple[Ids, ...]]:
    """The set of sources of each shard ``[shards]``, as an index into the distinct sets, in order of size.

    Sets of one size are told apart by the sum of a random number per source, which is exact unless two different sets
    have the same sum; that is checked, and the slow way taken.
    """
    counts = np.diff(shard_first)
    holders = np.zeros(len(counts), np.int32)
    sets: list[Ids] = []
    token = mix(np.arange(len(source) and int(source.max()) + 1)).astype(np.int64)
    # Prefix sums wrap around modulo 2^64; their differences come out right all the same.
    sums = starts(token[source])
    sums = sums[shard_first[1:]] - sums[shard_first[:-1]]
    for count in np.unique(counts).tolist():
        of_count = np.flatnonzero(counts == count)
        _, first, index = np.unique(sums[of_count], return_index=True, return_inverse=True)
        candidates = source[shard_first[of_count[first]][:, None] + np.arange(count)]
        actual = source[shard_first[of_count][:, None] + np.arange(count)]
        if not np.array_equal(candidates[index], actual):
            candidates, index = np.unique(actual, axis=0, return_inverse=True)
        holders[of_count] = index.reshape(-1) + len(sets)
        sets.extend(candidates)
    return holders, tuple(sets)
