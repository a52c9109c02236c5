"""The write loop: many edges at once, each with its own window, on one event loop that also does other things."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

from weightsync.agents.transport.filling import ALL
from weightsync.agents.transport.nixl.cargo import CargoChunk
from weightsync.agents.transport.nixl.edge import (
    Arrived,
    Edge,
    EdgeProgress,
    EdgeResult,
    State,
    Transfer,
    ask,
    bytes_of,
    load,
    post,
    refusal,
    unload,
)
from weightsync.agents.transport.nixl.errors import (
    DeadlineError,
    ImplausibleRateError,
    StalledError,
    StoppedError,
    TransferError,
)
from weightsync.agents.transport.nixl.flow import Loading
from weightsync.agents.transport.nixl.loader import Bindings
from weightsync.agents.turns import quick_turns
from weightsync.orchestrator.protocol.messages import Fault

Ended = Callable[[EdgeResult], None]
"""Told of an edge once nothing of it is in flight and nothing more will be posted."""

IN_FLIGHT_BYTES: Final = 16 << 30
"""Per edge: beyond it a link gains nothing, and a failure leaves more to doubt."""

TURN_SECONDS: Final = 0.002
"""Posting and polling in one go before other tasks get their turn."""

EAGER_SECONDS, EAGER_POLL_SECONDS = 0.005, 0.00005
"""After the last movement polling goes on, with so long between two turns in which nothing moves: 4 GiB within a GPU
take 2 ms, and an event loop's shortest wait is one. The thread sleeps, so that who converts has the interpreter."""

POLL_SECONDS: Final = 0.001
"""Between polls after that. NIXL has no descriptor to wait on; an idle poll costs microseconds."""

PROBE_SECONDS: Final = 0.5
"""Between two looks at whether a peer is there whose word is waited for."""

LONGEST_LOOK_SECONDS: Final = 0.5
"""What one look at an edge may count towards its stall: a process that stood still has not looked meanwhile."""

SLOWEST_BYTES_PER_SECOND: Final = 100e6
"""Of links that weights are sent over: what is on its way has so much more time until an edge counts as stalled."""

BYTES_PER_GB: Final = 10**9

RATE_FLOOR_BYTES: Final = 16 << 20
"""Smaller writes fit in a cache, where any rate is plausible."""


class Writer:
    """One write of some edges. A peer that fails, stops or hangs ends its own edge only.

    An edge that is given up while its transfers are in flight, or are packed, is over when ``settle`` sees the last of
    them end.

    Args:
        rank: this agent, for errors.
        agent: the nixl_agent, used only on the calling thread.
        bindings: for the types of its errors.
        in_flight: handles in flight per edge: a sliding window.
        deadline: of the whole write, on ``time.monotonic``'s clock.
        ended: told once of each edge.
        loading: how the edges' cargo is packed, and what is told the peers of its chunks; None where there is none.
        listen: hears what peers have said, which NIXL keeps until it is asked for.
        probe: whether a peer is there, as the state of a word to it.
        stall_seconds: how long nothing of an edge may end although something is on its way; None: for ever.
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
        ended: Ended,
        loading: Loading | None = None,
        listen: Callable[[], None] = lambda: None,
        probe: Callable[[str], tuple[State, Exception | None]] = lambda peer: ("DONE", None),
        stall_seconds: float | None = None,
        max_gb_per_second: float | None = None,
    ) -> None:
        self._rank = rank
        self._agent = agent
        self._bindings = bindings
        self._in_flight = in_flight
        self._deadline = deadline
        self._ended = ended
        self._loading = loading
        self._listen = listen
        self._probe = probe
        self._stall_seconds = stall_seconds
        self._max_gb_per_second = max_gb_per_second
        self._all: list[EdgeProgress] = []

    async def write(self, edges: Sequence[Edge]) -> list[EdgeResult]:
        """Post everything once and wait until each edge has ended or is given up; results in the order of ``edges``.
        Of one whose connection breaks, what is in flight ends soon after, and is waited for: then it is over."""
        self._all = [self._begin(edge) for edge in edges]
        try:
            with quick_turns():
                await self._post_all()
        finally:  # also when the caller's task is cancelled: what was posted stays posted
            self._give_up("the write was cut off")
        return [progress.result() for progress in self._all]

    async def _post_all(self) -> None:
        moved_at, began = 0.0, time.monotonic()
        for progress in self._all:
            self._conclude(progress)
        while any(progress.awaited for progress in self._all):
            if time.monotonic() >= self._deadline:
                self._give_up("the deadline passed", DeadlineError)
                return
            turn_ends = time.monotonic() + TURN_SECONDS
            since, began = time.monotonic() - began, time.monotonic()
            self._listen()
            for progress in self._all:
                if progress.awaited and self._turn(progress, turn_ends):
                    moved_at = progress.looked = time.monotonic()
                    progress.still = 0.0
                elif progress.awaited:
                    self._stands_still(progress, min(since, LONGEST_LOOK_SECONDS))
                self._conclude(progress)
                if time.monotonic() >= turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + TURN_SECONDS
            eager = time.monotonic() < moved_at + EAGER_SECONDS
            if eager and moved_at < began:
                time.sleep(EAGER_POLL_SECONDS)  # noqa: ASYNC251
            await asyncio.sleep(0 if eager else POLL_SECONDS)
        for progress in self._all:  # a peer's last word may have come to whoever else polls
            self._conclude(progress)

    def stop(self, peers: Collection[str], reason: str) -> None:
        """Post nothing more to ``peers``."""
        for progress in self._all:
            if progress.awaited and progress.edge.peer in peers:
                self._give_up_edge(progress, reason, StoppedError)

    def settle(self) -> None:
        """Ask after the transfers of edges that were given up."""
        for progress in self.left():
            self._collect(progress)
            self._conclude(progress)

    def left(self) -> Iterator[EdgeProgress]:
        """Edges that were given up and are not over."""
        return (progress for progress in self._all if progress.error is not None and not progress.over)

    def forget(self, peer: str) -> None:
        """``peer``'s process is gone for good: nothing of it is waited for."""
        for progress in self._all:
            if progress.edge.peer == peer and not progress.over:
                self._give_up_edge(progress, "another process, or another endpoint, has taken its place", StoppedError)
                for transfer in progress.in_flight:
                    self._given_back(progress, transfer)
                progress.in_flight = []
                for transfer in progress.edge.transfers:
                    transfer.pending = False
                self._conclude(progress)

    @property
    def over(self) -> bool:
        """Whether all edges are."""
        return all(progress.over for progress in self._all)

    # ------------------------------------------------------------------------------------------------- internals
    def _begin(self, edge: Edge) -> EdgeProgress:
        descriptors = sum(transfer.descriptors for transfer in edge.transfers)
        before, edge.before = edge.before, None
        done = before.arrived if before is not None else Arrived()
        left = (transfer for transfer in edge.transfers if transfer.number not in done.transfers)
        waiting = deque(sorted(left, key=lambda transfer: transfer.needs))  # as the slots are filled
        progress = EdgeProgress(edge, waiting, descriptors, started=time.monotonic())
        progress.ended = progress.looked = progress.started
        if before is not None:
            progress.started -= before.seconds
            progress.arrived |= done.transfers
            progress.loaded |= done.chunks
            progress.bytes_done = bytes_of(edge, done)
        if edge.tainted:
            # Its handles cannot be posted again, and the old bytes could land on top of the new ones.
            last = edge.last_error
            reason = "an earlier write has not ended" + (f" ({last.reason})" if last else "")
            fault = last.fault if last else "network"
            progress.error = self._error(TransferError, progress, "", reason, fault, retry=True)
            progress.waiting.clear()
        elif edge.cargo is not None:
            assert self._loading is not None, "cargo is written with what it takes"
            progress.flow = self._loading.begin(edge.peer, edge.cargo, done.chunks)
        return progress

    def _turn(self, progress: EdgeProgress, until: float) -> bool:
        """Collect what is DONE and post what the window allows, not beyond ``until``. Whether anything moved."""
        moved = self._collect(progress)
        while progress.error is None and progress.waiting and self._has_room(progress):
            self._post(progress, progress.waiting.popleft())
            moved = True
            if time.monotonic() >= until:
                break
        while progress.error is None and progress.flow is not None and len(progress.in_flight) < self._in_flight:
            ready = progress.flow.next()
            if ready is None:
                if lost := progress.flow.lost():
                    self._give_up_edge(progress, lost)
                break
            self._load(progress, *ready)
            moved = True
            if time.monotonic() >= until:
                break
        return moved

    def _has_room(self, progress: EdgeProgress) -> bool:
        return (
            len(progress.in_flight) < self._in_flight
            and (not progress.in_flight or progress.bytes_in_flight + progress.waiting[0].bytes <= IN_FLIGHT_BYTES)
            and progress.waiting[0].needs <= self._filled()
        )

    def _filled(self) -> int:
        return self._loading.filled() if self._loading is not None else ALL

    def _waits_for_slots(self, progress: EdgeProgress) -> bool:
        """It goes on when more of the slots is filled, and not before."""
        plain = bool(progress.waiting) and progress.waiting[0].needs > self._filled()
        flow = progress.flow is not None and progress.flow.waits_for_slots
        return not progress.in_flight and (plain or flow)

    def _load(self, progress: EdgeProgress, chunk: CargoChunk, place: int) -> None:
        """Post a chunk of the cargo."""
        assert self._loading is not None
        assert progress.edge.cargo is not None
        ring, notice = self._loading.ring, self._loading.notice(progress.edge.cargo, chunk)
        try:
            transfer = load(progress.edge, chunk, place, ring, notice, self._agent)
        except self._bindings.errors as error:
            transfer = progress.edge.loads[-1]
            self._given_back(progress, transfer)
            self._refused(progress, transfer.where(), error)
            return
        progress.descriptors += transfer.descriptors
        self._post(progress, transfer)

    def _post(self, progress: EdgeProgress, transfer: Transfer) -> None:
        state, cause = post(transfer, self._agent, self._bindings)
        if state == "DONE":  # on one host the post itself is the copy
            self._done(progress, transfer)
        elif state == "ERR":
            self._refused(progress, transfer.where(), cause)
        if transfer.pending:
            progress.in_flight.append(transfer)
            progress.bytes_in_flight += transfer.bytes
        else:
            self._given_back(progress, transfer)

    def _collect(self, progress: EdgeProgress) -> bool:
        """Whether any transfer ended."""
        still: list[Transfer] = []
        for transfer in progress.in_flight:
            state, cause = ask(transfer, self._agent, self._bindings)
            if state == "PROC":
                still.append(transfer)
                continue
            progress.bytes_in_flight -= transfer.bytes
            if state == "DONE":
                self._done(progress, transfer)
            else:
                self._refused(progress, transfer.where(), cause)
            self._given_back(progress, transfer)
        moved = len(still) < len(progress.in_flight)
        progress.in_flight = still
        return moved

    def _stands_still(self, progress: EdgeProgress, seconds: float) -> None:
        """Nothing of it has moved for ``seconds`` more."""
        if self._waits_for_slots(progress):
            progress.started += seconds  # which says nothing of its rate
        if not progress.in_flight:
            self._look_after(progress)
        if not progress.in_flight and not (progress.flow is not None and progress.flow.waits_for_peer):
            return  # for a place to be packed in
        progress.still += seconds
        limit = self._stall_seconds
        if limit is not None and progress.still >= limit + progress.bytes_in_flight / SLOWEST_BYTES_PER_SECOND:
            self._give_up_edge(progress, f"nothing has moved for {progress.still:.0f} s", StalledError)

    def _look_after(self, progress: EdgeProgress) -> None:
        """Of a peer whose word is waited for, and to which nothing is on its way, NIXL would not tell that it is
        gone."""
        if time.monotonic() - progress.looked < PROBE_SECONDS:
            return
        progress.looked = time.monotonic()
        state, cause = self._probe(progress.edge.peer)
        if state == "ERR":
            self._refused(progress, progress.flow.waits_for() if progress.flow is not None else "", cause)

    def _done(self, progress: EdgeProgress, transfer: Transfer) -> None:
        progress.bytes_done += transfer.bytes
        progress.ended = time.monotonic()
        (progress.loaded if transfer in progress.edge.loads else progress.arrived).add(transfer.number)

    def _given_back(self, progress: EdgeProgress, transfer: Transfer) -> None:
        """What a load that has ended, or whose peer is gone, held."""
        if transfer in progress.edge.loads:
            unload(progress.edge, transfer, self._bindings.errors)
            if progress.flow is not None:
                progress.flow.give(transfer.place)

    def _refused(self, progress: EdgeProgress, where: str, cause: Exception | None) -> None:
        """NIXL has ended a transfer without its bytes; the rest of the edge will not be posted."""
        progress.edge.broken = True
        progress.waiting.clear()
        if progress.error is None:
            progress.settling = True
            kind, reason, fault = refusal(cause, self._bindings)
            progress.error = self._error(kind, progress, where, reason, fault, retry=True)
            progress.error.__cause__ = cause
            if progress.flow is not None:
                progress.flow.stop()

    def _conclude(self, progress: EdgeProgress) -> None:
        """Tell of the edge if it is over."""
        # Of an edge that an earlier write has left, that write's transfers count, too.
        if progress.over or progress.active or progress.moves or progress.edge.tainted:
            return
        self._judge_rate(progress)
        progress.edge.last_error = progress.error
        progress.over = True
        if progress.flow is not None:
            progress.flow.stop()
        self._ended(progress.result())

    def _give_up(self, reason: str, kind: type[TransferError] = TransferError) -> None:
        for progress in self._all:
            if progress.awaited:
                self._give_up_edge(progress, reason, kind)

    def _give_up_edge(self, progress: EdgeProgress, reason: str, kind: type[TransferError] = TransferError) -> None:
        """Post nothing more; it is over once nothing is in flight."""
        progress.settling = False
        if progress.error is None:
            stuck = (*progress.in_flight, *progress.waiting)[:1]
            tensor = stuck[0].where() if stuck else ""
            counts = f"{len(progress.in_flight)} transfers in flight and {len(progress.waiting)} unposted"
            if progress.flow is not None and (waits := progress.flow.waits_for()):
                counts += f"; {waits}"
            progress.error = self._error(kind, progress, tensor, f"{reason} with {counts}", "network", retry=True)
        progress.edge.last_error = progress.error
        progress.waiting.clear()
        if progress.flow is not None:
            progress.flow.stop()
        self._conclude(progress)

    def _judge_rate(self, progress: EdgeProgress) -> None:
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
        self, kind: type[TransferError], progress: EdgeProgress, tensor: str, reason: str, fault: Fault, *, retry: bool
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
