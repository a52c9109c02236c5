"""Completion by a real bash, and scripts that a real shell reads."""

import shutil
import subprocess
from pathlib import Path

import pytest
from weightsync.orchestrator.cli.completion import SHELLS, script, words_of
from weightsync.orchestrator.cli.main import parser


def completed(*words: str) -> set[str]:
    """What bash offers after ``words``, the last of which is being typed."""
    given = " ".join(f"'{word}'" for word in ("weightsync-orchestrator", *words))
    ask = (
        f"COMP_WORDS=({given}); COMP_CWORD={len(words)}; _weightsync_orchestrator; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    text = script(parser(), "bash") + ask
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_commands_actions_and_options() -> None:
    assert {"run", "status", "doctor", "config", "plan", "hold"} <= completed("")
    assert completed("doc") == {"doctor"}
    assert completed("config", "") == {"check", "schema", "example", "-h", "--help"}
    assert completed("config", "check", "--p") == {"--probe"}
    assert completed("maintenance", "o") == {"on", "off"}
    assert completed("plan", "explain", "--to") == {"--token-file", "--top"}
    assert completed("completion", "") >= {"bash", "zsh", "fish"}


def test_bash_completes_files_where_an_option_takes_one(tmp_path: Path) -> None:
    (tmp_path / "prod.yaml").touch()
    assert completed("status", "--config", f"{tmp_path}/pr") == {f"{tmp_path}/prod.yaml"}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_in_every_script(shell: str) -> None:
    text = script(parser(), shell)
    for each in words_of(parser()):
        assert all(word in text for word in (*each.after, *each.plain))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, timeout=30, check=True)
