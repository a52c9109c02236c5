"""Which steps wait for the daemon: a scan whose cost does not grow with the number of steps, and that nothing stops.

Every scan looks at the steps that somebody waits for: those that a look was asked for, those whose STABLE has no
outcome yet, and the newest. Of all others, which are settled, it looks at some in turn, for a few milliseconds; so what
changes in them by hand is noticed within minutes, and what the trainer does at once, because a look is asked for.
"""

import bisect
import errno
import heapq
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightsync.orchestrator.daemon.run_directory.listing import Identity, Listing
from weightsync.orchestrator.daemon.run_directory.markers import (
    Step,
    open_broadcasts,
    open_directory,
    read_markers,
    unreadable,
)
from weightsync.orchestrator.daemon.run_directory.problems import MarkerProblem, Problems
from weightsync.orchestrator.protocol.markers import BROADCASTS, step_name

NEWEST: Final = 256
"""Steps of the highest numbers that every scan looks at."""

ASKED: Final = 16
"""Steps that were asked for last, which every scan looks at, whatever their numbers: a trainer may have gone back."""

MAX_WAITING: Final = 128
"""Steps that wait for an outcome and are told of beside those that were asked for, those of the youngest STABLE. One or
two do; more are left from earlier trainers."""

REREAD: Final = 64
"""On a network file system: of the newest steps without STABLE, so many are read anew at each scan."""

IN_TURN_SECONDS: Final = 0.02
"""Of each scan for the other steps: a look that comes meanwhile waits so long."""

TURN_SECONDS: Final = 1.0
"""Between two times that steps which are known already are looked at in turn."""

QUICK_SECONDS: Final = 0.02
"""A listing that took longer is not made again until ten times as long has passed: a directory of 100,000 steps takes
0.1 s, one on a network file system takes longer. What the trainer makes meanwhile is asked for."""

SETTLED_NANOSECONDS: Final = 2_000_000_000
"""A directory younger than this is read again, because its time stamp may be too coarse to show another change."""


@dataclass(frozen=True, slots=True)
class Scan:
    """Steps with a STABLE that has no outcome yet, ascending, and the problems not reported by an earlier scan.

    ``unread``: there are steps that no scan has come to yet.
    """

    waiting: tuple[Step, ...]
    problems: tuple[MarkerProblem, ...]
    unread: bool = False


class MarkerDirectory:
    """The markers of run ``run_id`` below ``run_directory``. Blocking; call it from one thread at a time.

    ``network``: time stamps of directories cannot be trusted, because the file system's client keeps them for a while.

    ``problems``: everything that cannot be believed, reported before or not.
    """

    def __init__(
        self,
        run_directory: Path,
        run_id: str,
        *,
        network: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_directory = run_directory
        self.problems: tuple[MarkerProblem, ...] = ()
        self._run_id, self._network, self._clock = run_id, network, clock
        self._listing, self._problems = Listing(), Problems()
        self._unchanged: dict[int, Identity] = {}
        """Steps that need not be read again as long as they are these."""
        self._waiting: dict[int, Step] = {}
        self._bare: set[int] = set()
        """Steps without STABLE."""
        self._list_at = 0.0
        """Not before this time are the steps listed anew."""
        self._unread: list[int] = []
        """Steps that were never read, ascending."""
        self._asked: dict[int, None] = {}
        self._turn: float = float("inf")
        """The next step in turn is below this one …"""
        self._turn_at = 0.0
        """… and not before this time."""

    def scan(self) -> Scan:
        """What waits for the daemon. Never raises OSError."""
        try:
            with open_broadcasts(self.run_directory) as root:
                self._list(root)
                anew = self._reread()
                for step in self._first() | anew:
                    self._look(root, step, step in anew)
                self._look_in_turn(root)
        except OSError as error:
            self._nothing(error)
        return self._result()

    def look(self, step: int) -> Scan:
        """As ``scan``, after a look at this step alone; every scan from now on looks at it, too."""
        self._asked.pop(step, None)
        self._asked[step] = None
        while len(self._asked) > ASKED:
            del self._asked[next(iter(self._asked))]
        try:
            with open_broadcasts(self.run_directory) as root:
                self._look(root, step, self._network)
        except OSError as error:
            self._nothing(error)
        return self._result()

    # ------------------------------------------------------------------------------------------------ what to look at
    def _list(self, root: int) -> None:
        began = self._clock()
        if began < self._list_at:
            return
        found = os.fstat(root)
        trusted = not self._network and time.time_ns() - found.st_mtime_ns > SETTLED_NANOSECONDS
        come, gone = self._listing.refresh(root, (found.st_ino, found.st_mtime_ns) if trusted else ())
        took = self._clock() - began
        self._list_at = began + 11 * took if took > QUICK_SECONDS else 0.0
        for step in gone:
            self._forget(step)
        if come or gone:
            self._unread = sorted((come | set(self._unread)) - gone)
        self._problems.put(None, (*self._listing.problems, *_left_over(len(self._waiting))))

    def _first(self) -> set[int]:
        return {*self._asked, *(step.step for step in self._told()), *self._listing.steps[-NEWEST:]}

    def _reread(self) -> set[int]:
        return {*self._asked, *heapq.nlargest(REREAD, self._bare)} if self._network else set()

    def _look_in_turn(self, root: int) -> None:
        until = self._clock() + IN_TURN_SECONDS
        while self._unread and self._clock() < until:
            self._look(root, self._unread.pop())
        if self._unread or self._clock() < self._turn_at:
            return
        steps = self._listing.steps[:-NEWEST]
        for step in reversed(steps[: bisect.bisect_left(steps, self._turn)]):
            if self._clock() >= until:
                break
            self._look(root, step)
            self._turn = step
        else:
            self._turn = float("inf")
        self._turn_at = self._clock() + TURN_SECONDS

    # ------------------------------------------------------------------------------------------------------ one step
    def _look(self, root: int, step: int, anew: bool = False) -> None:
        """``anew``: open it in any case, because that makes a network file system ask its server."""
        name = step_name(step)
        try:
            identity, problem = _identity(name, root)
            if identity == self._unchanged.get(step) and not anew:
                return
            if problem is not None:
                self._book(Step(step), (problem,), identity)
                return
            with open_directory(name, root) as directory:
                found, problems = read_markers(directory, step, self._run_id)
        except OSError as error:
            self._forget(step)
            self._problems.put(step, () if error.errno == errno.ENOENT else (unreadable(_path(step), error),))
        else:
            self._book(found, problems, identity)

    def _book(self, found: Step, problems: tuple[MarkerProblem, ...], identity: Identity) -> None:
        step = found.step
        self._problems.put(step, problems)
        if found.settled:
            self._waiting.pop(step, None)
        else:
            self._waiting[step] = found
        if found.stable is None:
            self._bare.add(step)
        else:
            self._bare.discard(step)
        newest = max(identity[1::2])  # the change times; inodes stand between them
        if time.time_ns() - newest > SETTLED_NANOSECONDS:
            self._unchanged[step] = identity
        else:
            self._unchanged.pop(step, None)

    def _forget(self, step: int) -> None:
        self._unchanged.pop(step, None)
        self._waiting.pop(step, None)
        self._bare.discard(step)
        self._problems.put(step, ())

    def _nothing(self, error: OSError) -> None:
        """The directory cannot be read: nothing of what was known counts."""
        self._listing, self._unread = Listing(), []
        self._unchanged, self._waiting, self._bare = {}, {}, set()
        self._problems.clear()
        # A run without broadcasts/ has published nothing yet; that is no problem.
        if not self.run_directory.is_dir():
            self._problems.put(None, (unreadable(str(self.run_directory), error),))
        elif error.errno != errno.ENOENT:
            self._problems.put(None, (unreadable(BROADCASTS, error),))

    # -------------------------------------------------------------------------------------------------------- results
    def _told(self) -> list[Step]:
        asked = [step for step in self._waiting.values() if step.step in self._asked]
        others = (step for step in self._waiting.values() if step.step not in self._asked)
        return [*asked, *heapq.nlargest(MAX_WAITING, others, key=_age)]

    def _result(self) -> Scan:
        waiting = tuple(sorted(self._told(), key=lambda step: step.step))
        self.problems = self._problems.shown()
        return Scan(waiting, self._problems.news(), bool(self._unread))


def _age(step: Step) -> int:
    return step.stable.modified_ns if step.stable is not None else 0


def _left_over(waiting: int) -> tuple[MarkerProblem, ...]:
    if waiting <= MAX_WAITING:
        return ()
    what = f"more than {MAX_WAITING} steps have a STABLE without an outcome, the youngest are considered"
    return (MarkerProblem(BROADCASTS, what, "remove the step directories of earlier trainers"),)


def _path(step: int) -> str:
    return f"{BROADCASTS}/{step_name(step)}"


def _identity(name: str, root: int) -> tuple[Identity, MarkerProblem | None]:
    """What changes when an entry of the directory does, or when STABLE is touched: inode and change time of both.

    And the problem of what is no directory. Raises OSError.
    """
    of_directory = os.stat(name, dir_fd=root, follow_symlinks=False)
    identity = (of_directory.st_ino, of_directory.st_mtime_ns)
    if not stat.S_ISDIR(of_directory.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(of_directory.st_mode) else "no directory"
        return identity, MarkerProblem(f"{BROADCASTS}/{name}", f"is {kind}, ignored", "make it a real directory")
    try:
        stable = os.stat(f"{name}/STABLE", dir_fd=root, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        return identity, None
    return (*identity, stable.st_ino, stable.st_mtime_ns, stable.st_size), None
