"""A small fleet that the tests drive through the real core by hand: one trainer rank, engines of two ranks each."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fleets import ANNOUNCE, BYTES_PER_EDGE, plan_facts, policy_for, rank, trainer
from told import round_trip
from weightsync.orchestrator.core.commands import (
    Append,
    CallEngine,
    Command,
    MakePlan,
    Say,
    Send,
    SendPlan,
    WriteMarker,
)
from weightsync.orchestrator.core.events import (
    AgentConnected,
    AgentLost,
    AgentSaid,
    Appended,
    Call,
    CallDone,
    CallFailed,
    Event,
    MarkersSeen,
    PlanReady,
    StableSeen,
    Tick,
)
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.records import AnyRecord, Record, VersionFailed
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Lands, Layout
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Closed,
    EngineStatus,
    Exposed,
    FromAgent,
    FromDaemon,
    Hello,
    Left,
    Quiesced,
    Ready,
    Staged,
    TrainerStatus,
    Verified,
)
from weightsync.orchestrator.protocol.names import Digest, Member, Version

TRAINER = trainer()
GENERATION = 7
DIGEST = (11, 13)


@dataclass
class Driven:
    """The fleet, its clock, and everything that it commanded. Calls to engines are answered by the test alone."""

    engines: tuple[str, ...] = ("e0",)
    pairs: tuple[tuple[str, ...], ...] = ()
    ranks: int = 2
    records: list[AnyRecord] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    now: float = 0.0
    digest: tuple[int, int] = DIGEST
    lands: dict[str, Lands] = field(default_factory=dict)
    """How engines land; those that it does not name land live."""
    boundary: bool = True
    reads_only: tuple[str, ...] = ()
    """Engines that cannot write what they serve."""

    @classmethod
    def joined(cls, **options: Any) -> "Driven":
        """A fleet whose plan is confirmed and that waits for a version. ``options``: of its policy."""
        fleet = cls(options=options)
        fleet.join()
        fleet.settle()
        return fleet

    def __post_init__(self) -> None:
        self.ids = itertools.count(1)
        self.policy = policy_for(self.engines, self.pairs, **self.options)
        self.fleet: Fleet
        self.fleet, self.commands = start(self.policy, "journal", self.records, self.now)
        self.digests: dict[Version, Digest] = {}
        """Of the versions that workers have left with; every rank has the same."""
        self.connections: dict[Member, int] = {}
        self.incarnations: dict[Member, int] = {}

    # --------------------------------------------------------------------------------------------------------- events
    def happens(self, *events: Event) -> list[Command]:
        fresh = step(self.fleet, events, self.now)
        round_trip(fresh)
        self.commands.extend(fresh)
        return fresh

    def id(self) -> int:
        return next(self.ids)

    def connect(
        self, member: Member, status: TrainerStatus | EngineStatus | None = None, **hello: Any
    ) -> list[Command]:
        """A Hello on a new connection; of the same process as before, unless ``hello`` says otherwise."""
        self.connections[member] = connection = self.id()
        trainer = member.role == "trainer"
        said = Hello(**{
            "schema": SCHEMA_VERSION, "run_id": "unit", "member": member, "world": 1 if trainer else self.ranks,
            "incarnation": self.incarnations.get(member, 100 + member.rank), "generation": GENERATION if trainer else 0,
            "trainer": status or TrainerStatus() if trainer else None,
            "engine": None if trainer else status or EngineStatus(), **hello,
        })  # fmt: skip
        self.incarnations[member] = said.incarnation
        return self.happens(AgentConnected(self.id(), member, connection, said))

    def says(self, member: Member, message: FromAgent) -> list[Command]:
        return self.happens(AgentSaid(self.id(), member, self.connections[member], message))

    def loses(self, member: Member) -> list[Command]:
        return self.happens(AgentLost(self.id(), member, self.connections[member], "reset"))

    def answers(self, engine: str, call: Call, paused: bool | None = None, **more: float) -> list[Command]:
        """The engine's answer to the call of this kind that is under way."""
        number = self.fleet.engines[engine].calls[call]
        return self.happens(CallDone(self.id(), engine, call, number, 0.01, paused, **more))

    def fails(self, engine: str, call: Call, reason: str = "500") -> list[Command]:
        number = self.fleet.engines[engine].calls[call]
        return self.happens(CallFailed(self.id(), engine, call, number, reason))

    def durable(self) -> list[Command]:
        assert self.fleet.awaited is not None
        return self.happens(Appended(self.id(), *self.fleet.awaited))

    def passes(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.happens(Tick(self.id()))

    # ----------------------------------------------------------------------------------------------- towards a round
    def join(self) -> None:
        """Everybody connects and announces; the plan is made and confirmed."""
        self.connect(TRAINER)
        self.says(TRAINER, ANNOUNCE)
        for name in self.engines:
            self.happens(Tick(self.id()))
            self.answers(name, Call.PROBE, True)
            self.bring(name)
        self.plan()
        if self.fleet.feed is not None:
            self.plan()  # how engines write to one another

    def bring(self, engine: str, status: EngineStatus | None = None, **hello: Any) -> None:
        """All ranks of an engine connect and announce."""
        for member in self.ranks_of(engine):
            self.connect(member, status, **hello)
            self.says(member, self.announcement(engine))

    def announcement(self, engine: str) -> Announce:
        """What a rank of the engine announces."""
        layout = Layout((), (), b"", lands=self.lands.get(engine, "live"), boundary=self.boundary)
        return Announce(layout=layout, lends_name="" if engine in self.reads_only else "lends")

    def loses_engine(self, engine: str) -> None:
        """Its processes die, and all their connections end together."""
        ranks = self.ranks_of(engine)
        self.happens(*(AgentLost(self.id(), member, self.connections[member], "reset") for member in ranks))

    def ranks_of(self, *engines: str) -> list[Member]:
        """The inference ranks of these engines, of all without any."""
        return [rank(name, number) for name in engines or self.engines for number in range(self.ranks)]

    def plan(self) -> None:
        """Answer the newest MakePlan, and confirm for everybody."""
        wanted = [command for command in self.commands if isinstance(command, MakePlan)][-1]
        self.happens(PlanReady(self.id(), wanted.number, plan_facts(wanted), wanted.lends))
        self.happens(Tick(self.id()))
        for command in [command for command in self.commands if isinstance(command, SendPlan)]:
            agent = self.fleet.agents.get(command.member)
            if agent is not None and command.connect.fingerprint == agent.was_sent(command.connect):
                self.says(command.member, Ready(fingerprint=command.connect.fingerprint))

    def stage(self, number: int = 1) -> Version:
        """The trainer has staged a step and marked it."""
        version = Version(GENERATION, number)
        self.says(TRAINER, Staged(version=version, bytes=BYTES_PER_EDGE, convert_seconds=0.1, digest_seconds=0.1))
        self.happens(MarkersSeen(self.id(), (StableSeen(number, GENERATION),)))
        return version

    def settle(self) -> None:
        """Answer every probe and init, so that nothing but the round is under way."""
        for name, engine in self.fleet.engines.items():
            for call in (Call.PROBE, Call.ATTACH):
                if call in engine.calls:
                    self.answers(name, call, engine.paused is not False if call is Call.PROBE else None)

    @property
    def round(self) -> Round:
        assert self.fleet.round is not None
        return self.fleet.round

    def to(self, phase: Phase) -> Round:
        """Go on as a round without trouble does, until it is in ``phase``."""
        if self.fleet.round is None:
            self.join()
            self.settle()
            self.stage()
            self.settle()
        going = self.round
        while going.phase is not phase:
            self._forward(going)
        return going

    def _forward(self, going: Round) -> None:
        version, everybody = going.version, self.ranks_of()
        match going.phase:
            case Phase.PAUSING:
                for name in [name for name in self.engines if Call.PAUSE in self.fleet.engines[name].calls]:
                    self.answers(name, Call.PAUSE, True)
            case Phase.QUIESCING:
                for member in [member for member in everybody if not self.shadow(member.engine)]:
                    self.says(member, Quiesced(round=going.name))
            case Phase.EXPOSING:
                kept = {name for name, progress in going.engines.items() if progress.kept}
                for member in [member for member in everybody if member.engine not in kept]:
                    self.says(member, Exposed(round=going.name))
            case Phase.MARKING | Phase.DECIDING | Phase.RECORDING:
                self.durable()
            case Phase.WRITING:
                for writer in list(going.writing):
                    self.says(writer, self.closed(writer))
            case Phase.VERIFYING:
                for member in list(filter(going.owes_a_digest, everybody)):
                    self.says(member, self.verified())
            case Phase.SWITCHING:
                self.leave(version)
                for call, paused in ((Call.FINISH, None), (Call.RESUME, False)):
                    for name in [name for name in self.engines if call in self.fleet.engines[name].calls]:
                        self.answers(name, call, paused)
            case other:
                raise AssertionError(f"nothing leads on from {other}")

    def leave(self, version: Version) -> None:
        """All workers leave the round with ``version``, and the calls that they leave answer."""
        for name in [name for name in self.engines if Call.PAUSE in self.fleet.engines[name].calls]:
            self.answers(name, Call.PAUSE, True)
        for name in [name for name in self.engines if Call.SWITCH in self.fleet.engines[name].calls]:
            self.answers(name, Call.SWITCH, self.fleet.engines[name].paused, switch_seconds=0.002)
        for member in self.ranks_of():
            self.says(member, self.left(member, version))
        for name in [name for name in self.engines if not self.shadow(name)]:
            self.answers(name, Call.UPDATE)

    def shadow(self, engine: str) -> bool:
        return self.lands.get(engine, "live") != "live"

    def left(self, member: Member, version: Version) -> Left:
        """What an honest worker says that has left the round with ``version``: one that flips keeps the one before."""
        before = self.fleet.agents[member].status.applied
        if before == version:
            return Left(round=self.round.name, status=self.fleet.agents[member].status)
        status = EngineStatus(applied=version)
        if self.lands.get(member.engine) == "flip" and before is not None:
            status = EngineStatus(applied=version, standby=before, standby_digest=self.digests[before])
        self.digests[version] = self.digest
        return Left(round=self.round.name, status=status)

    def each(self, work: Callable[[str], object]) -> None:
        for name in self.engines:
            work(name)

    def closed(self, writer: Member = TRAINER, **more: Any) -> Closed:
        """What an honest writer says at the end of the round's grant."""
        granted = self.round.writers[writer]
        peers = tuple(PeerTransfer(member, BYTES_PER_EDGE, 1, 0.01, self.digest) for member in granted)
        return Closed(**{"round": self.round.name, "peers": peers, **more})

    def verified(self, **more: Any) -> Verified:
        """What an honest worker finds."""
        found = {
            "round": more.get("round") or self.round.name,
            "digest": self.digest,
            "bytes": BYTES_PER_EDGE,
            "apply_seconds": 0.0,
            "digest_seconds": 0.0,
        }
        return Verified(**{**found, **more})

    # ------------------------------------------------------------------------------------------------ what was wanted
    def written(self) -> list[Record]:
        return [command.record for command in self.commands if isinstance(command, Append)]

    def sent(self, member: Member, kind: type[FromDaemon]) -> list[Any]:
        sends = [command for command in self.commands if isinstance(command, Send) and command.member == member]
        return [send.message for send in sends if isinstance(send.message, kind)]

    def called(self, engine: str, call: Call) -> int:
        return sum(isinstance(c, CallEngine) and (c.engine, c.call) == (engine, call) for c in self.commands)

    def marked(self) -> list[tuple[str, Version]]:
        return [(command.kind, command.version) for command in self.commands if isinstance(command, WriteMarker)]

    def failures(self) -> list[str]:
        """Why versions FAILED."""
        return [record.reason for record in self.written() if isinstance(record, VersionFailed)]

    def told(self) -> str:
        return "\n".join(command.sentence for command in self.commands if isinstance(command, Say))


@pytest.fixture
def drive() -> type[Driven]:
    return Driven
