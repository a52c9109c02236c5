"""The window: one round in a worker, from the moment the worker stands still until the daemon lets it go.

While the worker's main thread is in here it can run no batch; that is the proof of quiescence. The agent's thread
hands it what is to be done (scatter, refresh, digest on the main thread) and the end.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.messages import Abort, Commit, EngineStatus, Verified, Verify
from weightsync.orchestrator.protocol.names import RoundName, Version

REMEMBERED_ROUNDS: Final = 64
"""Rounds whose end is kept, so that a repeated update call gets the answer of the first."""


class UpdateFailed(AgentError):
    """The round of this update call was not committed here. The daemon decides what comes next."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one update call asks for."""

    round: RoundName
    version: Version
    deadline_seconds: float


class Windows:
    """Status of one worker's weights, and the rendezvous of its main thread with the agent's thread.

    ``status`` is replaced, never changed, so that any thread may read it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.status = EngineStatus()
        self._clock = clock
        self._inbox: queue.SimpleQueue[Verify | Commit | Abort] = queue.SimpleQueue()
        self._ended: OrderedDict[RoundName, str] = OrderedDict()
        self._entering = threading.Lock()
        self._torn_on_leave = False

    @property
    def may_run(self) -> bool:
        """Live memory holds one whole committed version."""
        status = self.status
        return status.applied is not None and not status.torn and status.window is None

    # --------------------------------------------------------------------------------------------- the main thread
    def serve_round(
        self,
        update: Update,
        synchronise: Callable[[], None],
        verify: Callable[[Verify], Verified],
        tell: Callable[[object], None],
    ) -> None:
        """Stand still for one round. ``tell`` sends a message or posts a status change through the agent's thread.

        Raises:
            UpdateFailed: aborted, or the deadline passed.
        """
        ends = self._clock() + update.deadline_seconds
        before = self.status
        if not self._enter(update):
            return  # the same call again, after it had succeeded
        failure = "the worker failed inside the update call"
        try:
            synchronise()
            tell(update.round)
            self._torn_on_leave = True  # from here on a grant may be given
            failure = self._serve(update, ends, verify, tell)
        finally:
            self._leave(update, before, failure)
            tell(self.status)
        if failure:
            raise UpdateFailed(failure)

    def _enter(self, update: Update) -> bool:
        with self._entering:
            known = self._ended.get(update.round)
            if known:
                raise UpdateFailed(known)
            if known is not None:
                return False
            while not self._inbox.empty():
                self._inbox.get_nowait()  # words about a round that is over
            self._torn_on_leave = False
            self.status = EngineStatus(applied=self.status.applied, window=update.round, torn=self.status.torn)
        return True

    def _serve(
        self, update: Update, ends: float, verify: Callable[[Verify], Verified], tell: Callable[[object], None]
    ) -> str:
        """Until Commit (empty) or anything else (the reason)."""
        while True:
            remaining = ends - self._clock()
            try:
                word = self._inbox.get(timeout=max(0.0, remaining))
            except queue.Empty:
                return f"round {update.round}: nothing was decided within {update.deadline_seconds:g} s"
            match word:
                case Verify(round=name) if name == update.round:
                    tell(verify(word))
                case Commit(round=name, version=version) if name == update.round and version == update.version:
                    return ""
                case Abort(round=name) if name == update.round:
                    self._torn_on_leave = word.torn
                    return f"round {name} was aborted: {word.reason}"
                case _:
                    pass  # about another round

    def _leave(self, update: Update, before: EngineStatus, failure: str) -> None:
        if not failure:
            self.status = EngineStatus(applied=update.version)
        elif self._torn_on_leave or before.torn:
            self.status = EngineStatus(applied=before.applied, torn=True)
        else:
            self.status = EngineStatus(applied=before.applied)
        self._remember(update.round, failure)

    def _remember(self, name: RoundName, failure: str) -> None:
        self._ended[name] = failure
        while len(self._ended) > REMEMBERED_ROUNDS:
            self._ended.popitem(last=False)

    # ------------------------------------------------------------------------------------------- the agent's thread
    def heard(self, word: Verify | Commit | Abort) -> None:
        """The daemon's word for the thread that stands still. An Abort that comes first makes the call fail at once."""
        with self._entering:
            if self.status.window == word.round:
                self._inbox.put(word)
            elif isinstance(word, Abort) and word.round not in self._ended:
                self._remember(word.round, f"round {word.round} was aborted: {word.reason}")
