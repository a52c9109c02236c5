"""Doing what a plan says equals slicing the full tensors, byte for byte."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weightsync.orchestrator.core.plan import CostModel, make_plan


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), alpha=st.sampled_from([0.0, 1e-6, 1.0]))
def test_any_sharding_into_any_sharding(data, alpha, bench, fleet_strategy):
    sources, targets = data.draw(fleet_strategy)
    plan = make_plan(sources, targets, CostModel(alpha_seconds=alpha))
    full = bench.full_tensors(sources, seed=1)
    memory = bench.execute(plan, sources, targets, full)
    bench.assert_delivered(targets, full, memory)
