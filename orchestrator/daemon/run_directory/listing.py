"""Which step directories there are: told apart from what else lies below broadcasts/, listed only when that changed."""

import heapq
import os
from typing import Final

from weightsync.orchestrator.daemon.run_directory.problems import MarkerProblem
from weightsync.orchestrator.protocol.markers import BROADCASTS, parse_step

MAX_STEPS: Final = 100_000
"""Step directories that are watched, those of the highest numbers: a year of a step every five minutes."""

MAX_STRAYS: Final = 1000
"""Names that are none of ours and are kept as problems."""

Identity = tuple[int, ...]


class Listing:
    """``steps``: the numbers of the watched directories, ascending. ``problems``: what lies beside them."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.problems: tuple[MarkerProblem, ...] = ()
        self._names: set[str] = set()
        self._all: list[int] = []
        self._identity: Identity = ()

    def refresh(self, root: int, identity: Identity) -> tuple[set[int], set[int]]:
        """List the open directory ``root`` anew, unless its ``identity`` is that of the last time and not empty.

        Returns the steps that are watched since, and those that no longer are. Raises OSError.
        """
        if identity and identity == self._identity:
            return set(), set()
        names = set(os.listdir(root))
        self._identity = identity
        come, gone = names - self._names, self._names - names
        if not come and not gone:
            return set(), set()
        before = set(self.steps)
        removed = {parse_step(name) for name in gone}
        added = [step for name in come if (step := parse_step(name)) is not None]
        self._all = sorted([*(step for step in self._all if step not in removed), *added])
        self._names, self.steps = names, self._all[-MAX_STEPS:]
        after = set(self.steps)
        if len(names) > len(self._all):
            strays = (name for name in names if parse_step(name) is None and not name.startswith("."))
            self.problems = (*_crowd(len(self._all)), *(_stray(name) for name in heapq.nsmallest(MAX_STRAYS, strays)))
        else:
            self.problems = _crowd(len(self._all))
        return after - before, before - after


def _crowd(steps: int) -> tuple[MarkerProblem, ...]:
    if steps <= MAX_STEPS:
        return ()
    # Without their number, which grows: this is said once.
    what = f"more than {MAX_STEPS} step directories, only those of the highest numbers are watched"
    return (MarkerProblem(BROADCASTS, what, "remove old ones"),)


def _stray(name: str) -> MarkerProblem:
    fix = "name step directories step_<N>, N of 1 to 18 digits without leading zeros"
    return MarkerProblem(f"{BROADCASTS}/{name}", "wrongly named, ignored", fix)
