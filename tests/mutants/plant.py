"""Plants bugs, one at a time, into a copy of the daemon or of the agents, and runs tests against it that must fail.

``python tests/mutants/plant.py`` runs all of them, ``… NAME …`` those with such a word in their names.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Final

ROOT: Final = Path(__file__).parents[2]

PARTS: Final = frozenset({"orchestrator", "agents", "kernels"})

CORE: Final = "tests/unit/core"
BAD_ENGINE: Final = "tests/sim/test_one_bad_engine.py"
HISTORIES: Final = "tests/sim/test_histories.py"
FLEET: Final = "tests/sim/test_fleet.py"
EVERYTHING: Final = (CORE, HISTORIES, BAD_ENGINE, FLEET)

SEEDS: Final = 16
"""Of the simulation, which each bug has to be caught within."""

SECONDS: Final = 600.0
"""For the tests of one bug."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: in ``file``, below ``part``, ``old`` becomes ``new``. ``tests`` are those that catch it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = EVERYTHING
    part: str = "orchestrator"

    @property
    def path(self) -> Path:
        """The file as it is."""
        return ROOT / self.part / self.file

    def applied(self) -> str:
        """The file with the bug in it.

        Raises:
            ValueError: the place is not there, or there are several.
        """
        text = self.path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {text.count(self.old)} times {self.old!r}")
        return text.replace(self.old, self.new)


def in_agents(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A bug of an agent. ``tests``: below ``tests/unit/agents``; by default the file's own."""
    folder, _, module = file.rpartition("/")
    chosen = tests or (f"{folder}/test_{module}",)
    return Mutant(name, file, old, new, tuple(f"tests/unit/agents/{each}" for each in chosen), "agents")


@dataclass(frozen=True, slots=True)
class Result:
    """``caught``: some test failed; ``by``: the first one that did, or what pytest said last."""

    caught: bool
    by: str


def run(mutant: Mutant) -> Result:
    """Run the mutant's tests against a copy with the bug; they stop at the first failure."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        package = Path(scratch) / "weightsync"
        copytree(ROOT / mutant.part, package / mutant.part, ignore=lambda *_: ["__pycache__"])
        for beside in PARTS - {mutant.part}:
            (package / beside).symlink_to(ROOT / beside)
        (package / mutant.part / mutant.file).write_text(mutant.applied())
        environment = {
            **os.environ,
            "PYTHONPATH": scratch,  # before what is installed
            "PYTHONDONTWRITEBYTECODE": "1",
            "WEIGHTSYNC_SIM_SEEDS": str(SEEDS),
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *mutant.tests]
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    failed = [line for line in ended.stdout.splitlines() if line.startswith("FAILED")]
    last = (ended.stdout.strip().splitlines() or [ended.stderr.strip()])[-1]
    return Result(ended.returncode == 1 and bool(failed), failed[0].split(" - ")[0] if failed else last)


def main(words: Iterable[str]) -> int:
    """One line for each bug; the exit code says whether all were caught."""
    from planted import PLANTED

    chosen = [mutant for mutant in PLANTED if not words or any(word in mutant.name for word in words)]
    missed = 0
    for mutant in chosen:
        result = run(mutant)
        missed += not result.caught
        print(f"{'caught' if result.caught else 'MISSED'}  {mutant.name}: {result.by}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
