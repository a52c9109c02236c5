"""The write loop: many edges at once, each with its own window, on one event loop that also does other things."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from weightsync.agents.transport.nixl.edge import Edge, EdgeResult, Transfer
from weightsync.agents.transport.nixl.errors import (
    DeadlineError,
    DisconnectedError,
    ImplausibleRateError,
    TransferError,
)
from weightsync.agents.transport.nixl.loader import Bindings

IN_FLIGHT_BYTES: Final = 16 << 30
"""Per edge: beyond it a link gains nothing, and a failure leaves more to doubt."""

TURN_SECONDS: Final = 0.002
"""Posting and polling in one go before other tasks get their turn."""

EAGER_SECONDS: Final = 0.005
"""After the last movement, polling goes on at every turn of the loop: 4 GiB within a GPU take 2 ms, and an event loop's
shortest sleep of 1 ms would double that."""

POLL_SECONDS: Final = 0.001
"""Between polls after that. NIXL has no descriptor to wait on; an idle poll costs microseconds."""

SWITCH_SECONDS: Final = 0.0001
"""How long another thread may keep the interpreter from one that writes. Python's default of 5 ms is several times what
the copy of a chunk takes: beside a training loop that is bound by Python, a write took twice as long or more."""

HALF_MICROSECOND: Final = 5e-7
"""Python cuts the interval to whole microseconds; without it, what is put back could be one less each time."""

BYTES_PER_GB: Final = 10**9

RATE_FLOOR_BYTES: Final = 16 << 20
"""Smaller writes fit in a cache, where any rate is plausible."""


@contextmanager
def quick_turns() -> Iterator[None]:
    """The process's threads take turns every SWITCH_SECONDS, unless somebody else has a say in it meanwhile."""
    before = sys.getswitchinterval()
    if before <= SWITCH_SECONDS:
        yield
        return
    sys.setswitchinterval(SWITCH_SECONDS)
    during = sys.getswitchinterval()
    try:
        yield
    finally:
        if sys.getswitchinterval() == during:
            sys.setswitchinterval(before + HALF_MICROSECOND)


@dataclass(slots=True, eq=False)
class _Progress:
    """One edge's state within one write."""

    edge: Edge
    waiting: deque[Transfer]
    descriptors: int
    in_flight: list[Transfer] = field(default_factory=list)
    bytes_in_flight: int = 0
    bytes_done: int = 0
    started: float = 0.0
    ended: float = 0.0
    error: TransferError | None = None

    @property
    def active(self) -> bool:
        return self.error is None and bool(self.waiting or self.in_flight)

    def result(self) -> EdgeResult:
        return EdgeResult(
            self.edge.peer, self.bytes_done, self.descriptors, max(self.ended - self.started, 0.0), self.error
        )


class Writer:
    """One write of some edges. A peer that fails or stops ends its own edge only.

    Args:
        rank: this agent, for errors.
        agent: the nixl_agent, used only on the calling thread.
        bindings: for the types of its errors.
        in_flight: handles in flight per edge: a sliding window.
        deadline: of the whole write, on ``time.monotonic``'s clock.
        max_gb_per_second: what no edge can exceed, in 10^9 bytes per second; None: not judged.
    """

    def __init__(
        self,
        rank: str,
        agent: Any,
        bindings: Bindings,
        *,
        in_flight: int,
        deadline: float,
        max_gb_per_second: float | None = None,
    ) -> None:
        self._rank = rank
        self._agent = agent
        self._bindings = bindings
        self._in_flight = in_flight
        self._deadline = deadline
        self._max_gb_per_second = max_gb_per_second

    async def write(self, edges: Sequence[Edge], groups: Collection[int] | None = None) -> list[EdgeResult]:
        """Post everything (or the named groups) once and wait for it; results in the order of ``edges``."""
        with quick_turns():
            return await self._write(edges, groups)

    async def _write(self, edges: Sequence[Edge], groups: Collection[int] | None) -> list[EdgeResult]:
        all_progress = [self._begin(edge, groups) for edge in edges]
        eager_until = 0.0
        while any(progress.active for progress in all_progress):
            if time.monotonic() >= self._deadline:
                self._expire(all_progress)
                break
            turn_ends = time.monotonic() + TURN_SECONDS
            for progress in all_progress:
                if progress.active and self._turn(progress, turn_ends):
                    eager_until = time.monotonic() + EAGER_SECONDS
                if time.monotonic() >= turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + TURN_SECONDS
            await asyncio.sleep(0 if time.monotonic() < eager_until else POLL_SECONDS)
        for progress in all_progress:
            self._judge_rate(progress)
            progress.edge.last_error = progress.error
        return [progress.result() for progress in all_progress]

    def _begin(self, edge: Edge, groups: Collection[int] | None) -> _Progress:
        chosen = [transfer for transfer in edge.transfers if groups is None or transfer.chunk.group in groups]
        descriptors = sum(transfer.chunk.descriptors for transfer in chosen)
        progress = _Progress(edge, deque(chosen), descriptors, started=time.monotonic())
        progress.ended = progress.started
        if edge.tainted:
            # Its handles cannot be posted again, and the old bytes could land on top of the new ones.
            before = edge.last_error
            reason = "an earlier write has not ended" + (f" ({before.reason})" if before else "")
            fault = before.fault if before else "network"
            progress.error = self._error(TransferError, progress, "", reason, fault, retry=True)
        return progress

    def _turn(self, progress: _Progress, until: float) -> bool:
        """Collect what is DONE and post what the window allows, not beyond ``until``. Whether anything moved."""
        moved = self._collect(progress)
        while progress.error is None and progress.waiting and self._has_room(progress):
            self._post(progress, progress.waiting.popleft())
            moved = True
            if time.monotonic() >= until:
                break
        return moved

    def _has_room(self, progress: _Progress) -> bool:
        return len(progress.in_flight) < self._in_flight and (
            not progress.in_flight or progress.bytes_in_flight + progress.waiting[0].chunk.bytes <= IN_FLIGHT_BYTES
        )

    def _post(self, progress: _Progress, transfer: Transfer) -> None:
        transfer.pending = True  # before posting: even a post that raises may have begun to move bytes
        try:
            state = self._agent.transfer(transfer.handle)
        except self._bindings.errors as error:
            progress.error = self._failed(progress, transfer, error)
            return
        if state == "DONE":  # on one host the post itself is the copy
            self._done(progress, transfer)
        elif state == "PROC":
            progress.in_flight.append(transfer)
            progress.bytes_in_flight += transfer.chunk.bytes
        else:
            progress.error = self._failed(progress, transfer, None)

    def _collect(self, progress: _Progress) -> bool:
        """Whether any transfer ended."""
        still: list[Transfer] = []
        for transfer in progress.in_flight:
            if progress.error is not None:
                still.append(transfer)  # one of this edge has failed; the endpoint's poll asks after the others
                continue
            try:
                state = self._agent.check_xfer_state(transfer.handle)
            except self._bindings.errors as error:
                progress.error = self._failed(progress, transfer, error)
                continue
            if state == "DONE":
                progress.bytes_in_flight -= transfer.chunk.bytes
                self._done(progress, transfer)
            elif state == "PROC":
                still.append(transfer)
            else:
                progress.error = self._failed(progress, transfer, None)
        moved = len(still) < len(progress.in_flight)
        progress.in_flight = still
        return moved

    def _done(self, progress: _Progress, transfer: Transfer) -> None:
        transfer.pending = False
        progress.bytes_done += transfer.chunk.bytes
        progress.ended = time.monotonic()

    def _failed(self, progress: _Progress, transfer: Transfer, cause: Exception | None) -> TransferError:
        """The error of this edge. The transfer stays pending: nothing proves that none of its bytes will land."""
        tensor = progress.edge.tensor_of(transfer)
        if isinstance(cause, self._bindings.disconnected):
            reason = "the peer's process or its connection is gone (or its memory cannot be reached by this transport)"
            error = self._error(DisconnectedError, progress, tensor, reason, "engine", retry=True)
        else:
            reason = f"NIXL refused: {cause}" if cause is not None else "NIXL reports an error"
            error = self._error(TransferError, progress, tensor, reason, "network", retry=True)
        error.__cause__ = cause
        return error

    def _expire(self, all_progress: Sequence[_Progress]) -> None:
        for progress in all_progress:
            if progress.active:
                stuck = (progress.in_flight or progress.waiting)[0]
                count = len(progress.in_flight)
                reason = f"the deadline passed with {count} transfers in flight and {len(progress.waiting)} unposted"
                tensor = progress.edge.tensor_of(stuck)
                progress.error = self._error(DeadlineError, progress, tensor, reason, "network", retry=True)

    def _judge_rate(self, progress: _Progress) -> None:
        result = progress.result()
        most = self._max_gb_per_second
        if most is None or progress.error is not None or result.bytes < RATE_FLOOR_BYTES:
            return
        if result.bytes > most * BYTES_PER_GB * result.seconds:
            reason = (
                f"{result.bytes} bytes were reported written in {result.seconds:g} s, faster than the link can be:"
                f" transport.max_gb_per_second is {most:g}. Fix: raise it to the link's rate if this is one, or unset"
                " it; else NIXL moved nothing, so check its version and the peer's"
            )
            progress.error = self._error(ImplausibleRateError, progress, "", reason, "network", retry=False)

    def _error(
        self, kind: type[TransferError], progress: _Progress, tensor: str, reason: str, fault: Any, *, retry: bool
    ) -> TransferError:
        return kind(
            reason,
            rank=self._rank,
            peer=progress.edge.peer,
            tensor=tensor,
            bytes_done=progress.bytes_done,
            fault=fault,
            retry=retry,
        )
