"""Explanations and predictions, against numbers worked out by hand."""

import msgspec
import pytest
from layouts import Builder
from weightsync.orchestrator.forecast.explain import explain, family
from weightsync.orchestrator.forecast.simulate import Hardware, simulate
from weightsync.orchestrator.forecast.text import explanation_text, simulation_text, size
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.layout import Note, Tensor
from weightsync.orchestrator.protocol.names import Member

MIB = 1 << 20


@pytest.fixture
def plan():
    """Two sources with a layer each, and two engines; 1 MiB matrices go straight, norms of 512 bytes are packed."""
    sources, layers = [], []
    for rank in range(2):
        builder = Builder(Member("trainer", "", rank), 1 << 16)
        layer = [Tensor(f"model.layers.{rank}.w", "bfloat16", (512, 1024))]
        layer += [Tensor(f"model.layers.{rank}.norms.{i}.weight", "float32", (128,)) for i in range(4)]
        for tensor in layer:
            builder.dense((tensor, ((0,) * len(tensor.shape), tensor.shape)))
        party = builder.party()
        notes = (Note(0, 1, "sharded", "stands alone"), Note(1, 5, "gathered", f"512 bytes; rank {rank} has it"))
        layout = msgspec.structs.replace(party.layout, notes=notes)
        sources.append(Party(party.member, 1, layout))
        layers.append(layer)
    targets = []
    for engine in "ab":
        builder = Builder(Member("inference", engine, 0), 1 << 16)
        for tensor in (*layers[0][::-1], *layers[1][::-1]):
            builder.dense((tensor, ((0,) * len(tensor.shape), tensor.shape)))
        targets.append(builder.party())
    return make_plan(sources, targets)


def test_totals_edges_and_ends(plan):
    found = explain(plan, {"slow": CostModel(1.0, MIB)})
    assert found.moved.direct_bytes == 4 * MIB
    assert found.moved.packed_bytes == 4 * 4 * 512
    assert found.moved.descriptors == 8
    assert [(e.source, e.target) for e in found.edges] == [
        ("trainer/0", "a/0"), ("trainer/0", "b/0"), ("trainer/1", "a/0"), ("trainer/1", "b/0"),
    ]  # fmt: skip
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
    assert report.how.startswith("direct: 16 bytes in 1 run; no staging")


def test_text_and_json_say_the_same(plan):
    found = explain(plan)
    text = explanation_text(found, top=1)
    assert plan.root in text
    assert "tensors (1 of 2, largest first)" in text
    assert "model.layers.*.norms" not in text
    data = msgspec.json.decode(msgspec.json.encode(found))
    assert data["root"] == plan.root
    assert data["moved"]["direct_bytes"] == 4 * MIB
    assert data["tensors"][1]["slot"] == "gathered"


def test_an_empty_plan_can_be_explained_and_simulated():
    plan = make_plan([Builder(Member("trainer", "", 0)).party()], [])
    assert "nothing moves" in explanation_text(explain(plan), top=3)
    assert simulate(plan, Hardware()).best_seconds == 0.0


def test_incast_and_shared_nics_limit_a_simulated_fleet():
    """16 senders of 1 MiB each into one rank: its one NIC takes the sum, whatever the senders can do."""
    tensors = [Tensor(f"model.layers.{r}.w", "bfloat16", (512, 1024)) for r in range(16)]
    sources = []
    for rank, tensor in enumerate(tensors):
        builder = Builder(Member("trainer", "", rank))
        builder.dense((tensor, ((0, 0), tensor.shape)))
        sources.append(builder.party())
    builder = Builder(Member("inference", "e", 0))
    for tensor in tensors:
        builder.dense((tensor, ((0, 0), tensor.shape)))
    plan = make_plan(sources, [builder.party()])
    hardware = Hardware(nic_gbps=8e-3 * 1.048576, efficiency=1.0, alpha_seconds=0.0)
    found = simulate(plan, hardware)
    assert found.best_seconds == pytest.approx(16.0)
    assert found.worst_seconds == pytest.approx(16.0), "one sender per layer: lockstep costs nothing here"
    assert found.bottleneck == "NIC in of NIC 16: 0.02 GB, from 16 senders"
    limits = {limit.what: limit for limit in found.limits}
    assert limits["NIC out"].seconds == pytest.approx(1.0)
    shared = simulate(plan, Hardware(hardware.nic_gbps, nics_per_node=1, efficiency=1.0, alpha_seconds=0.0))
    assert {limit.what: limit for limit in shared.limits}["NIC out"].seconds == pytest.approx(8.0)
    assert "NIC in" in simulation_text(found)


def test_ranks_of_one_node_use_nvlink(plan):
    hardware = Hardware(gpus_per_node=8, nvlink_bytes_per_second=float(MIB))
    assert simulate(plan, hardware).wire_bytes == plan.bytes, "trainer and engines are on nodes of their own"


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


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2.16e12, "2.16 TB")])
def test_sizes(count, text):
    assert size(count) == text
