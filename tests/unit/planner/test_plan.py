"""What plans promise besides moving the right bytes: stability, levelled senders, fingerprints, errors."""

from dataclasses import replace

import numpy as np
import pytest
from layouts import Builder, assert_delivered, execute, full_tensors
from weightsync.orchestrator.planner import (
    CostModel,
    CoverageError,
    DtypeMismatch,
    LayoutError,
    Party,
    PlanError,
    ShapeMismatch,
    make_plan,
)
from weightsync.orchestrator.protocol.layout import (
    COPY_COLUMNS,
    COPY_GROUP,
    COPY_PEER,
    COPY_STAGED,
    ROW_COLUMNS,
    Note,
    Region,
    Tensor,
    as_matrix,
)
from weightsync.orchestrator.protocol.names import Member

SIZE = 64


def trainer(rank):
    return Member("trainer", "", rank)


def rank_of(engine, rank=0):
    return Member("inference", engine, rank)


def weights(count, shape=(SIZE, SIZE), dtype="bfloat16"):
    return [Tensor(f"model.layers.{i}.w.weight", dtype, shape) for i in range(count)]


def whole(tensor):
    return tensor, ((0,) * len(tensor.shape), tensor.shape)


@pytest.fixture(scope="session")
def make():
    """Parties that hold whole tensors."""

    def made(member, tensors, *, staging=-1, incarnation=1):
        builder = Builder(member, staging)
        for tensor in tensors:
            builder.dense(whole(tensor))
        return builder.party(incarnation)

    return made


def table(plan, member):
    return as_matrix(plan.part(member).copies, COPY_COLUMNS)


# ------------------------------------------------------------------------------------------------ choice of sources
def test_replicas_share_the_load(make):
    model = weights(40)
    sources = [make(trainer(r), model) for r in range(4)]
    plan = make_plan(sources, [make(rank_of(f"e{i}"), model) for i in range(3)])
    sent = [plan.sends[s.member].bytes for s in sources]
    assert max(sent) - min(sent) <= SIZE * SIZE * 2
    assert sum(sent) == plan.bytes == 3 * 40 * SIZE * SIZE * 2


def test_what_only_one_holds_is_levelled_by_what_all_hold(make):
    shared, own = weights(32), [Tensor(f"own.{i}", "bfloat16", (SIZE, SIZE)) for i in range(8)]
    sources = [make(trainer(0), shared + own), make(trainer(1), shared)]
    plan = make_plan(sources, [make(rank_of("e"), shared + own)])
    assert plan.sends[trainer(0)].bytes == plan.sends[trainer(1)].bytes


def test_a_target_gets_replicated_tensors_from_few_sources(make):
    model = weights(64)
    sources = [make(trainer(r), model) for r in range(16)]
    plan = make_plan(sources, [make(rank_of("e", r), model) for r in range(16)])
    assert max(len(plan.part(rank_of("e", r)).peers) for r in range(16)) <= 2


# ------------------------------------------------------------------------------------------------ joins
def test_a_join_touches_only_its_own_edges(make):
    model = weights(12)
    sources = [make(trainer(r), model[3 * r : 3 * r + 3]) for r in range(4)]
    first = [make(rank_of("b", r), model) for r in range(2)]
    joiner = make(rank_of("a"), model[:3])
    before = make_plan(sources, first)
    alone = make_plan(sources, [*first, joiner])
    cached = make_plan(sources, [joiner, *first], previous=before)
    for after in (alone, cached):
        changed = {m for m in before.parts if before.part(m).fingerprint != after.part(m).fingerprint}
        assert changed == {trainer(0)}
        assert after.root != before.root
    assert cached.root == alone.root
    assert set(map(id, before.engines)) <= set(map(id, cached.engines)), "kept engines are not planned again"


def test_an_engine_that_leaves_changes_no_other(make):
    model = weights(12)
    sources = [make(trainer(r), model) for r in range(4)]
    engines = [make(rank_of(name), model, staging=1 << 16) for name in "abc"]
    before = make_plan(sources, engines)
    after = make_plan(sources, [engines[0], engines[2]], previous=before)
    for name in "ac":
        assert after.part(rank_of(name)) == before.part(rank_of(name))


def test_a_small_staging_region_is_not_given_to_two_engines(make):
    model = [Tensor(f"model.layers.{i}.norm", "bfloat16", (32,)) for i in range(40)]
    sources = [make(trainer(0), model, staging=4096)]
    engines = [make(rank_of(name), model, staging=1 << 16) for name in "ab"]
    before = make_plan(sources, engines[:1])
    plan = make_plan(sources, engines, previous=before)
    assert plan.part(rank_of("a")) == before.part(rank_of("a"))
    full = full_tensors(sources, 1)
    assert_delivered(engines, full, execute(plan, sources, engines, full))


@pytest.mark.parametrize("change", ["incarnation", "regions", "expert_map", "rows"])
def test_fingerprints_follow_what_they_depend_on(make, change):
    model = weights(4)
    sources = [make(trainer(r), model[2 * r : 2 * r + 2]) for r in range(2)]
    targets = [make(rank_of("a"), model[:2]), make(rank_of("b"), model[2:])]
    before = make_plan(sources, targets)
    old = targets[0]
    layout = old.layout
    if change == "regions":
        layout = type(layout)(layout.tensors, (Region(4096, layout.regions[0].length),), layout.rows)
    elif change == "expert_map":
        layout = type(layout)(layout.tensors, layout.regions, layout.rows, expert_map="other")
    elif change == "rows":
        rows = layout.matrix().copy()
        layout = type(layout)(layout.tensors, layout.regions, rows[::-1].tobytes())
    incarnation = 2 if change == "incarnation" else 1
    after = make_plan(sources, [Party(old.member, incarnation, layout), targets[1]])
    same = {m for m in before.parts if before.part(m).fingerprint == after.part(m).fingerprint}
    assert {rank_of("b"), trainer(1)} <= same
    assert rank_of("a") not in same
    assert (trainer(0) in same) == (change in ("expert_map", "rows"))


def test_plans_are_deterministic_and_notes_change_nothing(make):
    model = weights(6)
    sources = [make(trainer(r), model, staging=4096) for r in range(3)]
    targets = [make(rank_of("a"), model, staging=4096)]
    noted = [
        Party(
            s.member,
            1,
            type(s.layout)(
                s.layout.tensors,
                s.layout.regions,
                s.layout.rows,
                s.layout.staging,
                notes=(Note(0, 6, "sharded", "because"),),
            ),
        )
        for s in sources
    ]
    assert make_plan(sources, targets).parts == make_plan(noted, targets).parts


# ------------------------------------------------------------------------------------------------ groups, packing
def test_groups_follow_layers_and_are_bounded(make):
    model = [*weights(200, (8, 8)), Tensor("model.norm.weight", "bfloat16", (8,))]
    plan = make_plan([make(trainer(0), model)], [make(rank_of("e"), model)])
    groups = table(plan, trainer(0))[:, COPY_GROUP]
    assert (np.diff(groups) >= 0).all()
    assert groups.min() == 0
    assert groups.max() == 63


def test_sources_begin_with_different_targets(make):
    shards = [Tensor(f"model.layers.0.w{i}.weight", "bfloat16", (SIZE, SIZE)) for i in range(4)]
    sources = [make(trainer(r), [shards[r]]) for r in range(4)]
    plan = make_plan(sources, [make(rank_of("e", r), shards) for r in range(4)])
    assert len({int(table(plan, trainer(r))[0, COPY_PEER]) for r in range(4)}) == 4


def test_small_pieces_share_one_descriptor_and_large_ones_go_straight(make):
    small = [Tensor(f"model.layers.{i}.norm", "bfloat16", (16,)) for i in range(20)]
    large = [Tensor("model.layers.0.w", "bfloat16", (1024, 1024))]
    model = small + large
    plan = make_plan(
        [make(trainer(0), model[::-1], staging=1 << 20)], [make(rank_of("e"), model, staging=1 << 20)], CostModel()
    )
    assert plan.sends[trainer(0)].descriptors == 2
    staged = table(plan, trainer(0))[:, COPY_STAGED]
    assert (staged >= 0).sum() == len(small)
    assert len(table(plan, rank_of("e"))) == len(small)


def test_a_lone_small_piece_is_not_packed(make):
    model = [Tensor("norm", "bfloat16", (16,))]
    plan = make_plan([make(trainer(0), model, staging=4096)], [make(rank_of("e"), model, staging=4096)])
    assert (table(plan, trainer(0))[:, COPY_STAGED] == -1).all()


def test_neighbours_in_both_memories_share_a_descriptor(make):
    model = weights(10)
    plan = make_plan([make(trainer(0), model)], [make(rank_of("e"), model)])
    assert plan.sends[trainer(0)].descriptors == 10, "one per layer: groups do not merge"
    model = [Tensor(f"model.layers.0.w{i}", "bfloat16", (SIZE, SIZE)) for i in range(10)]
    plan = make_plan([make(trainer(0), model)], [make(rank_of("e"), model)])
    assert plan.sends[trainer(0)].descriptors == 1


# ------------------------------------------------------------------------------------------------ refusals
def test_missing_tensors_are_all_named(make):
    model = weights(5)
    with pytest.raises(CoverageError) as error:
        make_plan([make(trainer(0), model[:2])], [make(rank_of("e"), model)])
    assert error.value.tensors == tuple(t.name for t in model[2:])
    assert error.value.member == rank_of("e")
    assert model[4].name in str(error.value)


def test_a_hole_is_named_with_its_box(make):
    (tensor,) = weights(1)
    builder = Builder(trainer(0))
    builder.dense((tensor, ((0, 0), (SIZE - 1, SIZE))))
    with pytest.raises(CoverageError, match=rf"{tensor.name}\[0:64, 0:64\] lacks 64 elements at e/0"):
        make_plan([builder.party()], [make(rank_of("e"), [tensor])])


def test_what_nobody_needs_is_reported_and_no_error(make):
    model = weights(3)
    plan = make_plan([make(trainer(0), model)], [make(rank_of("e"), model[:1])])
    assert plan.unneeded == (model[1].name, model[2].name)


def test_a_fleet_without_engines_has_an_empty_plan(make):
    plan = make_plan([make(trainer(0), weights(1))], [])
    assert plan.part(trainer(0)).peers == ()
    assert plan.bytes == 0


@pytest.mark.parametrize(
    ("changed", "error", "values"),
    [
        ({"shape": (SIZE, SIZE + 1)}, ShapeMismatch, ["(64, 64)", "(64, 65)"]),
        ({"dtype": "float16"}, DtypeMismatch, ["bfloat16", "float16"]),
    ],
)
def test_disagreements_name_tensor_sides_and_values(make, changed, error, values):
    (tensor,) = weights(1)
    other = Tensor(**{"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape, **changed})
    sources = [make(trainer(0), weights(3)), make(trainer(1), weights(1))]
    with pytest.raises(error) as raised:
        make_plan(sources, [make(rank_of("e"), [other])])
    assert raised.value.member == rank_of("e")
    for text in (tensor.name, "trainer/0", "e/0", *values):
        assert text in str(raised.value)


def broken(party, column, value):
    rows = party.layout.matrix().copy()
    rows[0, column] = value
    layout = party.layout
    return Party(party.member, 1, type(layout)(layout.tensors, layout.regions, rows.tobytes(), layout.staging))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (0, 9, "points to tensor"),
        (0, -1, "points to tensor"),
        (1, 7, "points to region"),
        (2, 1 << 62, "outside of its region"),
        (2, -1, "outside of its region"),
        (9, -1, "outside of the tensor's shape"),
        (10, SIZE + 1, "outside of the tensor's shape"),
        (10, -1, "outside of the tensor's shape"),
        (11, 1 << 60, "stride"),
        (11, -8, "stride"),
    ],
)
@pytest.mark.parametrize("side", ["source", "target"])
def test_layouts_that_contradict_themselves_are_refused(make, column, value, said, side):
    model = weights(1)
    source, target = make(trainer(0), model), make(rank_of("e"), model)
    guilty = source if side == "source" else target
    bad = broken(guilty, column, value)
    with pytest.raises(LayoutError, match=said) as error:
        make_plan([bad if side == "source" else source], [bad if side == "target" else target])
    assert error.value.member == guilty.member


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("t", "complex64", (2,)),
        Tensor("t", "bfloat16", (1, 1, 1, 1, 1)),
        Tensor("t", "bfloat16", (-1,)),
        Tensor("t", "bfloat16", (1 << 63, 0)),
    ],
)
def test_impossible_tensors_are_refused(tensor, make):
    good = make(trainer(0), weights(1))
    layout = type(good.layout)((tensor,), good.layout.regions, b"")
    with pytest.raises(LayoutError, match="'t'"):
        make_plan([Party(trainer(0), 1, layout)], [])


def test_ragged_rows_staging_and_twins_are_refused(make):
    good = make(trainer(0), weights(1))
    layout = good.layout
    kind = type(layout)
    ragged = Party(trainer(0), 1, kind(layout.tensors, layout.regions, layout.rows[:-8]))
    with pytest.raises(LayoutError, match="whole number of rows"):
        make_plan([ragged], [])
    staged = Party(trainer(0), 1, kind(layout.tensors, layout.regions, layout.rows, 5))
    with pytest.raises(LayoutError, match="staging is region 5"):
        make_plan([staged], [])
    twice = Party(
        trainer(0), 1, kind((*layout.tensors, Tensor(layout.tensors[0].name, "int8", (1,))), layout.regions, b"")
    )
    with pytest.raises(LayoutError, match="in two ways"):
        make_plan([twice], [])
    with pytest.raises(PlanError, match="trainer/0 is in the plan twice"):
        make_plan([good, replace(good, incarnation=2)], [])
    with pytest.raises(PlanError, match="at least one source"):
        make_plan([], [])


def test_rows_that_share_memory_are_refused_by_name(make):
    one, two = weights(2)
    source = make(trainer(0), [one, two])
    builder = Builder(rank_of("e"))
    builder.regions.append(1 << 16)
    builder.hold(whole(one), 0, 0, (SIZE * 2, 2))
    builder.hold(whole(two), 0, SIZE * SIZE * 2 - 2, (SIZE * 2, 2))
    with pytest.raises(LayoutError, match=f"{two.name}.*shares memory with tensor '{one.name}'"):
        make_plan([source], [builder.party()])


def test_a_row_that_folds_onto_itself_is_refused(make):
    (one,) = weights(1)
    builder = Builder(rank_of("e"))
    builder.regions.append(1 << 16)
    builder.hold(whole(one), 0, 0, (SIZE, 2))
    with pytest.raises(LayoutError, match="elements that share memory"):
        make_plan([make(trainer(0), [one])], [builder.party()])


def test_empty_boxes_are_ignored(make):
    (one,) = weights(1)
    builder = Builder(trainer(0))
    builder.dense((one, ((SIZE, 0), (0, SIZE))))
    builder.dense(whole(one))
    target = Builder(rank_of("e"))
    target.dense(whole(one))
    target.dense((one, ((0, 0), (0, SIZE))))
    plan = make_plan([builder.party()], [target.party()])
    assert plan.bytes == SIZE * SIZE * 2
    assert len(builder.party().layout.rows) == 2 * ROW_COLUMNS * 8
