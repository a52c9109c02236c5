"""How a problem reads."""

from pathlib import Path

from weightsync.orchestrator.settings.problems import (
    MAX_PROBLEMS,
    MAX_SHOWN_CHARS,
    ConfigError,
    Problem,
    closest,
    dotted,
    shown,
)


def test_a_problem_says_where_what_and_how_to_mend_it() -> None:
    assert str(Problem("a.b", "'x'", "is wrong", "mend it", 3)) == "line 3: a.b: is wrong (found 'x'). Fix: mend it"
    given = Problem("a", "", "is wrong", "mend it", 3, "WEIGHTSYNC__A")
    assert str(given) == "environment variable WEIGHTSYNC__A: a: is wrong. Fix: mend it"
    assert str(ConfigError(Path("f"), given, given)) == f"f: {given}\nf: {given}"


def test_keys_as_text() -> None:
    assert dotted(("engines", 0, "url")) == "engines[0].url"
    assert dotted(()) == ""


def test_values_are_cut_and_secrets_withheld() -> None:
    assert shown(("a",), 1) == "1"
    assert len(shown(("a",), "x" * 1000)) == MAX_SHOWN_CHARS
    assert shown(("a",), {"b": 1}) == "a mapping of 1"
    assert shown(("a",), [1, 2]) == "a list of 2"
    assert shown(("listen", "api_key"), "hunter2") == "a value that is not shown"
    assert shown(("listen", "token_file"), "path") == "'path'"
    assert shown(("credentials",), "path") == "'path'"


def test_the_key_that_was_meant() -> None:
    assert closest("rescan_secnds", ["rescan_seconds", "run"]) == "rescan_seconds"
    assert closest("xyz", ["rescan_seconds", "run"]) == ""


def test_many_problems_are_told_as_a_few_and_how_many_more() -> None:
    wrong = Problem("a", "", "is wrong", "mend it")
    lines = str(ConfigError(Path("f"), *[wrong] * (MAX_PROBLEMS + 7))).splitlines()
    assert lines == [f"f: {wrong}"] * MAX_PROBLEMS + ["f: … and 7 more"]


def test_a_problem_is_of_one_line_whatever_it_is_about() -> None:
    odd = Problem("a\n.\x1b", "'\ud800'", "is wrong", "mend it", variable="W" * 1000)
    assert str(ConfigError(Path("f\n"), odd)).isprintable()
    assert len(str(odd)) < 600
