"""What ``make families`` makes of processes that crash or hang; docs/models.md against the lines that it printed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from families import groups
from families.configs import DOZEN, FAMILIES
from families.document import BEGIN, END, PAGE, Line, read, table
from families.groups import Verdict, verdicts

FILED = Path(__file__).resolve().parents[2] / "docs" / "performance" / "families.jsonl"
LINES = read(FILED)


def test_the_table_is_made_of_the_filed_lines() -> None:
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0].strip() == table(LINES).strip()


def test_every_configuration_is_filed_once_at_each_degree() -> None:
    filed = Counter((line.family, line.tensor_parallel) for line in LINES)
    assert filed == Counter((name, degree) for name in FAMILIES for degree in (1, 2))


def test_the_filed_counts_are_those_of_the_lines() -> None:
    figures = {line["figure"]: line["value"] for line in map(json.loads, FILED.read_text().splitlines())}
    by_family = {name: {line.outcome for line in LINES if line.family == name} for name in FAMILIES}
    same = sum(outcomes == {"same"} for outcomes in by_family.values())
    wrong = sum("wrong" in outcomes for outcomes in by_family.values())
    assert (figures["families_same"], figures["families_wrong"]) == (same, wrong)
    assert figures["families_refused"] == len(FAMILIES) - same - wrong
    assert same >= 40


def test_nothing_is_refused_without_a_reason() -> None:
    assert all(bool(line.reason) == (line.outcome != "same") for line in LINES)


def test_what_the_tests_run_is_a_dozen_of_them() -> None:
    assert len(DOZEN) >= 12
    assert set(DOZEN) <= set(FAMILIES)


@pytest.mark.parametrize("outcome", ["same", "refused", "wrong"])
def test_a_line_reads_as_it_was_written(tmp_path: Path, outcome: str) -> None:
    line = Line("llama", 2, outcome, "" if outcome == "same" else "engine: a reason")
    (tmp_path / "lines.jsonl").write_text(line.json() + '\n{"figure": "families_same", "value": 1}\n')
    assert read(tmp_path / "lines.jsonl") == [line]


# ---------------------------------------------------------------------------------------- processes that crash or hang
JUDGE = """
import json, os, signal, sys, time
rank, world, port, directory, *families = sys.argv[1:]
with open(f"{directory}/rank_{rank}.jsonl", "a", buffering=1) as out:
    def say(**fields):
        out.write(json.dumps({"family": family} | fields) + chr(10))
    for family in families:
        what, _, stage = family.partition("@")
        say(stage=stage or "engine")
        if what == "raises":
            raise ValueError("a bug of the judge")
        if what == "crashes" and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fails" and rank == "1":
            say(failed="engine: a reason")
        if what in ("crashes", "hangs", "fails"):
            time.sleep(60)
        say(outcome="wrong" if what == "differs" and rank == "1" else "same", reason="" if what == "same" else "memory")
"""
"""A rank that does what the families' names say; only rank 1 crashes, fails or differs, the other waits for it."""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    monkeypatch.setattr(groups, "JUDGE", judge)
    monkeypatch.setattr(groups, "FAMILY_SECONDS", 5.0)
    monkeypatch.setattr(groups, "FAILED_SECONDS", 2.0)
    return tmp_path


@pytest.mark.e2e
def test_a_family_that_crashes_or_hangs_costs_only_itself(planted: Path) -> None:
    names = [
        "same",
        "crashes@engine",
        "crashes@write",
        "hangs@planner",
        "hangs@compare",
        "fails",
        "differs",
        "same@fresh engine",
    ]
    assert list(verdicts(names, 2, planted)) == [
        Verdict("same", 2, "same"),
        Verdict("crashes@engine", 2, "refused", "engine: rank 1 ended with -9"),
        Verdict("crashes@write", 2, "wrong", "write: rank 1 ended with -9"),
        Verdict("hangs@planner", 2, "refused", "planner: a rank waited for another for good"),
        Verdict("hangs@compare", 2, "wrong", "compare: a rank waited for another for good"),
        Verdict("fails", 2, "refused", "engine: a reason"),
        Verdict("differs", 2, "wrong", "memory"),
        Verdict("same@fresh engine", 2, "same"),
    ]


def test_a_bug_of_the_judge_is_no_verdict(planted: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the judge failed: rank \d ended with 1; see the logs in"):
        list(verdicts(["same", "raises"], 2, planted))
