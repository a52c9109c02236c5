"""The transfers into one engine."""

import numpy as np
from layouts import SIZE, Builder, copies_of, engine_rank, matrices, party_of, trainer
from weightsync.orchestrator.planner import CostModel, make_plan
from weightsync.orchestrator.planner.catalogue import make_catalogue
from weightsync.orchestrator.planner.engine_part import groups, plan_engine
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import COPY_GROUP, Tensor


def test_groups_follow_layers_and_are_bounded():
    model = [*matrices(200, (8, 8)), Tensor("model.norm.weight", "bfloat16", (8,))]
    plan = make_plan([party_of(trainer(0), model)], [party_of(engine_rank("e"), model)])
    groups = copies_of(plan, trainer(0))[:, COPY_GROUP]
    assert (np.diff(groups) >= 0).all()
    assert groups.min() == 0
    assert groups.max() == 63


def test_neighbours_in_both_memories_share_a_descriptor():
    model = matrices(10)
    plan = make_plan([party_of(trainer(0), model)], [party_of(engine_rank("e"), model)])
    assert plan.sends[trainer(0)].descriptors == 10, "one per layer: groups do not merge"
    model = [Tensor(f"model.layers.0.w{i}", "bfloat16", (SIZE, SIZE)) for i in range(10)]
    plan = make_plan([party_of(trainer(0), model)], [party_of(engine_rank("e"), model)])
    assert plan.sends[trainer(0)].descriptors == 1


def test_what_has_no_layer_is_the_last_group():
    model = [Tensor("embed", "bfloat16", (2,)), *matrices(3)]
    assert groups(make_catalogue([party_of(trainer(0), model)])).tolist() == [3, 0, 1, 2]


def test_columns_of_a_small_engine():
    """Two sources with a layer each; one target that has the second layer first."""
    model = matrices(2)
    catalogue = make_catalogue([party_of(trainer(r), [model[r]]) for r in range(2)])
    before = np.array([5, 7])
    engine = plan_engine(catalogue, (party_of(engine_rank("e"), model[::-1]),), CostModel(), before)
    size = SIZE * SIZE * 2
    assert engine.name == "e"
    assert engine.source.tolist() == [0, 1]
    assert engine.target_row.tolist() == [1, 0]
    assert engine.offset.tolist() == [size, 0]
    assert engine.group.tolist() == [0, 1]
    assert engine.load.tolist() == [size, size], "its own, without what others load"
    assert before.tolist() == [5, 7]
    assert engine.edges().tolist() == [0, 1, 2]
    assert engine.of_source(2).tolist() == [0, 1, 2]
    assert engine.descriptors().tolist() == [1, 1]
    assert engine.shapes.bytes[engine.shape].tolist() == [size, size]


def test_packed_transfers_of_an_edge_count_once():
    norms = [Tensor(f"model.layers.{i}.norm", "bfloat16", (16,)) for i in range(3)]
    catalogue = make_catalogue([party_of(trainer(0), norms, staging=4096)])
    targets = (party_of(engine_rank("e"), norms, staging=4096),)
    engine = plan_engine(catalogue, targets, CostModel(), np.zeros(1, np.int64))
    assert engine.place.tolist() == [0, 32, 64]
    assert engine.packed.all()
    assert engine.descriptors().tolist() == [1, 0, 0]
    assert engine.berths == (Berth(1, 0, 512, 1, 96),)


def test_packed_transfers_of_an_edge_count_once_for_each_chunk():
    """Of a landing of 2048 bytes each chunk has 512: 200 norms of 32 bytes fill 12.5 of them."""
    norms = [Tensor(f"model.layers.{i}.norm", "bfloat16", (16,)) for i in range(200)]
    catalogue = make_catalogue([party_of(trainer(0), norms, staging=1 << 16)])
    targets = (party_of(engine_rank("e"), norms, staging=2048),)
    engine = plan_engine(catalogue, targets, CostModel(), np.zeros(1, np.int64))
    assert engine.berths == (Berth(1, 0, 512, 4, 6400, passes=True),)
    assert engine.descriptors().sum() == 13


def test_what_goes_to_a_landing_breaks_at_the_sender_only():
    """Columns of a matrix that lie by themselves at the sender: 64 runs in the target's rows, one to its landing."""
    tensor = Tensor("model.layers.0.w", "bfloat16", (64, 64))
    source = Builder(trainer(0))
    source.dense((tensor, ((0, 0), (64, 32))))
    source.dense((tensor, ((0, 32), (64, 32))))
    for lands, runs, place in (("live", 64, -1), ("copy", 1, 0)):
        target = Builder(engine_rank("e"), lands=lands)
        target.dense((tensor, ((0, 0), (64, 64))))
        engine = plan_engine(make_catalogue([source.party()]), (target.party(),), CostModel(), np.zeros(1, np.int64))
        assert engine.descriptors().tolist() == ([runs, runs] if lands == "live" else [1, 0])
        assert engine.place.tolist() == ([-1, -1] if place else [0, 4096])
        assert not engine.packed.any()
