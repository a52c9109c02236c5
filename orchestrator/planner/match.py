"""What each target row needs, piece by piece, and which shard has it.

Per (pattern, target form) the intersections are computed once; rows of the same class only repeat them.
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

    Raises:
        CoverageError: some of a row is held by no source; lists every such row.
    """
    forms = catalogue.decoder.form_table()
    pattern = np.full(len(wanted.tensor), -1, np.int64)
    known = wanted.tensor < len(catalogue.pattern)
    pattern[known] = catalogue.pattern[wanted.tensor[known]]
    bound = (len(catalogue.pattern_first) + 1) * max(1, len(forms))
    classes, row_class = compress((pattern + 1) * len(forms) + wanted.form, bound)
    of_pattern, of_form = classes // max(1, len(forms)) - 1, classes % max(1, len(forms))

    sizes = np.where(of_pattern >= 0, np.diff(catalogue.pattern_first, append=0)[of_pattern], 0)
    owner, ordinal = expand(sizes)
    box = catalogue.pattern_first[of_pattern[owner]] + ordinal
    form = of_form[owner]
    low = np.maximum(catalogue.box_offset[box], forms.offset[form])
    high = np.minimum(catalogue.box_offset[box] + catalogue.box_extent[box], forms.offset[form] + forms.extent[form])
    real = (low < high).all(axis=1)
    owner, ordinal, low, extent, form = owner[real], ordinal[real], low[real], (high - low)[real], form[real]
    volume = extent.prod(axis=1)

    covered = np.zeros(len(classes), np.int64)
    np.add.at(covered, owner, volume)
    lacking = forms.elements[of_form] - covered
    if lacking.any():
        raise _coverage_error(catalogue, targets, wanted, forms, lacking[row_class])

    count = np.bincount(owner, minlength=len(classes))
    first = starts(count)
    row, nth = expand(count[row_class])
    cell = first[row_class[row]] + nth
    shard = catalogue.tensor_first[wanted.tensor[row]] + ordinal[cell]
    return Pieces(row, shard, cell), Cells(low, extent, volume * forms.itemsize[form], form.astype(np.int32))


def _coverage_error(
    catalogue: Catalogue, targets: tuple[Party, ...], wanted: Wanted, forms: FormTable, lacking: Ints
) -> CoverageError:
    names = catalogue.decoder.names.tensors
    missing = []
    for row in np.flatnonzero(lacking).tolist():
        tensor, form = names[wanted.tensor[row]], wanted.form[row]
        rank = len(tensor.shape)
        offset = tuple(forms.offset[form].tolist())[len(forms.offset[form]) - rank :]
        extent = tuple(forms.extent[form].tolist())[len(forms.extent[form]) - rank :]
        member = targets[wanted.target[row]].member
        missing.append(Missing(tensor.name, member, offset, extent, int(lacking[row])))
    return CoverageError(missing)
