"""The cost model."""

import pytest
from weightsync.orchestrator.planner import CostModel


def test_a_descriptor_is_worth_what_wire_or_copy_moves_meanwhile():
    assert CostModel(1e-6, 2e9, 1e9).pack_below_bytes("DRAM") == pytest.approx(1000)
    assert CostModel(1e-6, 2e9, 8e9).pack_below_bytes("DRAM") == pytest.approx(2000)


def test_out_of_a_gpu_the_wire_may_be_one_that_hides_little():
    """4.8 µs a descriptor and 366 GB/s between two GPUs of a host."""
    assert CostModel().pack_below_bytes("DRAM") == pytest.approx(13e-6 * 44e9)
    assert CostModel().pack_below_bytes("VRAM") == pytest.approx(4.8e-6 * 366e9)
    assert CostModel(1e-3, 1e10).pack_below_bytes("VRAM") == pytest.approx(1e7)


def test_seconds_add_descriptors_and_bytes():
    assert CostModel(1e-6, 2e9).seconds(3, 4_000_000_000) == pytest.approx(2.000003)
