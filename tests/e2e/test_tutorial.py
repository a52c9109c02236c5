"""docs/tutorial.md followed from its first command to its last, but for the installation, by a reader in a clone."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port
from tutorial import PLACES, ROOT, blocks

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]

FAILS = {"status": 75, "rounds": 75}
"""Commands that end so, as the tutorial says: there is no daemon any more."""


def script(tmp_path: Path) -> str:
    """All blocks but ``make setup``, with directories and ports of this test; what fails says so on a line."""
    setup, *others = blocks()
    assert setup == "make setup\n"
    text = "\n".join(others)
    for place in PLACES:
        text = text.replace(place, str(tmp_path / Path(place).name))
    for port in ("8000", "7410"):
        text = text.replace(f":{port}", f":{(ours := free_port())}").replace(f"--port {port}", f"--port {ours}")
        if port == "7410":  # the default, which the reader has free
            text = text.replace("state_directory: state\n", f"state_directory: state\nlisten: {{port: {ours}}}\n")
    if before := os.environ.get("PYTHONPATH"):
        text = text.replace("PYTHONPATH=", f"PYTHONPATH={before}:")
    return f"""trap 'echo "FAILED $? $BASH_COMMAND"' ERR\n{text}"""


def test_every_command_does_what_the_tutorial_says(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / ".venv").symlink_to(sys.prefix)
    (clone / "tests").symlink_to(ROOT / "tests")
    out = tmp_path / "out"
    with out.open("wb") as log:
        reader = subprocess.Popen(
            ["bash", "-c", script(tmp_path)], cwd=clone, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        reader.wait(1100)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # daemon and server, if it did not come to its last block
            try:
                os.killpg(reader.pid, number)
            except ProcessLookupError:
                break
    told = out.read_text(errors="replace")
    failed = {words[0]: int(code) for code, words in _failures(told)}
    assert failed.pop("doctor", 1) == 1, told  # of this machine it may have nothing to say
    assert failed == FAILS, told
    assert re.search(r"^identical: ", told, re.MULTILINE), told
    assert "version 1 is commit 1\n" in told
    assert "weights: whole, and verified." in told
    broadcasts = tmp_path / "weightsync-by-hand" / "run" / "broadcasts"
    assert (broadcasts / "step_1" / "COMMITTED").exists()
    assert (tmp_path / "rounds.html").read_text().startswith("<!")


def _failures(told: str) -> list[tuple[str, list[str]]]:
    """Code and words behind the program of each command that failed."""
    return [(code, words.split()[1:]) for code, words in re.findall(r"^FAILED (\d+) (.+)$", told, re.MULTILINE)]
