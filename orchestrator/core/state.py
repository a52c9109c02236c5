"""Everything the daemon knows, in one place; changed only by the functions of this package."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from weightsync.orchestrator.core.errors import NO_TROUBLE, Trouble
from weightsync.orchestrator.core.events import Call, PlanFacts, StableSeen
from weightsync.orchestrator.core.memory import Memory
from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.records import LinkUse
from weightsync.orchestrator.core.round.feed import Feed
from weightsync.orchestrator.core.round.progress import KeptStandby, Round
from weightsync.orchestrator.protocol.edges import LinkKind
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.layout import Lands, LeftOut, contents
from weightsync.orchestrator.protocol.messages import Announce, Connect, EngineStatus, Fault, Hello, Needs, Staged
from weightsync.orchestrator.protocol.names import Member, RoundName, Version


@dataclass(frozen=True, slots=True)
class Renewal:
    """A worker is to be reached by another endpoint: asked for when it is ``due``, and again after ``wait`` seconds."""

    due: float
    wait: float


@dataclass(slots=True)
class ConnectedAgent:
    """One connected agent process. Gone from the fleet when its connection is."""

    member: Member
    connection: int
    hello: Hello
    announce: Announce | None = None
    delivered: str = ""
    """The edge set that it was sent in round 2 …"""
    fingerprint: str = ""
    """… and the one that it confirmed."""
    dead_edges: dict[Member, str] = field(default_factory=dict)
    """Peers that it cannot reach, and why."""
    renewal: Renewal | None = None
    """When it is asked for another endpoint; None while all writers reach it."""
    lends_delivered: str = ""
    """Of a rank that lends: the edge set by which it may, as it was sent …"""
    lends: str = ""
    """… and confirmed."""
    unlent: dict[Member, str] = field(default_factory=dict)
    """Peers that it cannot lend to, and why."""
    relayed_delivered: str = ""
    """Of a rank that others of its rounds write to: that edge set, as it was sent …"""
    relayed: str = ""
    """… and confirmed."""
    unrelayed: dict[Member, str] = field(default_factory=dict)
    """Peers that cannot write to it by that, and why."""
    told_needs: str = ""
    """Fingerprint of the Needs that it was sent last."""
    told_hold: bool | None = None
    """What Hold it was sent last on this connection."""
    findings: tuple[Finding, ...] = ()
    """What is wrong around its process, as it said on this connection."""
    staged: Staged | None = None
    converting: Version | None = None  # until it says STAGED or gives it up
    standing: str = ""
    """What a trainer's first rank was told last of what the daemon does."""
    status: EngineStatus = field(default_factory=EngineStatus)
    _contents: bytes | None = None

    def announces(self, announce: Announce | None) -> None:
        """Its layout is ``announce`` from now on, so that no plan of before counts; None: it must announce anew."""
        self.announce = announce
        self.delivered = self.fingerprint = ""
        self.lends_delivered = self.lends = self.relayed_delivered = self.relayed = ""
        self.dead_edges, self.unlent, self.unrelayed = {}, {}, {}
        self._contents = None

    def was_sent(self, connect: Connect) -> str:
        """The edge set of this kind that it was sent last."""
        return self.lends_delivered if connect.lends else self.relayed_delivered if connect.relays else self.delivered

    def is_sent(self, connect: Connect) -> None:
        """This edge set. If it runs another one, it will at some time run that no more."""
        if connect.lends:
            self.lends_delivered, self.unlent = connect.fingerprint, {}
            if self.lends != connect.fingerprint:
                self.lends = ""
        elif connect.relays:
            self.relayed_delivered, self.unrelayed = connect.fingerprint, {}
            if self.relayed != connect.fingerprint:
                self.relayed = ""
        else:
            self.delivered = connect.fingerprint
            if self.fingerprint != connect.fingerprint:
                self.fingerprint = ""

    def resumes(self, before: "ConnectedAgent") -> None:
        """It is the process of ``before`` on a new connection. Its Connects are sent again: they may be lost, and what
        an agent does about its edges ends with the connection."""
        self.announce, self.fingerprint, self.dead_edges = before.announce, before.fingerprint, before.dead_edges
        self.lends, self.unlent = before.lends, before.unlent
        self.relayed, self.unrelayed, self._contents = before.relayed, before.unrelayed, before._contents

    @property
    def unreached(self) -> dict[Member, str]:
        """Of a writer, a trainer rank or one that lends: whom it cannot write to, and why."""
        return self.unlent if self.member.role == "inference" else self.dead_edges

    @property
    def contents(self) -> bytes:
        """Of its layout, see ``protocol.layout``; nothing where there is none that can be read."""
        if self._contents is None:
            try:
                self._contents = contents(self.announce.layout) if self.announce is not None else b""
            except ValueError:
                self._contents = b""
        return self._contents


@dataclass(slots=True)
class EngineState:
    """One engine that is a member. ``heard``: when one that was admitted lived; ``connected``: by its agents' word."""

    name: str
    pair: str = ""
    """Name of its prefill/decode pair, which pauses and resumes as one; empty for an engine on its own."""
    heard: float = 0.0
    connected: bool = False
    reachable: bool = False
    paused: bool | None = None
    """What the engine itself said last; None where it did not say."""
    calls: dict[Call, int] = field(default_factory=dict)
    """Calls under way: which, and their number."""
    switch_again_at: float = 0.0
    """When it may be asked to switch again, if the last switch shows no effect till then; 0 where there was none."""
    probe_at: float = 0.0
    """When it is to be looked at again, though nothing happened …"""
    touched: bool = True
    """… or at once, since something did …"""
    unseen: bool = True
    """… which no call has followed yet."""
    misfit: str = ""
    """Why its layout does not fit the trainer's; left out of plans until it announces anew."""
    misfit_fault: Fault = ""
    ranks: dict[int, ConnectedAgent] = field(default_factory=dict)
    """Its connected agents, by rank and in this order."""
    error: str = ""
    """Why its last call failed; empty after a call that did not."""
    fault: Fault = ""
    """Whose fault that is."""
    left_out_said: dict[int, tuple[LeftOut, ...]] = field(default_factory=dict)
    """By rank: what the log says that its rounds leave out."""
    failures: int = 0
    """Rounds in a row that it was left out of by its own fault."""
    retry_at: float = 0.0
    """Until then it is in no round; nobody else waits for it."""
    blame: Trouble = NO_TROUBLE
    """Why it was left out last."""
    blamed_at: float = 0.0
    torn_by: Version | None = None  # the version whose round may have torn it
    kept: KeptStandby | None = None  # what a round that was given up has written to it

    @property
    def complaint(self) -> tuple[str, Fault]:
        """What keeps it from taking part, and whose fault that is: its layout, its last call, its last round."""
        if self.misfit:
            return self.misfit, self.misfit_fault
        if self.error:
            return self.error, self.fault
        return self.blame.reason, self.blame.fault


@dataclass(slots=True)
class Unclosed:
    """A grant whose writer has not said CLOSED to all ``targets``: they are tainted until it does or is proved dead."""

    incarnation: int
    host: str
    boot: str
    targets: dict[Member, int]
    """Inference ranks it may write to, and their incarnations: a restarted one is out of its reach."""
    outlived: bool = False
    """Its round is over, so that the journal must learn of its end."""

    def is_proved_dead_by(self, hello: Hello) -> bool:
        """A newer process of the same rank where it ran: whoever starts one there has ended it."""
        same_place = bool(self.boot) and (self.host, self.boot) == (hello.host, hello.boot)
        return same_place and hello.incarnation != self.incarnation


@dataclass(slots=True)
class Fleet:
    """The whole state. ``started``, ``ended_at``: the daemon, its last round; ``words``: see ``core.since``."""

    policy: Policy
    journal_id: str
    memory: Memory
    epoch: int
    started: float
    engines: dict[str, EngineState]
    life: str = ""
    """Nonce of this start."""
    lists: tuple[object, ...] = ()
    """What the members follow from and who they are, as ``membership.roster`` last left them."""
    gone: dict[Member, ConnectedAgent] = field(default_factory=dict)
    """The last connection of each member that has none now: its process may come back on another."""
    agents: dict[Member, ConnectedAgent] = field(default_factory=dict)
    trainer_ranks: dict[int, ConnectedAgent] = field(default_factory=dict)
    generation: int | None = None
    stable: tuple[StableSeen, ...] = ()
    stale_said: dict[StableSeen, None] = field(default_factory=dict)
    """Markers of an earlier trainer that a log line already names."""
    stable_looks: int = 0
    """How often the marker of the version that all ranks have staged was looked for."""
    looking: bool = False
    """A look for it is under way; the next MarkersSeen ends it."""
    marked: dict[Version, None] = field(default_factory=dict)
    """Versions whose outcome this daemon has put beside STABLE."""
    waiting_since: dict[Version, float] = field(default_factory=dict)
    """Versions that some rank staged, and since when."""
    attempts: dict[Version, int] = field(default_factory=dict)
    first_attempt: dict[Version, float] = field(default_factory=dict)
    """When the first round for a version began that is not committed yet."""
    retry_at: dict[Version, float] = field(default_factory=dict)
    """Not before; a version that waits for its next attempt holds up no other."""
    unclosed: dict[tuple[Member, RoundName], Unclosed] = field(default_factory=dict)
    plan: PlanFacts | None = None
    planned_for: frozenset[tuple[Member, int]] = frozenset()
    """(member, incarnation) of everybody in the plan."""
    plan_number: int = 0
    confirmed_plan: int = 0
    """Number of the last plan whose every member has confirmed."""
    planning: bool = False
    quorum_since: float | None = None
    """Since when enough engines for the first plan are here."""
    plan_error: str = ""
    planned_at: float = 0.0
    feed: Feed | None = None
    feed_number: int = 0
    passed_over: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    """(engine, lender) of which nothing came → until when nothing is expected, and why."""
    needs: Needs | None = None
    """What the attached engines need together, as far as it was worked out."""
    needs_of: frozenset[tuple[Member, int]] = frozenset()
    """(member, incarnation) of the ranks whose layouts that is about."""
    needs_number: int = 0
    unlike: frozenset[str] = frozenset()
    """Engines whose misfit is that they need a tensor in another way than an engine before them."""
    group: tuple[tuple[Member, int], ...] = ()
    """Members and their connections in the StatelessProcessGroup (``rendezvous: tcpstore``), in rank order from 1."""
    round: Round | None = None
    ended_at: float = 0.0
    awaited: tuple[str, RoundName] | None = None
    """Kind and round of the record that must be durable before the round goes on."""
    call_number: int = 0
    """Of the newest call to any engine."""
    links: dict[str, LinkUse] = field(default_factory=dict)
    """What the last round that moved anything did by each kind of link …"""
    link_rates: dict[tuple[LinkKind, Lands], float] = field(default_factory=dict)
    """… and the most that an end of one has carried since this daemon began, in bytes per second."""
    words: dict[str, tuple[str, float]] = field(default_factory=dict)
    stopping: bool = False
    sentence: str = ""
    """What the daemon does and why, as said last."""

    def enter(self, agent: ConnectedAgent) -> None:
        """Take a connected agent in."""
        self.gone.pop(agent.member, None)
        self.agents[agent.member] = agent
        home, rank = self._home(agent.member), agent.member.rank
        behind = rank < next(reversed(home), rank)
        home[rank] = agent
        for other in sorted(home) if behind else ():  # put in order here, since it is read after every event
            home[other] = home.pop(other)

    def leave(self, member: Member) -> ConnectedAgent | None:
        """End a connection; returns what was known of it, which is kept in case that its process comes back."""
        self._home(member).pop(member.rank, None)
        agent = self.agents.pop(member, None)
        if agent is not None:
            self.gone[member] = agent
        return agent

    def _home(self, member: Member) -> dict[int, ConnectedAgent]:
        return self.trainer_ranks if member.role == "trainer" else self.engines[member.engine].ranks

    def unit(self, engine: str) -> list[str]:
        """The engines that pause and resume as one with ``engine``: its prefill/decode pair, or it alone."""
        pair = self.engines[engine].pair
        return [name for name, other in self.engines.items() if other.pair == pair] if pair else [engine]

    def touch(self, engine: str) -> None:
        """Something happened to the engine, which may concern its pair."""
        for name in self.unit(engine):
            self.engines[name].touched = True

    def trainers(self) -> list[ConnectedAgent]:
        """Connected trainer ranks, by rank."""
        return list(self.trainer_ranks.values())

    def ranks_of(self, engine: str) -> list[ConnectedAgent]:
        """Connected ranks of an engine, by rank."""
        return list(self.engines[engine].ranks.values())

    def trainer_world(self) -> int | None:
        """How many trainer ranks there are to be, once one has said so."""
        return next((agent.hello.world for agent in self.trainers()), self.policy.trainer_world)

    def trainers_whole(self) -> bool:
        """All ranks of the trainer are connected and have announced their layouts."""
        ranks = self.trainer_ranks
        for agent in ranks.values():
            if agent.announce is None or agent.hello.world != len(ranks):
                return False
        return bool(ranks)

    def attached(self, engine: str) -> bool:
        """All ranks of the engine are connected and have announced, and its routes answer."""
        state = self.engines[engine]
        if not state.reachable or not state.ranks:
            return False
        for agent in state.ranks.values():
            if agent.announce is None or agent.hello.world != len(state.ranks):
                return False
        return True

    def version_of(self, engine: str) -> Version | None:
        """The committed version that every rank of the engine holds, whole; None if they hold none or differ."""
        ranks = self.engines[engine].ranks
        held: Version | None = None
        for agent in ranks.values():
            whole = agent.status.whole
            if whole is None or agent.hello.world != len(ranks) or held not in (None, whole):
                return None
            held = whole
        return held

    def mixed(self, engine: str) -> bool:
        """All ranks are here, none is inside a round, and they hold different versions: some have switched."""
        ranks = self.ranks_of(engine)
        whole = bool(ranks) and len(ranks) == ranks[0].hello.world and not any(a.status.window for a in ranks)
        return whole and len({agent.status.applied for agent in ranks}) > 1

    def torn(self, engine: str) -> bool:
        """Some rank says that its live memory may be neither its old version nor a new one."""
        return any(agent.status.torn for agent in self.engines[engine].ranks.values())

    def quorum(self) -> int:
        """Engines that a commit needs, of those that are there to be."""
        return self.policy.quorum(len(self.expected()))

    def expected(self) -> list[str]:
        """Members that rounds may wait for: not drained, and not forgotten while a round still has them."""
        memory = self.memory
        away = memory.drains.keys() | memory.forgotten_engines.keys()
        return [name for name in self.engines if name not in away]

    def tainted(self, engine: str) -> list[tuple[Member, RoundName]]:
        """Writers that may still write into this engine's memory by a grant that they have not closed."""
        return [grant for grant, pending in self.unclosed.items() if self._reaches(pending, engine)]

    def _reaches(self, pending: Unclosed, engine: str) -> bool:
        here = self.engines[engine].ranks
        return any(
            target.engine == engine and (target.rank not in here or here[target.rank].hello.incarnation == incarnation)
            for target, incarnation in pending.targets.items()
        )

    def torn_by(self, version: Version) -> list[str]:
        """Engines that are torn by a round for ``version``."""
        return [name for name, engine in self.engines.items() if engine.torn_by == version and self.torn(name)]

    def usable(self) -> Iterator[str]:
        """Engines that a plan may include."""
        return (name for name, engine in self.engines.items() if self.attached(name) and not engine.misfit)

    def known(self, member: Member) -> ConnectedAgent:
        """The member's connection, or its last one. Only for members of a round, which have had one."""
        return self.agents[member] if member in self.agents else self.gone[member]

    def dead_edge(self, engine: str) -> str:
        """Why some rank of the engine cannot be written to by the trainer; empty where every edge is alive."""
        for agent in self.trainers():
            for peer, error in agent.dead_edges.items():
                if peer.engine == engine:
                    return f"{agent.member} cannot reach {peer}: {error}"
        for agent in self.ranks_of(engine):
            for peer, error in agent.dead_edges.items():
                return f"{agent.member} cannot be reached by {peer}: {error}"
        return ""

    def is_confirmed(self, member: Member, plan: PlanFacts | None = None) -> bool:
        """The member runs the edge set of ``plan``, else of the trainer's, as far as its edges are alive."""
        agent, plan = self.agents.get(member) or self.gone.get(member), plan or self.plan
        if plan is None or agent is None or member not in plan.connects:
            return False
        connect = plan.connects[member]
        told = agent.lends if connect.lends else agent.relayed if connect.relays else agent.fingerprint
        return connect.fingerprint == told
