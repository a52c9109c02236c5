"""The same seed happens in the same way in every process, whatever the hashes of names are there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

SEEDS: Final = ("6", "18", "30", "50")
"""In which engines are left out together, and several edges die at once: what is said to many is said in some order."""


def _traces(hash_seed: str) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).with_name("traces.py")), *SEEDS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_same_seed_happens_in_the_same_way_whatever_the_hashes_of_names_are() -> None:
    first, second = _traces("1"), _traces("2")
    assert [line.split()[0] for line in first] == [*SEEDS]
    assert first == second
