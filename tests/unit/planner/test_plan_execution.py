"""Doing what a plan says equals slicing the full tensors, byte for byte."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import fleets
from msgspec import structs
from plan_executor import assert_delivered, execute, full_tensors
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.names import Member

ALPHAS = st.sampled_from([0.0, 1e-9, 1e-6, 1.0])
"""From never packing over packing the smallest to packing all."""

# A few random fleets need more choices than Hypothesis allows; it drops those.
drawn_fleets = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@drawn_fleets
@given(data=st.data(), alpha=ALPHAS)
def test_any_sharding_into_any_sharding(data, alpha):
    sources, targets = data.draw(fleets())
    plan = make_plan(sources, targets, CostModel(alpha_seconds=alpha))
    full = full_tensors(sources, seed=1)
    assert_delivered(targets, full, execute(plan, sources, targets, full))
    assert sum(send.bytes for send in plan.sends.values()) == plan.bytes


@drawn_fleets
@given(data=st.data(), alpha=ALPHAS, leaves=st.sampled_from(["live", "copy"]))
def test_from_an_engine_into_one_that_holds_the_same(data, alpha, leaves):
    """What the ranks of an engine need is what they hold, and what other ranks may be sent from it."""
    _, targets = data.draw(fleets())
    whole = [target for target in targets if target.member.engine == targets[0].member.engine]
    lenders = [Party(target.member, 1, structs.replace(target.layout, lands=leaves)) for target in whole]
    borrowers = [Party(Member("inference", "borrows", t.member.rank), 2, t.layout) for t in whole]
    plan = make_plan(lenders, borrowers, CostModel(alpha_seconds=alpha))
    full = full_tensors(lenders, seed=3)
    assert_delivered(borrowers, full, execute(plan, lenders, borrowers, full))


@drawn_fleets
@given(data=st.data(), alpha=ALPHAS)
def test_engines_that_come_and_go(data, alpha):
    sources, targets = data.draw(fleets())
    names = sorted({t.member.engine for t in targets})
    plan = None
    for _ in range(3):
        chosen = data.draw(st.permutations(names))[: data.draw(st.integers(1, len(names)))]
        present = [t for name in chosen for t in targets if t.member.engine == name]
        before, plan = plan, make_plan(sources, present, CostModel(alpha_seconds=alpha), plan)
        full = full_tensors(sources, seed=2)
        assert_delivered(present, full, execute(plan, sources, present, full))
        if before is not None:
            stayed = [t.member for t in present if t.member in before.parts]
            assert all(plan.part(member) == before.part(member) for member in stayed)
