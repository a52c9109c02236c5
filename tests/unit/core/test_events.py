"""What the core asks of a plan's facts."""

from fleets import rank, trainer
from weightsync.orchestrator.core.events import Call, CallFailed, PlanFacts, PlanRejected

FLOWS = {
    (trainer(1), rank("e1", 0)): 5,
    (trainer(0), rank("e0", 1)): 7,
    (trainer(0), rank("e0", 0)): 7,
    (trainer(1), rank("e0", 0)): 9,
}


def test_writers_of_some_targets_and_only_their_edges() -> None:
    facts = PlanFacts("root", {}, FLOWS, True)
    assert facts.writers_of(frozenset({rank("e0", 0), rank("e0", 1)})) == {
        trainer(0): (rank("e0", 0), rank("e0", 1)),
        trainer(1): (rank("e0", 0),),
    }
    assert facts.writers_of(frozenset({rank("e1", 0)})) == {trainer(1): (rank("e1", 0),)}
    assert facts.writers_of(frozenset()) == {}


def test_a_failure_has_a_fault_unless_somebody_knows_better() -> None:
    failed = CallFailed(1, "e0", Call.PAUSE, 3, "reset")
    assert (failed.fault, failed.retry) == ("engine", True)
    assert PlanRejected(1, 3, "two shapes").fault == "config"
