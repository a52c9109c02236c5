"""The window: one round in a worker, from the moment the worker stands still until the daemon lets it go.

While the worker's main thread is in here it can run no batch; that is the proof of quiescence. The agent's thread
hands it what is to be done (scatter, refresh, digest on the main thread) and the end.

A round that says so tells the worker before the first writer is granted (Expose). Until then nobody has written, so a
worker that loses its daemon leaves with what it had; afterwards it leaves as torn.
"""

import queue
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
from weightsync.agents.errors import AgentError
from weightsync.agents.inference.holdings import Holdings
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Commit,
    EngineStatus,
    Expose,
    Exposed,
    RoundOrder,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import RoundName, Version

REMEMBERED_ROUNDS: Final = 64
"""Rounds whose end is kept, so that a repeated update call gets the answer of the first."""

LOOK_SECONDS: Final = 0.25
"""Between two looks at whether the daemon is still there."""


class UpdateFailed(AgentError):
    """The round of this update call was not committed here. The daemon decides what comes next."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one update call asks for. ``exposes``: Expose will come before any grant; else Quiesced allows them."""

    round: RoundName
    version: Version
    deadline_seconds: float
    exposes: bool = False


@dataclass(slots=True)
class _Written:
    """The last round that may have written to this memory. ``whole``: what was here before was no torn memory;
    ``verified``: it is all here, and its digest was told."""

    round: RoundName
    version: Version
    whole: bool
    verified: bool = False


class Windows:
    """The rendezvous of a worker's main thread with the agent's thread.

    Args:
        holdings: what its memory holds.
        abandoned: whether the lease of the daemon has run out.
        deaf: why no word of any daemon can come any more; empty while one can.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        holdings: Holdings,
        abandoned: Callable[[], bool] = lambda: False,
        deaf: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.holdings = holdings
        self._abandoned = abandoned
        self._deaf = deaf
        self._clock = clock
        self._inbox: queue.SimpleQueue[RoundOrder] = queue.SimpleQueue()
        self._ended: OrderedDict[RoundName, str] = OrderedDict()
        self._lock = holdings.lock
        self._written: _Written | None = None
        self._torn_on_leave = False

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
        if not self._enter(update):
            return  # the same call again, after it had succeeded
        failure = "the worker failed inside the update call"
        try:
            synchronise()
            if not update.exposes:
                self._expose(update)
            tell(update.round)
            failure = self._serve(update, ends, verify, tell)
        finally:
            self._leave(update, failure)
            tell(self.holdings.status)
        if failure:
            raise UpdateFailed(failure)

    def _enter(self, update: Update) -> bool:
        with self._lock:
            known = self._ended.get(update.round)
            if known:
                raise UpdateFailed(known)
            if known is not None:
                return False
            while not self._inbox.empty():
                self._inbox.get_nowait()  # words about a round that is over
            self._torn_on_leave = False
            self._now(update.round, self.holdings.status.torn)
        return True

    def _expose(self, update: Update) -> None:
        """From here on a grant may be given."""
        self._torn_on_leave = True
        self._written = _Written(update.round, update.version, whole=not self.holdings.status.torn)

    def _serve(
        self, update: Update, ends: float, verify: Callable[[Verify], Verified], tell: Callable[[object], None]
    ) -> str:
        """Until Commit (empty) or anything else (the reason)."""
        name = update.round
        while (left := ends - self._clock()) > 0:
            if not self._torn_on_leave and self._abandoned():
                return f"round {name}: the daemon is gone for longer than its lease, and nobody was granted"
            deaf = self._deaf()  # asked before the last look, so that no word which did come is lost
            try:
                word = self._inbox.get(timeout=0.0 if deaf else min(left, LOOK_SECONDS))
            except queue.Empty:
                if deaf:
                    return f"round {name}: {deaf}"
                continue
            match word:
                case Expose(round=named) if named == name:
                    if not self._torn_on_leave:
                        self._expose(update)
                    tell(Exposed(round=name))
                case Verify(round=named) if named == name:
                    verified = verify(word)
                    if self._written is not None and self._written.round == name:
                        self._written.verified = not verified.error
                    tell(verified)
                case Commit(round=named, version=version) if named == name and version == update.version:
                    return ""
                case Abort(round=named) if named == name:
                    self._torn_on_leave = word.torn
                    return f"round {name} was aborted: {word.reason}"
                case _:
                    pass  # about another round
        return f"round {name}: nothing was decided within {update.deadline_seconds:g} s"

    def _leave(self, update: Update, failure: str) -> None:
        with self._lock:
            if not failure:
                self._commit(update.version)
            else:
                self._now(None, torn=self._torn_on_leave or self.holdings.status.torn)
            self._remember(update.round, failure)

    # -------------------------------------------------------------------------------------------- under the lock
    def _now(self, window: RoundName | None, torn: bool) -> None:
        self.holdings.status = msgspec.structs.replace(self.holdings.status, window=window, torn=torn)

    def _commit(self, version: Version) -> None:
        self.holdings.committed(version)
        self._written = None

    def _remember(self, name: RoundName, failure: str) -> None:
        self._ended[name] = failure
        while len(self._ended) > REMEMBERED_ROUNDS:
            self._ended.popitem(last=False)

    # ------------------------------------------------------------------------------------------- the agent's thread
    def heard(self, word: RoundOrder) -> EngineStatus | None:
        """The daemon's word for the thread that stands still, or about a round that has left this memory torn.

        An Abort that comes first makes the call fail at once. Returns the status if the word has changed it here.
        """
        with self._lock:
            if self.holdings.status.window == word.round:
                self._inbox.put(word)
            elif self.holdings.status.window is None and self._mended(word):
                return self.holdings.status
            elif isinstance(word, Abort) and word.round not in self._ended:
                self._remember(word.round, f"round {word.round} was aborted: {word.reason}")
        return None

    def _mended(self, word: RoundOrder) -> bool:
        """Whether a daemon that was away while this worker left knows that torn memory is whole after all.

        The engine is paused since then and its workers refuse to run, so nothing has changed what was verified.
        """
        written = self._written
        if not self.holdings.status.torn or written is None or word.round != written.round:
            return False
        match word:
            case Commit(version=version) if written.verified and version == written.version:
                self._commit(version)
                self._remember(word.round, "")
            case Abort(torn=False) if written.whole:
                self._now(None, torn=False)
                self._written = None
            case _:
                return False
        return True
