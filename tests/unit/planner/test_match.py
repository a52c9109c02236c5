"""What targets need, cut along the shards, and what is missing."""

import numpy as np
import pytest
from layouts import SIZE, Builder, engine_rank, matrices, party_of, trainer
from weightsync.orchestrator.planner import CoverageError, make_plan
from weightsync.orchestrator.planner.catalogue import make_catalogue
from weightsync.orchestrator.planner.match import Wanted, match
from weightsync.orchestrator.protocol.layout import Tensor


def test_missing_tensors_are_all_named():
    model = matrices(5)
    with pytest.raises(CoverageError) as error:
        make_plan([party_of(trainer(0), model[:2])], [party_of(engine_rank("e"), model)])
    assert error.value.tensors == tuple(t.name for t in model[2:])
    assert error.value.member == engine_rank("e")
    assert model[4].name in str(error.value)


def test_a_hole_is_named_with_its_box():
    (tensor,) = matrices(1)
    builder = Builder(trainer(0))
    builder.dense((tensor, ((0, 0), (SIZE - 1, SIZE))))
    with pytest.raises(CoverageError, match=rf"{tensor.name}\[0:64, 0:64\] lacks 64 elements at e/0"):
        make_plan([builder.party()], [party_of(engine_rank("e"), [tensor])])


def test_a_row_is_cut_along_the_shards_that_hold_it():
    """Two ranks hold rows 0:2 and 2:4; rows 1:4 are wanted: one row of the first and two of the second."""
    tensor = Tensor("w", "bfloat16", (4, 4))
    sources = []
    for rank in range(2):
        builder = Builder(trainer(rank))
        builder.dense((tensor, ((2 * rank, 0), (2, 4))))
        sources.append(builder.party())
    catalogue = make_catalogue(sources)
    builder = Builder(engine_rank("e"))
    builder.dense((tensor, ((1, 0), (3, 4))))
    target = builder.party()
    rows = catalogue.decoder.decode(target).rows
    first = np.zeros(1, np.int32)
    pieces, cells = match(catalogue, (target,), Wanted(first, first, rows.tensor, rows.form, rows.region, rows.offset))
    assert pieces.row.tolist() == [0, 0]
    assert pieces.shard.tolist() == [0, 1]
    assert cells.offset[pieces.cell, 2].tolist() == [1, 2]
    assert cells.extent[pieces.cell, 2:].tolist() == [[1, 4], [2, 4]]
    assert cells.bytes[pieces.cell].tolist() == [8, 16]


def test_a_tensor_that_no_source_declares_is_missing():
    with pytest.raises(CoverageError, match="other"):
        make_plan([party_of(trainer(0), matrices(1))], [party_of(engine_rank("e"), [Tensor("other", "int8", (1,))])])
