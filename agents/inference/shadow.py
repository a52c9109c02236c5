"""A worker that serves while the next version lands beside its weights.

The agent's thread hears the daemon's words about what lands (Expose, Verify, Abort). What takes long (the digest of
what has landed, and that of live memory after a switch) runs on threads of low priority. The worker's main thread
switches, inside one call of its engine between two steps: from then on it computes with the new weights, and what they
hold is audited while it does.

What was copied may be anything, so until a digest of all of it agrees the status tells of the version before, and
nobody takes the switch for done. Where pages were exchanged, whose bytes were digested before, samples of every page
tell whether they are there. What follows then lets the engine take its first steps: what was served gets the addresses
of standby, where nothing lands before, and all of what is served is digested, as slowly as the engine likes. If samples
or digest do not agree, live memory counts as torn and nothing runs on it any more. Where batches may move weights to
other places (experts), the first look comes before the next batch.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from weightsync.agents.errors import AgentError, blame
from weightsync.agents.inference.calls import SwitchInfo
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.window import UpdateFailed
from weightsync.agents.memory.errors import FlipFailed, StandbyLost
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Expose,
    Exposed,
    Fault,
    Holding,
    Left,
    RoundOrder,
    RoundWord,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, RoundName, Version
from weightsync.orchestrator.protocol.text import clean

log = logging.getLogger(__name__)

DEFERRED_WORDS: Final = 16
"""Heard during a switch, which takes milliseconds; a daemon says one to four about a round."""

ASKING_ROUNDS: Final = 16
"""Rounds that ask for the same switch; each is answered. A daemon asks under another name only after a restart."""


class Superseded(AgentError):
    """Other weights are served than those that were being audited. Nothing to be done."""


class Landed(Protocol):
    """What has arrived beside live memory, and live memory."""

    @property
    def bytes(self) -> int:
        """That ``landed`` and ``digest`` read."""

    @property
    def swaps(self) -> bool:
        """Whether ``take`` exchanges pages: what was served before is in standby after it."""

    @property
    def restless(self) -> bool:
        """Whether batches move what is served to other places, so that an audit beside them would find it changed."""

    def landed(self, version: Version) -> Digest:
        """Of what has arrived, over the whole layout; on the thread beside.

        Raises:
            AgentError: ``version`` is not all there.
        """

    def take(self, version: Version) -> None:
        """``version``, which has landed, becomes live, and what is derived from it; on the worker's main thread."""

    def settle(self) -> None:
        """After ``take``, before anything lands again; on the thread beside, where it leaves the first step alone.

        Raises:
            AgentError: nothing can land here any more; live memory is whole.
        """

    def shown(self) -> bool:
        """Whether live memory is what was exchanged for it, by samples of each page: quick; on the thread beside.
        Only of one that ``swaps``."""

    def audit(self) -> Digest:
        """Of live memory over the whole layout, leaving the device to batches again and again.

        Raises:
            Superseded: only of one that ``swaps``: it was changed meanwhile, rightly.
        """


@dataclass(slots=True)
class _Taken:
    """The last one. ``right``: what the audit found; None while nothing is known. ``before``: what was served, and its
    digest; None where no switch brought it."""

    version: Version
    digest: Digest
    before: tuple[Version, Digest] | None
    rounds: deque[RoundName] = field(default_factory=lambda: deque(maxlen=ASKING_ROUNDS))
    switch_seconds: float = 0.0
    audit_seconds: float = 0.0
    right: bool | None = None


class ShadowRounds:
    """One worker's, for as long as it lives.

    Args:
        holdings: what its memory holds.
        weights: live memory, and what lands beside it.
        tell: says a word to the daemon; callable on any thread.
        beside: runs one thing after the other on a thread that disturbs the main thread little.
        later: likewise, what nobody waits for, on a thread of its own.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        holdings: Holdings,
        weights: Landed,
        tell: Callable[[RoundWord | Holding], None],
        beside: Callable[[Callable[[], None]], object],
        later: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._holdings = holdings
        self._weights = weights
        self._tell = tell
        self._beside, self._later = beside, later
        self._clock = clock
        self._lock = holdings.lock
        self._landing: RoundName | None = None
        self._verified: Verified | None = None
        self._verifying = False
        self._switching = False
        """Until standby is what it is to be, too."""
        self._deferred: deque[RoundOrder] = deque(maxlen=DEFERRED_WORDS)
        self._lost: Exception | None = None
        """Why nothing can land any more."""
        self._last: _Taken | None = None

    # ------------------------------------------------------------------------------------------- the agent's thread
    def heard(self, word: RoundOrder) -> None:
        """The daemon's word about a round."""
        with self._lock:
            if self._switching:
                self._deferred.append(word)  # what has landed is read until the switch is over
                return
            match word:
                case Expose():
                    self._expose(word.round)
                case Verify() if word.round == self._landing and self._verified is not None:
                    self._tell(self._verified)
                case Verify() if word.round == self._landing and not self._verifying:
                    self._verifying = True
                    self._beside(lambda: self._verify(word))
                case Abort() if word.round == self._landing:
                    self._forget()
                    self._tell(Left(round=word.round, status=self._holdings.status))
                case _:
                    pass  # about another round, or Commit, which is said to live workers

    def _expose(self, name: RoundName) -> None:
        if self._lost is not None:
            log.error("round %s: nothing can land here: %s", name, self._lost)
            fault, retry = blame(self._lost, "engine")
            self._tell(Left(round=name, status=self._holdings.status, fault=fault, retry=retry))
            return
        if name != self._landing:
            self._forget()
            self._landing = name
        self._tell(Exposed(round=name))

    @property
    def open(self) -> bool:
        """Whether writers may be at work on what lands here."""
        return self._landing is not None and self._verified is None

    def forget(self) -> None:
        """What has landed is of no use any more."""
        with self._lock:
            self._forget()

    def gives_up(self, copied: bool) -> bool:
        """Nothing lands any more, nor lies in the landing if what lands is ``copied`` from there. False, and nothing is
        given up, during a switch."""
        with self._lock:
            if self._switching:
                return False
            if copied or self.open:
                self._forget()
            return True

    def _forget(self) -> None:
        self._landing, self._verified, self._verifying = None, None, False
        self._holdings.keep(None)

    # ------------------------------------------------------------------------------------------- the thread beside
    def _verify(self, order: Verify) -> None:
        began = self._clock()
        try:
            digest = self._weights.landed(order.version)
        except Exception as error:  # the daemon decides what a rank that cannot verify means for the version
            log.exception("round %s cannot be verified", order.round)
            fault, retry = blame(error, "engine")
            reason = clean(repr(error))
            word = Verified(
                round=order.round,
                digest=NO_BYTES,
                bytes=0,
                apply_seconds=0.0,
                digest_seconds=0.0,
                error=reason,
                fault=fault,
                retry=retry,
            )
        else:
            seconds = self._clock() - began
            word = Verified(
                round=order.round,
                digest=digest,
                bytes=self._weights.bytes,
                apply_seconds=0.0,
                digest_seconds=seconds,
            )
        with self._lock:
            if self._landing != order.round:
                return  # it was dropped meanwhile, and perhaps something else lands there now
            if not word.error:
                self._holdings.keep(order.version, word.digest)
            self._verified = word
        self._tell(word)

    def _audit(self, switch: _Taken) -> None:
        agrees = self._weights.shown if self._weights.swaps else lambda: self._weights.audit() == switch.digest
        self._look(switch, agrees)

    def _settle(self, switch: _Taken) -> None:
        """What was served comes to its place, and what was heard meanwhile is heard now. No round waits for it."""
        try:
            self._weights.settle()
        except Exception as error:
            log.exception("standby is lost, and nothing can land here any more")
            with self._lock:
                self._lose(error)
            self._tell(Holding(status=self._holdings.status))
        with self._lock:
            if self._last is switch:  # else another one has begun, and has an end of its own
                self._switched()
        if switch.right:
            self._later(lambda: self._look(switch, lambda: self._weights.audit() == switch.digest))

    def _lose(self, error: Exception) -> None:
        self._lost = error
        self._holdings.keep(None)

    def _switched(self) -> None:
        with self._lock:
            self._switching = False
            deferred, self._deferred = self._deferred, deque(maxlen=DEFERRED_WORDS)
        for word in deferred:
            self.heard(word)

    def _look(self, switch: _Taken, agrees: Callable[[], bool]) -> None:
        """Whether live memory is what ``switch`` made it. The first look is told as Left; after it only what tears."""
        began, right, why = self._clock(), False, "it differs"
        fault: Fault = "engine"
        retry = True
        try:
            right = agrees()
        except Superseded:
            return
        except Exception as error:
            (fault, retry), why = blame(error, "engine"), repr(error)
            log.exception("%s cannot be audited", switch.version)
        words: list[RoundWord | Holding] = []
        with self._lock:
            if self._last is not switch:
                return  # another one has changed live memory since, and has an audit of its own
            first, switch.right = switch.right is None, right
            if not right:
                log.error("%s: live memory is not what was verified (%s); torn", switch.version, why)
                self._tear()
            if first:
                switch.audit_seconds = self._clock() - began
                if right:
                    self._agreed(switch)
                    fault = ""
                words += [self._left(name, switch, fault, retry) for name in switch.rounds]
            elif not right:
                words.append(Holding(status=self._holdings.status))
        for word in words:
            self._tell(word)

    def _agreed(self, switch: _Taken) -> None:
        lands, held, because = self._landing, self._holdings.status.held, self._holdings.held_because
        previous = switch.before if self._weights.swaps and lands is None and self._lost is None else None
        self._holdings.committed(switch.version, *(previous or ()))
        if held:  # said since the switch, which had ended any hold before
            self._holdings.hold(True, because)

    def _tear(self) -> None:
        """What has landed in an arena is there still and can mend it; of pages nobody knows which are which."""
        self._holdings.tear(True)
        if self._weights.swaps:
            self._holdings.keep(None)

    def _left(self, name: RoundName, switch: _Taken, fault: Fault = "", retry: bool = True) -> Left:
        return Left(
            round=name,
            status=self._holdings.status,
            fault=fault,
            retry=retry,
            switch_seconds=switch.switch_seconds,
            audit_seconds=switch.audit_seconds,
        )

    # --------------------------------------------------------------------------------------------- the main thread
    def refusal(self, order: SwitchInfo) -> str:
        """Why ``switch`` would change nothing and fail; empty when it would not."""
        with self._lock:
            standby = self._holdings.status.standby
            if self.serves(order.version) or standby == order.version:
                return ""
            return f"what waits in standby is {standby or 'nothing'}, not {order.version}"

    def switch(self, order: SwitchInfo, synchronise: Callable[[], None]) -> None:
        """Serve what waits in standby. Left follows when live memory was audited; asked again, it is said again.

        Raises:
            UpdateFailed, FlipFailed: ``order`` names something else than what waits, or it cannot be had; nothing was
            changed.
            Exception: live memory is torn.
        """
        with self._lock:
            if self.serves(order.version):
                self._again(order.round)
                return
            if reason := self.refusal(order):
                raise UpdateFailed(reason)
            last, digest = self._last, self._holdings.status.standby_digest
            before = (last.version, last.digest) if last is not None and self.serves(last.version) else None
            switch = _Taken(order.version, digest, before)
            switch.rounds.append(order.round)
            self._switching, self._last = True, None
        began = self._clock()
        try:
            synchronise()
            self._weights.take(order.version)
            synchronise()
        except BaseException as error:
            with self._lock:
                if isinstance(error, FlipFailed):
                    self._last = last  # what is served is whole, and what it was
                    if isinstance(error, StandbyLost):
                        self._lose(error)
                else:
                    self._tear()
                fault, retry = blame(error, "engine")
                word = self._left(order.round, switch, fault, retry)
            self._tell(word)
            self._switched()
            raise
        else:
            with self._lock:
                switch.switch_seconds = self._clock() - began
                self._last, self._landing, self._verified, self._verifying = switch, None, None, False
                self._holdings.hold(False, "")
            if not self._weights.swaps:
                self._switched()
            if self._weights.restless:
                self._audit(switch)  # before a batch
            else:
                self._beside(lambda: self._audit(switch))
            if self._weights.swaps:
                self._beside(lambda: self._settle(switch))

    def serves(self, version: Version) -> bool:
        """Whether live memory was switched to ``version`` and to nothing else since."""
        last = self._last
        if last is None or last.version != version:
            return False
        status = self._holdings.status
        return last.right is None or (last.right and status.applied == version and not status.torn)

    def _again(self, name: RoundName) -> None:
        assert self._last is not None
        if name not in self._last.rounds:
            self._last.rounds.append(name)
        if self._last.right:
            self._tell(self._left(name, self._last))
