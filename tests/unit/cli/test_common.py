"""Exit codes have one home, and the help and the operators' page say what it says."""

from argparse import ArgumentParser
from pathlib import Path

import pytest
from weightsync.orchestrator.cli.common import Exit, add_config_option, exit_codes_text

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"


def test_the_operators_page_has_each_exit_code_as_it_is() -> None:
    _, _, section = PAGE.read_text().partition("\n## Exit codes\n")
    table = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert table[2:] == [f"| {code.value} | {code.of} | {code.meaning} | {code.again} |" for code in Exit]


def test_the_help_has_each_exit_code() -> None:
    lines = exit_codes_text().splitlines()
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" " * 7)] == [str(code.value) for code in Exit]
    assert max(map(len, lines)) <= 110
    words = " ".join(exit_codes_text().split())
    for code in Exit:
        assert code.meaning.replace("`", "") in words


def test_an_exit_code_is_the_number() -> None:
    assert (Exit.OK, Exit.CONFIG, Exit(75)) == (0, 78, Exit.TEMPORARY)


def test_the_configuration_comes_from_the_environment_or_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_CONFIG", "/a.yaml")
    parser = ArgumentParser()
    add_config_option(parser)
    assert parser.parse_args([]).config == Path("/a.yaml")
    assert parser.parse_args(["--config", "/b.yaml"]).config == Path("/b.yaml")
    monkeypatch.delenv("WEIGHTSYNC_CONFIG")
    parser = ArgumentParser(exit_on_error=False)
    add_config_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([])
