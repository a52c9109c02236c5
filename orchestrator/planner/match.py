"""What each target row needs, piece by piece, and which shard has it.

A row's *class* is its tensor's pattern and its own form. The intersections of boxes are computed once per class, a few
hundred times; the hundreds of thousands of rows only repeat those of their class.
"""

from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.arrays import Ids, Ints, compress, expand, starts
from weightsync.orchestrator.planner.catalogue import Catalogue
from weightsync.orchestrator.planner.decode import FormTable
from weightsync.orchestrator.planner.errors import CoverageError, Missing
from weightsync.orchestrator.planner.inputs import Party


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows of several targets in columns ``[n]``; ``target`` is the index of the party, ``index`` of its row."""

    target: Ids
    index: Ids
    tensor: Ids
    form: Ids
    region: Ids
    offset: Ints


@dataclass(frozen=True, slots=True)
class Cells:
    """Distinct intersections of a shard's box with a target form's box: ``offset``, ``extent [n, MAX_RANK]`` in
    elements of the logical tensor, ``bytes [n]``, and the target's ``form [n]``."""

    offset: Ints
    extent: Ints
    bytes: Ints
    form: Ids


@dataclass(frozen=True, slots=True)
class Pieces:
    """What is to be moved, in columns ``[n]`` ordered by target and row: row of ``Wanted``, its shard, its cell."""

    row: Ints
    shard: Ints
    cell: Ints


def match(catalogue: Catalogue, targets: tuple[Party, ...], wanted: Wanted) -> tuple[Pieces, Cells]:
    """Cut each wanted row along the shards that hold it.

    Returns:
        The pieces of all rows, and the cells that they share.

    Raises:
        CoverageError: some of a row is held by no source; lists every such row.
    """
    forms = catalogue.decoder.form_table()
    # Tensors that only targets declare were numbered after the catalogue was made and are beyond its end.
    pattern = np.full(len(wanted.tensor), -1, np.int64)
    known = wanted.tensor < len(catalogue.pattern)
    pattern[known] = catalogue.pattern[wanted.tensor[known]]
    bound = (len(catalogue.pattern_first) + 1) * max(1, len(forms))
    classes, row_class = compress((pattern + 1) * len(forms) + wanted.form, bound)
    of_pattern, of_form = classes // max(1, len(forms)) - 1, classes % max(1, len(forms))

    # Every class against every box of its pattern, in columns as long as all of these pairs; most are then dropped.
    # Pattern -1 reads the entry that ``append`` makes up, and where() drops what came of it.
    sizes = np.where(of_pattern >= 0, np.diff(catalogue.pattern_first, append=0)[of_pattern], 0)
    owner, ordinal = expand(sizes)
    box = catalogue.pattern_first[of_pattern[owner]] + ordinal
    form = of_form[owner]
    low = np.maximum(catalogue.box_offset[box], forms.offset[form])
    high = np.minimum(catalogue.box_offset[box] + catalogue.box_extent[box], forms.offset[form] + forms.extent[form])
    real = (low < high).all(axis=1)
    owner, ordinal, form = owner[real], ordinal[real], form[real]
    low, extent = low[real], (high - low)[real]
    volume = extent.prod(axis=1)

    # The boxes of a pattern do not overlap, so a row is covered exactly when the volumes add up.
    covered = np.zeros(len(classes), np.int64)
    np.add.at(covered, owner, volume)
    lacking = forms.elements[of_form] - covered
    if lacking.any():
        raise _coverage_error(catalogue, targets, wanted, forms, lacking[row_class])

    # Cells are sorted by class, so that each row repeats a stretch of them. Box n of a pattern is shard n of a tensor.
    count = np.bincount(owner, minlength=len(classes))
    first = starts(count)
    row, nth = expand(count[row_class])
    cell = first[row_class[row]] + nth
    shard = catalogue.tensor_first[wanted.tensor[row]] + ordinal[cell]
    return Pieces(row, shard, cell), Cells(low, extent, volume * forms.itemsize[form], form.astype(np.int32))


def _coverage_error(
    catalogue: Catalogue, targets: tuple[Party, ...], wanted: Wanted, forms: FormTable, lacking: Ints
) -> CoverageError:
    """Every row of which ``lacking [n]`` elements are held by no source."""
    names = catalogue.decoder.names.tensors
    missing = []
    for row in np.flatnonzero(lacking).tolist():
        tensor, form = names[wanted.tensor[row]], wanted.form[row]
        # Boxes are padded with leading dimensions of one element; people see the tensor's own dimensions.
        rank = len(tensor.shape)
        offset = tuple(forms.offset[form].tolist())[len(forms.offset[form]) - rank :]
        extent = tuple(forms.extent[form].tolist())[len(forms.extent[form]) - rank :]
        member = targets[wanted.target[row]].member
        missing.append(Missing(tensor.name, member, offset, extent, int(lacking[row])))
    return CoverageError(missing)
