"""What cannot be believed in the run directory, said once and in few words, however much of it there is."""

import dataclasses
from collections.abc import Iterator
from typing import Final

from weightsync.orchestrator.protocol.markers import BROADCASTS
from weightsync.orchestrator.protocol.text import clean

SHOWN: Final = 16
"""Problems with the same fix that are told one by one; of more, one stands for all."""


@dataclasses.dataclass(frozen=True, slots=True)
class MarkerProblem:
    """Something in the run directory that cannot be believed: its path, what is wrong, and what to do about it."""

    path: str
    what: str
    fix: str

    def __str__(self) -> str:
        return clean(f"{self.path}: {self.what}. Fix: {self.fix}")


class Problems:
    """All there are now, by the place that they were found at: a step, or None for what belongs to none."""

    def __init__(self) -> None:
        self._at: dict[int | None, tuple[MarkerProblem, ...]] = {}
        self._alike: dict[str, dict[MarkerProblem, None]] = {}
        self._told: set[MarkerProblem | str] = set()

    def put(self, place: int | None, found: tuple[MarkerProblem, ...]) -> None:
        """``found`` is all that is wrong there now."""
        for problem in self._at.pop(place, ()):
            self._alike[problem.fix].pop(problem, None)
        if found:
            self._at[place] = found
        for problem in found:
            self._alike.setdefault(problem.fix, {})[problem] = None

    def clear(self) -> None:
        """Nothing is wrong."""
        self._at.clear()
        self._alike.clear()

    def shown(self) -> tuple[MarkerProblem, ...]:
        """All of them in short."""
        return tuple(sorted((problem for _, problem in self._in_short()), key=str))

    def news(self) -> tuple[MarkerProblem, ...]:
        """Those of ``shown`` that were not told since they are there."""
        new = {key: problem for key, problem in self._in_short() if key not in self._told}
        # What is there and is told in short by now is not said again when it can be told by itself once more.
        self._told = {key for key in self._told if self._is_there(key)} | new.keys()
        return tuple(sorted(new.values(), key=str))

    def _in_short(self) -> Iterator[tuple[MarkerProblem | str, MarkerProblem]]:
        for fix, alike in self._alike.items():
            if len(alike) <= SHOWN:
                yield from ((problem, problem) for problem in alike)
            else:
                first = next(iter(alike))
                what = f"{len(alike)} places have the same remedy, one of them {first.path}, {first.what}"
                yield fix, MarkerProblem(BROADCASTS, what, fix)

    def _is_there(self, key: MarkerProblem | str) -> bool:
        return bool(self._alike.get(key)) if isinstance(key, str) else key in self._alike.get(key.fix, ())
