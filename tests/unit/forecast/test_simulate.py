"""Predictions, against numbers worked out by hand."""

import pytest
from layouts import Builder, engine_rank, party_of, trainer
from weightsync.orchestrator.forecast.simulate import Hardware, simulate
from weightsync.orchestrator.forecast.text import simulation_text
from weightsync.orchestrator.planner import make_plan
from weightsync.orchestrator.protocol.layout import Tensor
from weightsync.orchestrator.protocol.names import Member

MIB = 1 << 20


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


def test_what_ends_have_to_do_and_lockstep():
    """Two senders of a layer each to one rank: the receiver's NIC takes both, one layer after the other or not."""
    model = [Tensor(f"model.layers.{r}.w", "bfloat16", (512, 1024)) for r in range(2)]
    plan = make_plan([party_of(trainer(r), [model[r]]) for r in range(2)], [party_of(engine_rank("e"), model)])
    found = simulate(plan, Hardware(nic_gbps=8e-3 * 1.048576, efficiency=0.5, alpha_seconds=0.25))
    assert found.best_seconds == pytest.approx(4.0), "2 MiB at half a MiB per second"
    assert found.worst_seconds == pytest.approx(4.0)
    assert found.groups == 2
    assert found.bytes == found.wire_bytes == 2 * MIB
    limits = {limit.what: limit for limit in found.limits}
    assert limits["descriptors out"].seconds == pytest.approx(0.25)
    assert limits["NIC out"].seconds == pytest.approx(2.0)
    assert limits["NVLink out"].seconds == limits["NVLink in"].seconds == 0.0


def test_colocated_ranks_share_gpus_with_the_trainers():
    """Rank 0 of both keeps its layer on its GPU, and each takes the other's over NVLink."""
    model = [Tensor(f"model.layers.{r}.w", "bfloat16", (512, 1024)) for r in range(2)]
    engines = [party_of(engine_rank("e", rank), model) for rank in range(2)]
    plan = make_plan([party_of(trainer(r), [model[r]]) for r in range(2)], engines)
    hardware = Hardware(nvlink_bytes_per_second=MIB, gpu_bytes_per_second=4.0 * MIB, alpha_seconds=0.0, colocated=True)
    found = simulate(plan, hardware)
    assert found.wire_bytes == 0
    assert {limit.what: limit.seconds for limit in found.limits} == {
        "NIC out": 0.0, "NIC in": 0.0, "descriptors out": 0.0, "NVLink out": 1.0, "NVLink in": 1.0, "same GPU": 0.25,
    }  # fmt: skip
    assert ", the same ones, " in simulation_text(found)
