"""Predictions, against numbers worked out by hand; and against what was measured and published, of which none is off by
more than a stated factor."""

import json
from pathlib import Path

import pytest
from layouts import Builder, engine_rank, party_of, trainer
from weightsync.orchestrator.forecast.explain import LINKS
from weightsync.orchestrator.forecast.published_models import GEOMETRIES
from weightsync.orchestrator.forecast.simulate import Hardware, Simulation, simulate
from weightsync.orchestrator.forecast.synthetic_fleets import (
    EngineFleet,
    TrainerFleet,
    engine_parties,
    trainer_parties,
)
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


# ------------------------------------------------------------------------------------------- against what was seen
FACTOR = 1.25
"""Between a prediction and a fleet's wire; runs differ by as much from one day to the next."""

GPU_FACTOR = 1.5
"""Of a write of milliseconds within one GPU, where waking up and polling count."""

SENDERS, RECEIVERS = 64, 32

MEASURED = Path(__file__).parents[3] / "docs/performance/gpu.jsonl"


def within(factor: float, predicted: float, seen: float) -> bool:
    return 1 / factor <= predicted / seen <= factor


@pytest.fixture(scope="module")
def glm5() -> Simulation:
    """64 ranks to two engines of 16, of the published widths but twelve layers deep: rates do not depend on depth."""
    geometry = GEOMETRIES["glm-5"]
    sources = trainer_parties(geometry, TrainerFleet(8, 8), layers=12)
    return simulate(make_plan(sources, engine_parties(geometry, EngineFleet(2, 16), layers=12)), Hardware())


def test_prime_rl_64_to_32_h200(glm5: Simulation) -> None:
    """PR #3341, GLM-5.2: 82.5 GB arrive at each of 32 GPUs in 1.864 s (median)."""
    rate = glm5.bytes / RECEIVERS / glm5.best_seconds
    assert within(FACTOR, 82.5e9 / rate, 1.864)
    assert "NIC in" in glm5.bottleneck, "32 ports take what 64 send"


def test_prime_rl_on_12_nodes(glm5: Simulation) -> None:
    """PR #2326, GLM-5.1, eight trainer nodes and four of engines: each sending rank wrote at 7.0 to 7.6 GB/s over the
    whole transfer, layer by layer with a drain between, and at 18 to 22 GB/s while it wrote."""
    at_once, in_lockstep = (glm5.bytes / SENDERS / seconds / 1e9 for seconds in (glm5.best_seconds, glm5.worst_seconds))
    assert within(FACTOR, at_once, (18 + 22) / 2)
    assert within(FACTOR, in_lockstep, (7.0 + 7.6) / 2)


def test_our_own_push_within_one_gpu() -> None:
    """A 2 GB version from a trainer to the vLLM beside it, as filed by ``make bench-gpu``."""
    figures = {line["figure"]: line["value"] for line in map(json.loads, MEASURED.read_text().splitlines())}
    predicted = LINKS["same_gpu"].seconds(figures["gpu_push_descriptors"], figures["gpu_push_bytes"])
    assert within(GPU_FACTOR, predicted * 1e3, figures["gpu_push_wire_ms"])


@pytest.mark.parametrize(
    ("link", "descriptors", "size", "seconds"),
    [
        ("same_gpu", 1, 1 << 30, (1 << 30) / 1947e9),
        ("same_gpu", 64, 1 << 30, (1 << 30) / 899e9),
        ("same_gpu", 512, 1 << 30, (1 << 30) / 148e9),
        ("same_gpu", 4096, 1 << 30, (1 << 30) / 21e9),
        ("nvlink", 435, 7.48e9, 20e-3),
        ("nvlink", 559_818 // 2, 3.74e9, 1.35),
    ],
)
def test_our_own_gpus_in_few_and_in_many_descriptors(link: str, descriptors: int, size: float, seconds: float) -> None:
    """Within an H200; from an H100 to another in a live round, and two ranks with strided boxes and no ring."""
    assert within(FACTOR, LINKS[link].seconds(descriptors, int(size)), seconds)
