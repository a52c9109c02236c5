"""What plans promise besides moving the right bytes: joins and departures change nobody else."""

from dataclasses import replace

import msgspec
import pytest
import qwen3_layouts
from layouts import engine_rank, matrices, party_of, trainer
from plan_executor import assert_delivered, execute, full_tensors
from weightsync.orchestrator.forecast.explain import explain
from weightsync.orchestrator.planner import CostModel, Party, PlanError, make_plan
from weightsync.orchestrator.protocol.layout import Note, Tensor


def test_a_join_touches_only_its_own_edges():
    model = matrices(12)
    sources = [party_of(trainer(r), model[3 * r : 3 * r + 3]) for r in range(4)]
    first = [party_of(engine_rank("b", r), model) for r in range(2)]
    joiner = party_of(engine_rank("a"), model[:3])
    before = make_plan(sources, first)
    alone = make_plan(sources, [*first, joiner])
    cached = make_plan(sources, [joiner, *first], previous=before)
    for after in (alone, cached):
        changed = {m for m in before.parts if before.part(m).fingerprint != after.part(m).fingerprint}
        assert changed == {trainer(0)}
        assert after.root != before.root
    assert cached.root == alone.root
    assert set(map(id, before.engines)) <= set(map(id, cached.engines)), "kept engines are not planned again"


def test_an_engine_that_leaves_changes_no_other():
    model = matrices(12)
    sources = [party_of(trainer(r), model) for r in range(4)]
    engines = [party_of(engine_rank(name), model, staging=1 << 16) for name in "abc"]
    before = make_plan(sources, engines)
    after = make_plan(sources, [engines[0], engines[2]], previous=before)
    for name in "ac":
        assert after.part(engine_rank(name)) == before.part(engine_rank(name))


def test_a_small_ring_serves_any_number_of_engines():
    model = [Tensor(f"model.layers.{i}.norm", "bfloat16", (32,)) for i in range(40)]
    sources = [party_of(trainer(0), model, staging=512)]
    engines = [party_of(engine_rank(name), model, staging=1 << 16) for name in "abc"]
    before = make_plan(sources, engines[:1])
    plan = make_plan(sources, engines, previous=before)
    assert plan.part(engine_rank("a")) == before.part(engine_rank("a"))
    assert plan.sends[trainer(0)].descriptors == 3 * 10, "40 norms of 64 bytes in chunks of 256"
    full = full_tensors(sources, 1)
    assert_delivered(engines, full, execute(plan, sources, engines, full))


def test_plans_are_deterministic_and_notes_change_nothing():
    model = matrices(6)
    sources = [party_of(trainer(r), model, staging=4096) for r in range(3)]
    targets = [party_of(engine_rank("a"), model, staging=4096)]
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


def test_what_nobody_needs_is_reported_and_no_error():
    model = matrices(3)
    plan = make_plan([party_of(trainer(0), model)], [party_of(engine_rank("e"), model[:1])])
    assert plan.unneeded == (model[1].name, model[2].name)


def test_what_sources_have_in_no_slot_is_reported_too():
    model = matrices(2)
    sources = [party_of(trainer(rank), model[:1]) for rank in (0, 1)]
    for source, unread in zip(sources, (("head", "adapter"), ("adapter", "table")), strict=True):
        object.__setattr__(source, "layout", msgspec.structs.replace(source.layout, unread=unread))
    plan = make_plan(sources, [party_of(engine_rank("e"), model[:1])])
    assert plan.unneeded == ("head", "adapter", "table")


def test_a_fleet_without_engines_has_an_empty_plan():
    plan = make_plan([party_of(trainer(0), matrices(1))], [])
    assert plan.part(trainer(0)).peers == ()
    assert plan.bytes == 0


def test_twins_and_a_plan_without_sources_are_refused():
    good = party_of(trainer(0), matrices(1))
    with pytest.raises(PlanError, match="trainer/0 is in the plan twice"):
        make_plan([good, replace(good, incarnation=2)], [])
    with pytest.raises(PlanError, match="at least one source"):
        make_plan([], [])


def test_experts_that_ranks_hold_by_rows_leave_a_gpu_in_chunks():
    """FSDP cuts each expert in two, expert parallelism gives it to one rank whole: 786,432 bytes to a piece, which a
    link between two GPUs moves in less time than it takes to post it."""
    experts = [
        Tensor(f"model.layers.0.mlp.experts.{n}.up_proj.weight", "float8_e4m3fn", (768, 2048)) for n in range(64)
    ]
    ring = 1 << 30
    sources = [
        qwen3_layouts.party(trainer(rank), [qwen3_layouts.cut(one, 0, rank, 2) for one in experts], ring)
        for rank in range(2)
    ]
    targets = [
        qwen3_layouts.party(
            engine_rank("e", rank),
            [qwen3_layouts.cut(one, None, 0, 1) for one in experts[32 * rank :][:32]],
            ring,
            "flip",
        )
        for rank in range(2)
    ]
    edges = explain(make_plan(sources, targets)).edges
    assert [(edge.moved.bytes, edge.moved.descriptors) for edge in edges] == [(32 * 786_432, 1)] * 4


@pytest.mark.parametrize(
    ("lands", "room", "most"),
    [("live", 64 << 20, 146), ("live", 1 << 30, 78), ("flip", 1 << 30, 78), ("copy", 1 << 30, 78)],
)
def test_row_parallel_slices_take_no_more_descriptors_than_others(lands, room, most):
    """A Qwen3 of 36 layers from two FSDP ranks to two tensor-parallel ones: a column slice of a layer has 12,288 runs.

    Packed, an edge takes a descriptor for each chunk, and one for each run that is as long as a descriptor is dear.
    """
    plan = make_plan(qwen3_layouts.trainer(36, 2, room), qwen3_layouts.engine(36, 2, room, lands))
    edges, below = explain(plan).edges, CostModel().pack_below_bytes("VRAM")
    assert max(edge.moved.descriptors for edge in edges) == most
    assert all(edge.straight <= edge.moved.direct_bytes / below for edge in edges)
