"""InferenceAgent: the agent inside one worker of an inference engine.

The engine calls ``begin`` and ``update`` on the worker's main thread, the one that runs its batches; the transport and
the control channel live on the agent's thread. Nothing of ours touches the device before the first update, so graph
capture is never disturbed.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import torch
from weightsync.agents.environment.preflight import preflight
from weightsync.agents.errors import AgentError, blame
from weightsync.agents.inference.calls import (
    InfoError,
    InitInfo,
    LiveModel,
    PagedModel,
    Ranks,
    SwitchInfo,
    UpdateInfo,
    synchronize,
)
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.landing import ALONE, Peers, choose_landing
from weightsync.agents.inference.lending import Lending
from weightsync.agents.inference.quiet import Quiet
from weightsync.agents.inference.shadow import ShadowRounds
from weightsync.agents.inference.thread_side import InferenceSide
from weightsync.agents.inference.weights import LiveWeights, landing_arenas
from weightsync.agents.inference.window import Update, UpdateFailed, Windows
from weightsync.agents.link.introduction import Identity
from weightsync.agents.link.thread import STOP_SECONDS, AgentThread, ControlAddress
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.landing import landing_length
from weightsync.orchestrator.protocol.messages import (
    EngineStatus,
    Exposed,
    Fault,
    Holding,
    Left,
    Quiesced,
    RoundWord,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName, Version
from weightsync.orchestrator.protocol.text import clean

__all__ = ["InferenceAgent", "UpdateFailed"]

log = logging.getLogger(__name__)

T = TypeVar("T")

MIB: Final = 1 << 20

NOBODY: Final = "no daemon has been introduced to this worker yet"
REBALANCED: Final = "experts were rebalanced since the plan was made; the layout is announced anew"


class AgentStuck(AgentError):
    """A thread of the agent is still inside a call of the transport. Only a restart of the engine helps."""

    fault: Fault = "engine"


class InferenceAgent:
    """One worker's agent. Made after the model is loaded, so that its landing memory is in the engine's own budget.

    Everything public is for the worker's main thread; ``status`` and ``may_run`` may be read on any.

    Args:
        ranks: the worker's place in its engine.
        device: of the model.
        model: the live weights and their layout.
        drain: brings to rest, within that many seconds, whatever else in this worker holds copies of the weights and
            would write them back later; asked in each round before the weights change.
        boundary: whether the weights may change between two steps of the engine.
        peers: the ranks that land alike, all of whose agents are made at this moment.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        model: LiveModel,
        drain: Callable[[float], None] = lambda seconds: None,
        boundary: bool = True,
        peers: Peers = ALONE,
    ) -> None:
        self.ranks = ranks
        self._drain = drain
        self._device = device
        no_flip = model.no_flip if isinstance(model, PagedModel) else "what rounds write here lies in no pages"
        landing = choose_landing(model.layout, device, no_flip, peers)
        log.info("versions land by %s, with %.0f MiB: %s", landing.lands, landing.bytes / MIB, landing.why)
        arenas = landing_arenas(landing.bytes, device)
        warm_up(device)  # a compiler in the first round would cost its engine seconds of silence
        self._weights = LiveWeights(model, device, arenas, landing.lands, boundary, landing.why)
        self._holdings = Holdings()
        self._windows = Windows(self._holdings, self._abandoned, self._deaf)
        threads = Quiet(device), Quiet(device, waited_for=False)
        self._shadow = ShadowRounds(self._holdings, self._weights, self._tell, *threads)
        self._lending = Lending(self._weights, self._holdings)
        self._agent: AgentThread[InferenceSide] | None = None
        self._info: InitInfo | None = None

    @property
    def status(self) -> EngineStatus:
        """What live memory holds."""
        return self._holdings.status

    @property
    def may_run(self) -> bool:
        """Whether a batch may run: live memory holds one whole committed version."""
        return self._holdings.may_run

    @property
    def held_because(self) -> str:
        """Why the daemon does not want the engine resumed; empty when it does not say so."""
        status = self._holdings.status
        return (self._holdings.held_because or "the daemon said so") if status.held else ""

    @property
    def incarnation(self) -> int:
        """Of this process, as the daemon knows it; 0 before the first ``begin``."""
        return 0 if self._agent is None else self._agent.obedience.incarnation

    @property
    def landing(self) -> str:
        """See ``WeightHolder.landing``."""
        layout = self._weights.layout
        size = landing_length(layout)
        return f"lands {layout.lands} with {size / MIB:.0f} MiB ({layout.lands_because})"

    @property
    def lease(self) -> tuple[float, float] | None:
        """How long a paused engine waits for a silent daemon, and how long it has been silent; None: for ever."""
        return None if self._agent is None else self._agent.lease

    def begin(self, info: InitInfo) -> None:
        """Start the agent's thread; the same info again does nothing while the thread lives.

        A thread that has ended is replaced, and so is one whose daemon has moved (``hub_url``, in a demo): this memory
        is the same, so what the old thread obeyed binds the new one.

        Raises:
            InfoError: a daemon was obeyed here, and ``info`` names another run or another place in the fleet. Writers
                of that run may still reach this memory, so only a restart of the engine makes it another's.
            InfoError: the daemon of another hub is connected, and one of the two must end.
            AgentStuck: the old thread has not ended, so a second one would share its endpoint.
        """
        old = self._agent
        if old is not None:
            if info == self._info and old.alive:
                return
            if old.epoch:
                self._require_the_same_place(info)
            self._require_no_other_daemon(old, info)
            old.close("replaced by a newer init")
            if old.alive:
                raise AgentStuck(f"the agent's thread has not ended within {STOP_SECONDS:g} s; restart the engine")
        member = Member("inference", info.engine, self.ranks.rank)
        identity = Identity(info.run_id, member, self.ranks.with_world(info.world).world)
        address = ControlAddress(info.hub_url, Path(info.token_file))
        weights, windows, shadow, lending = self._weights, self._windows, self._shadow, self._lending
        device = weights.cuda_device
        self._agent = AgentThread(
            identity,
            address,
            lambda thread: InferenceSide(thread, member, weights, windows, shadow, lending),
            lambda transport: preflight("engine", device, transport),
            old,
        )
        self._info = info
        self._agent.start()

    def update(self, info: UpdateInfo) -> None:
        """One round, on the main thread: stand still, let the weights arrive, verify, leave as the daemon says.

        Raises:
            UpdateFailed: the round was not committed here; ``status`` says what live memory holds now.
            AgentError: something else holds copies of the weights and does not let go of them.
        """
        agent = self._agent
        if agent is None or (reason := self._unfit(agent, info.round_epoch)):
            raise UpdateFailed(reason if agent is not None else NOBODY)
        began = time.monotonic()
        self._drain(info.deadline_seconds)  # before the look at the experts, which it may have caught half moved
        if self._weights.follow_experts():
            # The plan's targets hold other experts now, so it must be made anew before any byte is granted.
            self._shadow.forget()
            agent.post(agent.announce)
            raise UpdateFailed(REBALANCED)
        left = round(max(0.0, info.deadline_seconds - (time.monotonic() - began)), 3)  # as people read it
        name, version = RoundName(info.round_epoch, info.round_number), Version(info.generation, info.step)
        update = Update(name, version, left, info.exposes)

        def tell(word: object) -> None:
            match word:
                case RoundName():
                    self._tell(Quiesced(round=word))
                case Verified() | Exposed():
                    self._tell(word)
                case EngineStatus():
                    self._tell(Left(round=name, status=word))

        self._windows.serve_round(update, self._synchronise, self._verify, tell)

    def ready(self, info: SwitchInfo) -> str:
        """See ``WeightHolder.ready``."""
        reason = self._refusal(info)
        if not reason and not self._shadow.serves(info.version):
            self._weights.check()
        return reason

    def switchable(self, info: SwitchInfo) -> str:
        """See ``WeightHolder.switchable``. Experts that have moved since the plan was made end what has landed."""
        reason = self._refusal(info)
        if reason or self._shadow.serves(info.version):
            return reason
        self._drain(info.deadline_seconds)
        if not self._weights.follow_experts():
            return ""
        self._shadow.forget()
        agent = self._agent
        assert agent is not None, "else it had been refused"
        agent.post(agent.announce)
        return REBALANCED

    def switch(self, info: SwitchInfo) -> None:
        """See ``WeightHolder.switch``.

        Raises:
            UpdateFailed: nothing was changed.
            Exception: live memory is torn.
        """
        if self._agent is None or (reason := self._unfit(self._agent, info.round.epoch)):
            raise UpdateFailed(reason if self._agent is not None else NOBODY)
        self._shadow.switch(info, self._synchronise)

    def around(self, change: Callable[[], T]) -> T:
        """See ``WeightHolder.around``. On the main thread, between two batches."""
        if not self.may_run:
            return change()  # nothing runs on them as it is
        before = self._weights.digest_anew()
        try:
            return change()
        finally:
            self._require_as_before(before)

    def close(self) -> None:
        """End the agent's thread."""
        if self._agent is not None:
            self._agent.close("the worker ends")

    # ----------------------------------------------------------------------------------------------------- internals
    def _refusal(self, info: SwitchInfo) -> str:
        if self._agent is None:
            return NOBODY
        return self._unfit(self._agent, info.round.epoch) or self._shadow.refusal(info)

    @staticmethod
    def _unfit(agent: AgentThread[InferenceSide], epoch: int) -> str:
        """Why no round can be served; empty when one of ``epoch`` can."""
        if ended := agent.ended:
            return ended
        if epoch != agent.epoch:
            return f"the round's epoch is {epoch}, and this worker obeys a daemon of epoch {agent.epoch}"
        return ""

    def _tell(self, word: RoundWord | Holding) -> None:
        agent = self._agent
        assert agent is not None, "words are answers"
        if isinstance(word, Holding):
            with contextlib.suppress(RuntimeError):  # its loop has ended; whoever follows it says it with its Hello
                agent.post(lambda: agent.send(Holding(status=self.status)))
            return
        try:
            agent.post(lambda: agent.say_once(self._as_it_is(word)))
        except RuntimeError:  # its loop has ended; whoever follows it says what it kept
            agent.obedience.keep(word)

    def _as_it_is(self, word: RoundWord) -> RoundWord:
        """A word that says what the memory holds may be overtaken: the agent's thread changes that, too."""
        return msgspec.structs.replace(word, status=self.status) if isinstance(word, Left) else word

    def _require_the_same_place(self, info: InitInfo) -> None:
        assert self._info is not None, "whoever obeyed a daemon was introduced to it"
        for field in ("run_id", "engine", "world"):
            known, asked = getattr(self._info, field), getattr(info, field)
            if known != asked:
                raise InfoError(
                    f"init_info.{field}: this worker obeys a daemon with {field} {known!r}, and {asked!r} was asked; "
                    "restart the engine to give it to another"
                )

    @staticmethod
    def _require_no_other_daemon(old: AgentThread[InferenceSide], info: InitInfo) -> None:
        known = old.address.url
        if old.connected and known != info.hub_url:
            raise InfoError(
                f"init_info.hub_url: this worker is connected to the daemon at {known!r}, and {info.hub_url!r} was "
                "asked; end one of the two daemons"
            )

    def _require_as_before(self, before: Digest) -> None:
        try:
            self._synchronise()
            if self._weights.digest_anew() == before:
                return
        except Exception:
            log.exception("the weights cannot be looked at after a call from outside")
        log.error("a call from outside has changed the weights of %s; they count as torn", self.status.applied)
        self._holdings.tear(True)
        self._tell(Holding(status=self.status))

    def _deaf(self) -> str:
        return NOBODY if self._agent is None else self._agent.ended

    def _abandoned(self) -> bool:
        lease = self.lease
        return lease is not None and lease[1] >= lease[0]

    def _synchronise(self) -> None:
        synchronize(self._device)

    def _verify(self, order: Verify) -> Verified:
        began = time.monotonic()
        try:
            self._weights.arrive(order.version)
            self._synchronise()
            applied = time.monotonic()
            digest = self._weights.digest()
        except Exception as error:  # the daemon decides what a rank that cannot verify means for the version
            log.exception("round %s cannot be verified", order.round)
            fault, retry = blame(error, "engine")
            return Verified(
                round=order.round,
                digest=NO_BYTES,
                bytes=0,
                apply_seconds=0.0,
                digest_seconds=0.0,
                error=clean(repr(error)),
                fault=fault,
                retry=retry,
            )
        ended = time.monotonic()
        return Verified(
            round=order.round,
            digest=digest,
            bytes=self._weights.bytes,
            apply_seconds=applied - began,
            digest_seconds=ended - applied,
        )
