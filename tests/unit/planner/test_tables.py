"""Copy tables as members get them."""

from layouts import SIZE, Builder, copies_of, engine_rank, matrices, party_of, trainer
from weightsync.orchestrator.planner import make_plan
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_COLUMNS,
    COPY_GROUP,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    Tensor,
)


def test_sources_begin_with_different_targets():
    shards = [Tensor(f"model.layers.0.w{i}.weight", "bfloat16", (SIZE, SIZE)) for i in range(4)]
    sources = [party_of(trainer(r), [shards[r]]) for r in range(4)]
    plan = make_plan(sources, [party_of(engine_rank("e", r), shards) for r in range(4)])
    assert len({int(copies_of(plan, trainer(r))[0, COPY_PEER]) for r in range(4)}) == 4


def test_a_direct_write_worked_out_by_hand():
    """Rank 1 holds rows 2:4 of a matrix of 4 by 4 with two bytes each; the target has all rows 8 bytes apart."""
    tensor = Tensor("model.layers.0.w", "bfloat16", (4, 4))
    sources = []
    for rank in range(2):
        builder = Builder(trainer(rank))
        builder.dense((tensor, ((2 * rank, 0), (2, 4))))
        sources.append(builder.party())
    plan = make_plan(sources, [party_of(engine_rank("e"), [tensor])])
    (copy,) = copies_of(plan, trainer(1))
    assert plan.part(trainer(1)).peers == (engine_rank("e"),)
    assert copy[[COPY_PEER, COPY_ROW, COPY_GROUP, COPY_STAGED]].tolist() == [0, 0, 0, -1]
    assert copy[COPY_BOX:COPY_REMOTE].tolist() == [0, 1, 0, 1, 2, 2, 0, 4]
    assert copy[COPY_REMOTE : COPY_REMOTE + 2].tolist() == [0, 16], "region, then bytes behind its beginning"
    assert copy[COPY_REMOTE + 4 :].tolist() == [8, 2]
    assert copies_of(plan, engine_rank("e")).shape == (0, COPY_COLUMNS), "nothing is packed"
    assert plan.part(engine_rank("e")).peers == (trainer(0), trainer(1))


def test_packed_copies_are_the_same_on_both_sides():
    norms = [Tensor(f"model.layers.{i}.norm", "bfloat16", (16,)) for i in range(2)]
    source = party_of(trainer(0), norms, staging=4096)
    plan = make_plan([source], [party_of(engine_rank("e"), norms[::-1], staging=4096)])
    sent, scattered = copies_of(plan, trainer(0)), copies_of(plan, engine_rank("e"))
    assert sent[:, COPY_STAGED].tolist() == [0, 32]
    assert sent[:, COPY_REMOTE].tolist() == [1, 1], "the target's landing"
    assert sent[:, COPY_REMOTE + 1].tolist() == scattered[:, COPY_STAGED].tolist() == [0, 32]
    assert scattered[:, COPY_ROW].tolist() == [1, 0]
    berth = Berth(1, 0, 512, 1, 64)
    assert plan.part(trainer(0)).berths == plan.part(engine_rank("e")).berths == (berth,)


def test_what_lands_unpacked_is_told_its_place_and_lies_there_row_by_row():
    tensor = Tensor("model.layers.0.w", "bfloat16", (64, 64))
    norm = Tensor("model.norm", "float32", (3,))
    target = Builder(engine_rank("e"), lands="copy")
    target.dense((norm, ((0,), (3,))))
    target.side_by_side([(tensor, ((0, 0), (64, 32))), (tensor, ((0, 32), (64, 32)))])
    source = Builder(trainer(0))
    source.dense((tensor, ((0, 0), (64, 64))), order=(1, 0))
    source.dense((norm, ((0,), (3,))))
    plan = make_plan([source.party()], [target.party()])
    sent, scattered = copies_of(plan, trainer(0)), copies_of(plan, engine_rank("e"))
    assert (sent[:, COPY_STAGED] == -1).all()
    assert sent[:, COPY_REMOTE].tolist() == [2, 2, 2]
    assert sent[:, COPY_REMOTE + 1].tolist() == scattered[:, COPY_STAGED].tolist() == [0, 4096, 8192]
    assert sent[:2, COPY_REMOTE + 4 :].tolist() == [[64, 2], [64, 2]]
    assert scattered[:, COPY_ROW].tolist() == [1, 2, 0]


def test_a_source_that_nobody_needs_anything_of_has_an_empty_table():
    model = matrices(2)
    plan = make_plan([party_of(trainer(r), [model[r]]) for r in range(2)], [party_of(engine_rank("e"), model[:1])])
    assert copies_of(plan, trainer(1)).shape == (0, COPY_COLUMNS)
    assert plan.part(trainer(1)).expected_bytes == 0
