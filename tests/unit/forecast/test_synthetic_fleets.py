"""Fleets by published sizes, GLM-5's above all: every row and scale tile."""

from math import prod

import numpy as np
import pytest
from plan_executor import assert_delivered, execute, full_tensors
from weightsync.orchestrator.forecast.published_models import BLOCK, GEOMETRIES, Geometry, layer_weights, other_weights
from weightsync.orchestrator.forecast.synthetic_fleets import (
    EngineFleet,
    TrainerFleet,
    engine_parties,
    sharding_obstacle,
    trainer_parties,
)
from weightsync.orchestrator.planner import make_plan
from weightsync.orchestrator.protocol.layout import COPY_BOX, COPY_COLUMNS, COPY_REMOTE, COPY_ROW, ITEMSIZE, as_matrix

TINY = Geometry(
    "tiny", hidden=256, layers=2, dense_layers=1, intermediate=512, expert_intermediate=256, experts=8, heads=4,
    q_lora=128, kv_lora=64, rope=16, nope=32, value=32, vocab=512, indexer=(4, 32), next_token_layers=1,
)  # fmt: skip


def weight(geometry, name):
    return next(w for w in layer_weights(GEOMETRIES[geometry], 0) if name in w.name)


def test_the_odd_shapes_are_what_they_should_be():
    kv_b = weight("glm-5", "kv_b_proj")
    assert kv_b.shape == (28672, 512)
    assert [t.shape for t in kv_b.tensors("")] == [(28672, 512), (224, 4)]
    assert "448 rows per rank cut a block" in sharding_obstacle(kv_b, 64)
    assert sharding_obstacle(kv_b, 32) == "458752 bytes per rank are fewer than 2097152"
    kv_a = weight("glm-5", "kv_a_proj")
    assert [t.shape for t in kv_a.tensors("")] == [(576, 6144), (5, 48)]
    assert sharding_obstacle(kv_a, 64).startswith("9 rows per rank")
    assert not sharding_obstacle(other_weights(GEOMETRIES["glm-5"])[0], 64)


@pytest.fixture(scope="module")
def glm():
    """All kinds of layers of GLM-5: 3 dense and 2 with experts; 64 ranks FSDP x EP into 2 engines of EP 16."""
    geometry = GEOMETRIES["glm-5"]
    sources = trainer_parties(geometry, TrainerFleet(expert_parallel=8, fsdp=8), layers=5)
    targets = engine_parties(geometry, EngineFleet(engines=2, expert_parallel=16), layers=5)
    return sources, targets, make_plan(sources, targets)


def arrivals(sources, targets, plan):
    """Per target, how often each row of each tensor is written over its whole width: weights and scale tiles alike."""
    found = {t.member: {x.name: np.zeros(x.shape[0], np.int64) for x in t.layout.tensors} for t in targets}
    for source in sources:
        part = plan.part(source.member)
        table = as_matrix(part.copies, COPY_COLUMNS)
        tensors = source.layout.matrix()[table[:, COPY_ROW], 0]
        boxes = table[:, COPY_BOX:COPY_REMOTE]
        for (peer, *_), tensor, box in zip(table.tolist(), tensors.tolist(), boxes.tolist(), strict=True):
            declared = source.layout.tensors[tensor]
            dim = 4 - len(declared.shape)
            offsets, extents = box[0::2][dim:], box[1::2][dim:]
            assert extents[1:] == list(declared.shape[1:])
            found[part.peers[peer]][declared.name][offsets[0] : offsets[0] + extents[0]] += 1
    return found


def test_every_row_and_every_scale_tile_of_glm_arrives_once(glm):
    sources, targets, plan = glm
    found = arrivals(sources, targets, plan)
    for target in targets:
        for name, rows in found[target.member].items():
            assert (rows == 1).all(), f"{name} at {target.member}"
    experts = 256 // 16
    one = targets[17]
    names = {t.name for t in one.layout.tensors}
    assert {f"model.layers.4.mlp.experts.{e}.up_proj.weight_scale_inv" in names for e in range(16, 32)} == {True}
    assert sum(".experts." in n for n in names) == 2 * experts * 3 * 2


def test_what_is_sent_is_what_the_engines_hold(glm):
    sources, targets, plan = glm
    due = sum(prod(t.shape) * ITEMSIZE[t.dtype] for target in targets for t in target.layout.tensors)
    assert plan.bytes == due
    assert plan.unneeded == ()
    for target in targets:
        assert plan.part(target.member).expected_bytes == sum(
            prod(t.shape) * ITEMSIZE[t.dtype] for t in target.layout.tensors
        )
    assert len(sources) == 64


def test_gathered_tensors_are_held_whole_by_ranks_in_turn(glm):
    sources, _, _ = glm
    holders = [
        (s.member.rank, note)
        for s in sources
        for note in s.layout.notes
        if s.layout.tensors[int(s.layout.matrix()[note.first_row, 0])].name.endswith("kv_b_proj.weight")
    ]
    assert len(holders) == 5, "one rank for each layer"
    assert len({rank for rank, _ in holders}) > 1
    for _, note in holders:
        assert note.slot == "gathered"
        assert "448 rows per rank cut a block of 128" in note.reason


def test_fused_parameters_join_rows_and_scale_tiles(glm):
    _, targets, _ = glm
    layout = targets[0].layout
    number = {t.name: i for i, t in enumerate(layout.tensors)}
    rows = {int(r[0]): r for r in layout.matrix()}
    q_a, kv_a = (rows[number[f"model.layers.0.self_attn.{n}.weight"]] for n in ("q_a_proj", "kv_a_proj_with_mqa"))
    assert q_a[1] == kv_a[1]
    assert kv_a[2] - q_a[2] == 2048 * 6144
    scales = [
        rows[number[f"model.layers.0.self_attn.{n}.weight_scale_inv"]] for n in ("q_a_proj", "kv_a_proj_with_mqa")
    ]
    assert scales[0][1] == scales[1][1]
    assert scales[1][2] - scales[0][2] == 2048 // BLOCK * 6144 // BLOCK * 4
    assert layout.regions[scales[0][1]].length == (16 + 5) * 48 * 4
    gate, up = (rows[number[f"model.layers.3.mlp.experts.1.{n}_proj.weight"]] for n in ("gate", "up"))
    assert gate[1] == up[1]
    assert gate[2] == 2 * 2048 * 6144
    assert up[2] - gate[2] == 2048 * 6144


@pytest.mark.parametrize(
    "trainer",
    [
        TrainerFleet(expert_parallel=2, fsdp=4, staging=1 << 16),
        TrainerFleet(expert_parallel=4, fsdp=2, expert_shards="rows", staging=1 << 20),
        TrainerFleet(expert_parallel=2, fsdp=2, replicas=2, staging=0),
        TrainerFleet(expert_parallel=1, fsdp=3),
    ],
)
def test_every_byte_of_a_small_model_of_the_same_kinds(trainer):
    sources = trainer_parties(TINY, trainer)
    targets = engine_parties(TINY, EngineFleet(engines=2, expert_parallel=2, staging=1 << 20))
    plan = make_plan(sources, targets)
    full = full_tensors(sources, seed=3)
    assert_delivered(targets, full, execute(plan, sources, targets, full))
    sent = [plan.sends[s.member].bytes for s in sources]
    assert min(sent) > 0


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="8 experts are not divisible by 3"):
        trainer_parties(TINY, TrainerFleet(expert_parallel=3, fsdp=1))
    with pytest.raises(ValueError, match="8 experts are not divisible by 3"):
        engine_parties(TINY, EngineFleet(engines=1, expert_parallel=3))
