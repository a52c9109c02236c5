"""The tests are tested: planted bugs are caught. ``make mutants`` plants all of them, this a few."""

import pytest
from plant import Mutant, run
from planted import PLANTED

SAMPLE = (
    "taint cleared by one restarted target",
    "pairs ignored",
    "invariants not called",
    "a commit told before it is durable",
    "RoundEnded before Committed",
    "a paused engine is not resumed",
    "a batch on torn weights passes the gate",
    "live memory that differs from what was verified is served",
)


def test_there_are_enough_bugs_and_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in PLANTED}) == len(PLANTED) >= 40
    assert set(SAMPLE) <= {mutant.name for mutant in PLANTED}


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_each_bug_has_its_place_in_the_code(mutant: Mutant) -> None:
    assert mutant.applied() != mutant.path.read_text()
    compile(mutant.applied(), mutant.file, "exec")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [m for m in PLANTED if m.name in SAMPLE], ids=lambda mutant: mutant.name)
def test_some_of_them_are_caught(mutant: Mutant) -> None:
    result = run(mutant)
    assert result.caught, result.by


def test_what_is_no_bug_is_not_caught() -> None:
    """Else a suite that fails for another reason would catch everything."""
    harmless = Mutant(
        "a comment", "core/machine.py", "def step(", "# planted\ndef step(", ("tests/unit/core/test_machine.py",)
    )
    result = run(harmless)
    assert not result.caught, result.by
