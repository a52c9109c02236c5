"""Memory that two elements share is refused, memory that only interleaves is not."""

import pytest
from layouts import SIZE, Builder, engine_rank, matrices, party_of, trainer, whole
from weightsync.orchestrator.planner import LayoutError, TooComplex, make_plan, overlap


def test_rows_that_share_memory_are_refused_by_name():
    one, two = matrices(2)
    source = party_of(trainer(0), [one, two])
    builder = Builder(engine_rank("e"))
    builder.regions.append(1 << 16)
    builder.hold(whole(one), 0, 0, (SIZE * 2, 2))
    builder.hold(whole(two), 0, SIZE * SIZE * 2 - 2, (SIZE * 2, 2))
    with pytest.raises(LayoutError, match=f"{two.name}.*shares memory with tensor '{one.name}'"):
        make_plan([source], [builder.party()])


def test_a_row_that_folds_onto_itself_is_refused():
    (one,) = matrices(1)
    builder = Builder(engine_rank("e"))
    builder.regions.append(1 << 16)
    builder.hold(whole(one), 0, 0, (SIZE, 2))
    with pytest.raises(LayoutError, match="elements that share memory"):
        make_plan([party_of(trainer(0), [one])], [builder.party()])


def test_columns_side_by_side_in_one_matrix_interleave_and_pass():
    one, two = matrices(2)
    builder = Builder(engine_rank("e"))
    builder.side_by_side([whole(one), whole(two)])
    source = party_of(trainer(0), [one, two])
    assert make_plan([source], [builder.party()]).bytes == 2 * SIZE * SIZE * 2


def test_too_many_interleaved_pieces_are_refused(monkeypatch):
    monkeypatch.setattr(overlap, "MAX_INTERLEAVED_RUNS", 2 * SIZE - 1)
    one, two = matrices(2)
    builder = Builder(engine_rank("e"))
    builder.side_by_side([whole(one), whole(two)])
    with pytest.raises(TooComplex, match="e/0: 128 interleaved pieces; limit 127"):
        make_plan([party_of(trainer(0), [one, two])], [builder.party()])
