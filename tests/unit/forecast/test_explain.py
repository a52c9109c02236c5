"""Explanations, against numbers worked out by hand."""

import msgspec
import pytest
from layouts import Builder
from weightsync.orchestrator.forecast.explain import explain, family
from weightsync.orchestrator.forecast.simulate import Hardware, simulate
from weightsync.orchestrator.forecast.text import explanation_text
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.layout import Tensor
from weightsync.orchestrator.protocol.names import Member

MIB = 1 << 20


def test_totals_edges_and_ends(plan):
    found = explain(plan, {"slow": CostModel(1.0, MIB)})
    assert found.moved.direct_bytes == 4 * MIB
    assert found.moved.packed_bytes == 4 * 4 * 512
    assert found.moved.descriptors == 8
    assert [(e.source, e.target) for e in found.edges] == [
        ("trainer/0", "a/0"), ("trainer/0", "b/0"), ("trainer/1", "a/0"), ("trainer/1", "b/0"),
    ]  # fmt: skip
    assert {(e.moved.packed_bytes, e.chunks, e.straight) for e in found.edges} == {(2048, 1, 1)}
    assert {e.landing for e in found.edges} == {"live: 2048 bytes stay there until all have come"}
    for end in (*found.senders, *found.receivers):
        assert end.peers == 2
        assert end.seconds["slow"] == pytest.approx(4 + 2 + 8 * 512 / MIB)
    assert found.seconds["slow"] == found.senders[0].seconds["slow"]
    assert "trainer/0 sends" in found.bottleneck["slow"]
    assert "descriptors, 2.004 s of bytes and 4.000 s of descriptors" in found.bottleneck["slow"]


def test_tensors_by_family_and_one_by_one(plan):
    found = explain(plan)
    assert [(t.name, t.tensors, t.slot, t.sources, t.targets) for t in found.tensors] == [
        ("model.layers.*.w", 2, "sharded", 2, 2),
        ("model.layers.*.norms.*.weight", 8, "gathered", 2, 2),
    ]
    large, small = found.tensors
    assert large.how == "direct: 1048576 bytes in 1 run; a run of 572000 bytes or more is worth a descriptor"
    assert small.how == "packed: 512 bytes in 1 run; below 572000 bytes a run is worth packing"
    assert small.reason == "512 bytes; a rank has it"
    every = explain(plan, every_tensor=True)
    assert len(every.tensors) == 10
    assert sum(t.moved.bytes for t in every.tensors) == plan.bytes
    assert {t.reason for t in every.tensors if "layers.1.norms" in t.name} == {"512 bytes; rank 1 has it"}


def test_what_could_have_been_packed_but_was_not_says_why():
    tensor = Tensor("norm", "float32", (4,))
    builders = [Builder(Member("trainer", "", 0)), Builder(Member("inference", "e", 0))]
    for builder in builders:
        builder.dense((tensor, ((0,), (4,))))
    source, target = (b.party() for b in builders)
    (report,) = explain(make_plan([source], [target])).tensors
    assert report.how.startswith("direct: 16 bytes in 1 run; no ring or landing")


@pytest.mark.parametrize(
    ("lands", "landing", "chunks", "straight", "said"),
    [
        ("live", 2048, 13, 0, "live: 6400 bytes pass 4 places of 512 4 times"),
        ("live", 0, 0, 200, ""),
        ("flip", 1 << 16, 1, 0, "flip: 6400 bytes pass 1 places of 8192 once"),
        ("copy", 0, 1, 0, "copy: 6400 bytes stay there until all have come"),
    ],
)
def test_edges_say_how_many_descriptors_they_take_and_how_they_land(lands, landing, chunks, straight, said):
    """200 norms of 32 bytes, in the target in the other order."""
    norms = [Tensor(f"model.layers.0.norms.{n}", "bfloat16", (16,)) for n in range(200)]
    source, target = Builder(Member("trainer", "", 0), 1 << 16), Builder(Member("inference", "e", 0), landing, lands)
    for tensor in norms:
        source.dense((tensor, ((0,), (16,))))
    for tensor in norms[::-1]:
        target.dense((tensor, ((0,), (16,))))
    found = explain(make_plan([source.party()], [target.party()]))
    (edge,) = found.edges
    assert (edge.chunks, edge.straight, edge.landing) == (chunks, straight, said)
    assert said in explanation_text(found, top=3)


def test_an_empty_plan_can_be_explained_and_simulated():
    plan = make_plan([Builder(Member("trainer", "", 0)).party()], [])
    assert "nothing moves" in explanation_text(explain(plan), top=3)
    assert simulate(plan, Hardware()).best_seconds == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.experts.3.w1", "model.layers.*.mlp.experts.*.w1"),
        ("blocks.1.2.norm3", "blocks.*.*.norm3"),
        ("h.0", "h.*"),
    ],
)
def test_families(name, expected):
    assert family(name) == expected


def test_engines_say_how_versions_land_in_them_and_why():
    tensor = Tensor("norm", "float32", (4,))
    source, target = Builder(Member("trainer", "", 0)), Builder(Member("inference", "e", 0), lands="copy")
    for builder in (source, target):
        builder.dense((tensor, ((0,), (4,))))
    party = target.party()
    party = Party(party.member, 1, msgspec.structs.replace(party.layout, lands_because="room enough"))
    found = explain(make_plan([source.party()], [party]))
    (landing,) = found.landings
    assert (landing.engine, landing.mode, landing.ranks, landing.because) == ("e", "copy", 1, "room enough")
    assert landing.bytes == party.layout.regions[party.layout.staging].length
    assert "ENGINE  LANDS  RANKS  LANDING  WHY\ne       copy   1" in explanation_text(found, 5)
