"""A round under way: its frozen members, how far each is, and what was reported."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from weightsync.orchestrator.core.errors import NO_TROUBLE, Trouble
from weightsync.orchestrator.core.events import NO_PLAN, Call, PlanFacts
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.messages import EngineStatus, Verified
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version
from weightsync.orchestrator.protocol.traces.context import child


@dataclass(slots=True)
class Progress:
    """How far one engine is within the round, and how it lands, which is frozen when the round begins."""

    lands: Lands = "live"
    boundary: bool = True
    """It may switch between two of its steps."""
    serves_on: bool = False
    """It serves while its bytes arrive, until it switches."""
    pausing: bool = False
    """It was asked to pause for the switch."""
    paused: bool = False
    switching: bool = False
    """It was asked to switch …"""
    call_over: bool = False
    """… and the call has ended; of one that lands ``live``, the update call."""
    finishing: bool = False
    """It was asked to finish …"""
    finished: bool = False
    resuming: bool = False
    """… and to resume."""
    resumed: bool = False
    paused_at: float = 0.0
    """When it was asked to pause."""
    served_at: float = 0.0
    """When it was known to serve the version."""
    applied_at: float = 0.0
    finished_at: float = 0.0
    resumed_at: float = 0.0
    http_seconds: float = 0.0
    """In the calls that do nothing but wait for the engine: pause, switch, finish, resume."""
    switch_seconds: float = 0.0
    """How long it took no step for the switch, as it says itself."""
    audit_seconds: float = 0.0
    """How long the slowest of its workers looked at what it holds after the switch, beside serving."""
    left_out: str = ""
    """Why the round goes on without it."""
    kept: bool = False
    """All that an earlier attempt has written to it stands by, verified: nothing more is."""

    @property
    def shadow(self) -> bool:
        """Nothing remote reaches its live memory: a whole version lands beside it."""
        return self.lands != "live"

    def asked(self, call: Call) -> bool:
        """Whether this round has made ``call``, one of those that it makes."""
        made = {
            Call.PAUSE: self.pausing, Call.UPDATE: self.switching, Call.SWITCH: self.switching,
            Call.FINISH: self.finishing, Call.RESUME: self.resuming,
        }  # fmt: skip
        return made[call]


@dataclass(frozen=True, slots=True)
class KeptStandby:
    """What a round that was given up has written to one engine, all of it, and which stays there: the next attempt
    writes it no more, once its workers say that this is what they have in their standby."""

    round: RoundName
    version: Version
    restaged: int
    """Of which staging it is: a version that FAILED may come again with other weights."""
    owed: dict[Member, tuple[Digest, int]]
    """By rank, digest and bytes of what its writers said they sent."""
    landed: dict[Member, str]
    """By rank, the fingerprint of the Connect by which that came."""


@dataclass(slots=True)
class Round:
    """One attempt to bring ``engines`` to ``version``. Its members are frozen; some may be left out on the way."""

    name: RoundName
    version: Version
    attempt: int
    catch_up: bool
    engines: dict[str, Progress]
    ranks: dict[Member, int]
    """Inference ranks and their incarnations."""
    writers: dict[Member, tuple[Member, ...]]
    """Trainer ranks, or ranks of lenders, that have bytes to write, and to whom."""
    sources: dict[Member, int] = field(default_factory=dict)
    """Their incarnations."""
    ahead: bool = False
    """The version is not published yet: it is written while the trainer converts it, and not decided before."""
    publish: str = ""
    """Trace context of the publish that it is for."""
    restaged: int = 0
    """How often the version had been staged before."""
    plan: PlanFacts = NO_PLAN
    """By which they write."""
    relay: PlanFacts = NO_PLAN
    """By which engines of the round write to others of it; without connects where none does."""
    lenders: dict[str, str] = field(default_factory=dict)
    """Engines → the engine that writes to them: in a catch-up one that serves the version, in another round one that
    has verified it. Trainer ranks write to all others."""
    lent: dict[Member, Digest] = field(default_factory=dict)
    """By rank of those, what it will hold: as the journal has decided it for the lender, or as that has verified it."""
    wave: int = 0
    """1 when WRITING and VERIFYING come again, for engines that take from others of the round."""
    writing: dict[Member, tuple[Member, ...]] = field(default_factory=dict)
    """Those of the writers that were granted in this wave, and to whom."""
    rollback: bool = False
    """To a version that all engines have in their standby: nothing is written."""
    quorum: int = 1
    """Engines without which nothing is decided."""
    phase: Phase = Phase.PAUSING
    phase_began: float = 0.0
    deadline: float = 0.0
    granted: bool = False
    live: tuple[str, ...] = ()
    """Engines that the decision is about; empty before it."""
    switched_at: float = 0.0
    trouble: Trouble = NO_TROUBLE
    """Why it was given up."""
    waited: float = 0.0
    """Of the patience, what earlier phases took."""
    keeps_another: bool = False
    """An engine that is not of it, and that nothing is wrong with, could catch up now instead."""
    first_done: float | None = None
    """When the first engine had nothing more to do in this phase, while others had."""
    away: dict[Member, tuple[float, str]] = field(default_factory=dict)
    """Members without a connection: since when, and why."""
    quiesced: set[Member] = field(default_factory=set)
    exposed: set[Member] = field(default_factory=set)
    closed: dict[Member, dict[Member, PeerTransfer]] = field(default_factory=dict)
    """What each writer moved to the peers that it is done with …"""
    final: set[Member] = field(default_factory=set)
    """… and writers that are done with everybody."""
    failed: dict[Member, Trouble] = field(default_factory=dict)
    """Why a writer could not go on."""
    expected: dict[Member, tuple[Digest, int]] = field(default_factory=dict)
    """Digest and bytes that the writers say they sent to each inference rank; once all are CLOSED."""
    verified: dict[Member, Verified] = field(default_factory=dict)
    left: dict[Member, EngineStatus] = field(default_factory=dict)
    began: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each phase."""
    by_engine: dict[str, tuple[Member, ...]] = field(init=False)
    trace: str = field(init=False)
    """Trace context of all that is done in it."""

    def __post_init__(self) -> None:
        self.trace = child(self.publish, f"round {self.name}")
        self.by_engine = {name: tuple(m for m in self.ranks if m.engine == name) for name in self.engines}

    @property
    def decided(self) -> bool:
        """From here only forward."""
        return bool(self.live)

    @property
    def awaits_trainer(self) -> bool:
        """No engine can be late: what is written to them may still be in the making."""
        return self.ahead and self.phase in (Phase.WRITING, Phase.VERIFYING)

    @property
    def reason(self) -> str:
        """Why it was given up, in one sentence; empty while it was not."""
        return self.trouble.reason

    def plan_of(self, writer: Member) -> PlanFacts:
        """By which it writes."""
        return self.relay if self.relay.connects and writer.role == "inference" else self.plan

    def relays_to(self, engine: str) -> bool:
        """Whether the engine takes the version from another one of the round."""
        return engine in self.lenders and not self.catch_up

    def in_wave(self, engine: str) -> bool:
        """Whether the engine is written to, and verifies, in this wave."""
        return self.relays_to(engine) == bool(self.wave)

    def owes_a_digest(self, member: Member) -> bool:
        """Whether this rank has been asked to verify, and has not yet."""
        return self.has(member.engine) and self.in_wave(member.engine) and member not in self.verified

    def orphans(self) -> list[str]:
        """Engines that were to take the version from one that was left out, which has not written all of it."""
        lost = [name for name in self.remaining() if self.relays_to(name) and not self.has(self.lenders[name])]
        closed = {(writer, target) for writer, done in self.closed.items() for target in done}
        owed = ((writer, target) for writer, targets in self.writers.items() for target in targets)
        unwritten = {target.engine for writer, target in owed if (writer, target) not in closed}
        return [name for name in lost if name in unwritten]

    @property
    def lending(self) -> bool:
        """Engines are, or were, writing to others."""
        return bool(self.lenders) and (self.catch_up or bool(self.wave))

    def concerns(self, engine: str) -> bool:
        """Whether the engine is one of those that the round began with, or lends to them."""
        return engine in self.engines or any(writer.engine == engine for writer in self.writers)

    def remaining(self) -> list[str]:
        """Engines of the round that were not left out."""
        return [name for name, progress in self.engines.items() if not progress.left_out]

    def has(self, engine: str) -> bool:
        """Whether the engine is in the round and was not left out."""
        progress = self.engines.get(engine)
        return progress is not None and not progress.left_out

    def stands_by(self, member: Member, digest: Digest, size: int) -> None:
        """This rank has verified the version before the round began."""
        self.expected[member] = digest, size
        self.verified[member] = Verified(
            round=self.name, digest=digest, bytes=size, apply_seconds=0.0, digest_seconds=0.0
        )  # fmt: skip

    def remaining_ranks(self) -> Iterator[Member]:
        """Inference ranks of the engines that were not left out."""
        return (member for member in self.ranks if not self.engines[member.engine].left_out)

    def is_done(self, writer: Member) -> bool:
        """The writer has closed its grant towards all engines that were not left out."""
        done = self.closed.get(writer, {})
        open_to = (target for target in self.writers[writer] if target not in done)
        return writer in self.final or not any(self.has(target.engine) for target in open_to)
