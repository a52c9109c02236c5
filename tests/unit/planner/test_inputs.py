"""The cost model."""

import pytest
from weightsync.orchestrator.planner import CostModel


def test_a_descriptor_is_worth_what_wire_or_copy_moves_meanwhile():
    assert CostModel(1e-6, 2e9, 1e9).pack_below_bytes == pytest.approx(1000)
    assert CostModel(1e-6, 2e9, 8e9).pack_below_bytes == pytest.approx(2000)


def test_seconds_add_descriptors_and_bytes():
    assert CostModel(1e-6, 2e9).seconds(3, 4_000_000_000) == pytest.approx(2.000003)
