"""The transfers of all engines, one engine after the other."""

from layouts import matrices, party_of, trainer
from weightsync.orchestrator.forecast.transfers import transfers_of
from weightsync.orchestrator.planner import Plan, make_plan

MIB = 1 << 20


def test_columns_of_two_engines(plan: Plan):
    """Each source sends its matrix and four norms to both engines; the matrices go straight, the norms packed."""
    found = transfers_of(plan)
    assert [str(t.party.member) for t in found.targets] == ["a/0", "b/0"]
    assert found.target.tolist() == [0] * 10 + [1] * 10
    assert found.source.tolist() == ([0] * 5 + [1] * 5) * 2
    assert found.group.tolist() == found.source.tolist(), "a layer each"
    assert sorted(found.size[:5].tolist()) == [512] * 4 + [MIB]
    assert found.packed.tolist() == (found.size == 512).tolist()
    assert found.runs.tolist() == [1] * 20
    assert found.descriptors.sum() == 8, "per edge the matrix's, and one for all norms"


def test_a_plan_without_engines_has_no_transfers():
    found = transfers_of(make_plan([party_of(trainer(0), matrices(1))], []))
    assert found.targets == ()
    assert len(found.source) == len(found.size) == len(found.packed) == 0
