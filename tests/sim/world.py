"""A simulated fleet under the real core: virtual time, seeded faults, workers whose memory is the judge.

Only the core runs for real. Trainers, engines, wires and the disk are models small enough to be read; what they get
wrong is what real ones get wrong. ``judge`` looks at the workers and at what is durable, never at the core's state.
"""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from answers import Answer, Reply
from faults import Faults
from fleets import policy_for
from judge import Judge
from places import Disk, RunDirectory
from simulated_daemon import SimulatedDaemon
from simulated_engine import Server, Worker
from simulated_shadow import ShadowWorker
from simulated_trainer import Job
from stories import brief
from virtual_time import VirtualTime, Work
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import (
    Call,
    DeadDeclared,
    DrainAsked,
    EngineApplied,
    Event,
    ForgetAsked,
    HoldAsked,
    MaintenanceAsked,
    PolicyChanged,
    Tick,
)
from weightsync.orchestrator.core.policy import Admission
from weightsync.orchestrator.protocol.application import Applicant, Application
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.names import Member
from wires import Agent

NUMBERS: Final[dict[str, float]] = {
    "min_engines": 0.5, "patience": 3.0, "lease": 0.0, "retry": 20.0, "backoff": 0.25, "join": 30.0, "staged": 30.0,
    "probe": 1.5, "probe_interval": 1.0,
    "attach": 2.0, "pause": 3.0, "quiesce": 3.0, "transfer": 4.0, "verify": 3.0, "finish": 3.0, "heartbeat": 1.0,
    "lost_after": 3,
}  # fmt: skip
"""Of the policy: the shipped ones divided, so that a world of minutes sees each of them pass many times."""

ADMISSION: Final = Admission(names=("a*",), host_names=("*",), networks=(), at_most=4, leave=6.0)
"""Who may make itself a member."""

LEAVING_SECONDS: Final = ADMISSION.leave + 3 * NUMBERS["heartbeat"] + 1.0
"""Until a daemon that runs counts no engine any more that is gone: its silence is noticed first."""

STORY_LINES: Final = 160

UNTOLD: Final = (Tick, EngineApplied)
"""Events that happen all the time."""


class World(VirtualTime):
    """Everything, and the clock.

    Engines refuse by themselves what would do harm: a resume of what is not servable. In a world that is not
    ``guarded`` they do not, so that the daemon is judged alone.

    Args:
        engines, ranks, trainers: how many; ``ranks`` of each engine.
        pairs: of engines.
        idle: each start of the trainer publishes one version and then nothing more.
        down: engines that are configured and not there.
        lands: how each engine lands, by its name; those that it does not name land live.
        meeting: engines whose ranks meet across engine cores, so that they are paused before they switch.
        more: of the policy.
    """

    def __init__(
        self,
        seed: int,
        engines: int = 2,
        ranks: int = 2,
        trainers: int = 2,
        *,
        guarded: bool = True,
        pairs: Iterable[tuple[str, ...]] = (),
        idle: bool = False,
        down: Iterable[str] = (),
        lands: Mapping[str, Lands] | None = None,
        meeting: Iterable[str] = (),
        **more: Any,
    ) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.guarded, self.idle = guarded, idle
        self.ranks, self.trainers = ranks, trainers
        self.journal_id = "journal"
        self.between_versions = (0.1, 1.0)
        self.configured = [f"e{number}" for number in range(engines)]
        self.applicants: dict[str, Applicant] = {}
        """Engines that make themselves members, as they describe themselves now."""
        self._left: dict[str, float] = {}
        """Until when the daemon may count engines of those that are gone."""
        self._pairs = list(pairs)
        self._lands, self._meeting = dict(lands or {}), set(meeting)
        self._more = more
        self._ids = itertools.count(1)
        self._steps = itertools.count(1)
        self._generations = itertools.count(1)
        self._moments: list[tuple[Callable[[object], bool], Work]] = []
        self._story: deque[tuple[float, object]] = deque(maxlen=STORY_LINES)
        self.servers: dict[str, Server] = {}
        self._workers: dict[Member, Worker] = {}
        self.jobs: list[Job] = []
        self.gives_up = 0.0
        """The share of versions that the trainer begins to convert and does not publish."""
        self.two_trainers = False
        """The last one and the one before it, which will be ended."""
        self.held: set[str] = set()
        """By the operator, or drained, or forgotten."""
        self.healing: list[Work] = []
        """What heals the illnesses that there are."""
        self.daemon: SimulatedDaemon | None = None
        self._daemon_died = 0.0
        self.faults = Faults(self)
        self.judge = Judge(self)
        self.disk = Disk(self)
        self.directory = RunDirectory(self)
        self.configure()
        for name in self.configured:
            if name not in set(down):
                self.start_engine(name)
        self.start_trainer()
        self.start_daemon()

    def configure(self) -> None:
        """The configuration of the next daemon, or of this one when it reads it again."""
        numbers = {"admission": ADMISSION, **NUMBERS, **self._more}
        self.policy = policy_for(self.configured, self._pairs, run_id="sim", **numbers)

    def configure_anew(self) -> None:
        """The daemon that runs, if one does, reads its configuration again."""
        if self.daemon is not None:
            self.daemon.post(PolicyChanged(self.daemon.next_id(), self.policy))

    def members(self) -> list[str]:
        """Engines that are to be members."""
        return [*self.configured, *self.applicants]

    def counted(self, since: float) -> int:
        """Engines that a daemon may have counted since then, for how many a commit needs."""
        return len({*self.members(), *(name for name, until in self._left.items() if until > since)})

    # ------------------------------------------------------------------------------------------------------- numbers
    @property
    def silence(self) -> float:
        """After which a connection is given up."""
        return self.policy.heartbeat * self.policy.lost_after

    @property
    def aftermath(self) -> float:
        """What went wrong may still show so long after it ended: nobody notices a silent connection earlier."""
        return self.silence + self.patience

    @property
    def patience(self) -> float:
        """What one engine may cost another, and what a round takes by itself."""
        return self.policy.patience + 1.0

    @property
    def stale_bound(self) -> float:
        """So long may a healthy engine go on serving the version before the committed one."""
        return self.patience

    def next_id(self) -> int:
        return next(self._ids)

    def next_step(self) -> int:
        return next(self._steps)

    def short(self) -> float:
        """What work takes; in steps, so that some of what is done at several places ends together."""
        return 0.005 * (1 + int(self.rng.random() * 8))

    def latency(self) -> float:
        """What a message takes; a few values only, so that some arrive together."""
        if self.faults.happens("delayed"):
            return self.rng.uniform(0.2, 2.5)
        return 0.001 * (1 + int(self.rng.random() * 5))

    # ------------------------------------------------------------------------------------------------------- moments
    def when(self, moment: Callable[[object], bool], happen: Work) -> None:
        """Once, right when the daemon performs a command, begins a record, or is told a message like that."""
        self._moments.append((moment, happen))

    def saw(self, what: object) -> None:
        for entry in [entry for entry in self._moments if entry[0](what)] if self._moments else ():
            self._moments.remove(entry)
            self.later(0.0, entry[1])

    # --------------------------------------------------------------------------------------------------------- story
    def note(self, sentence: str) -> None:
        self._story.append((self.now, sentence))

    def note_events(self, events: list[Event]) -> None:
        self._story.extend([(self.now, event) for event in events if not isinstance(event, UNTOLD)])

    def story(self) -> str:
        """The last things that happened."""
        return "\n".join(f"{when:9.3f} {brief(what)}" for when, what in self._story)

    # -------------------------------------------------------------------------------------------------------- daemon
    def start_daemon(self) -> None:
        if self.daemon is None or not self.daemon.alive:
            self._daemon_is_back()
            self._daemon_is_back = lambda: None
            for name, until in self._left.items():
                if until > self._daemon_died:
                    self._left[name] = self.now + LEAVING_SECONDS  # it has time anew to be heard
            self.daemon = SimulatedDaemon(self, self.disk)

    def kill_daemon(self, for_seconds: float | None = None) -> None:
        daemon = self.daemon
        if daemon is not None and daemon.alive:
            daemon.die()
            self._daemon_died = self.now
            self._daemon_is_back = self.faults.begin(self.servers)
            self.later(self.rng.uniform(0.1, 8.0) if for_seconds is None else for_seconds, self.start_daemon)

    def _daemon_is_back(self) -> None:
        """Replaced while there is none."""

    def wake_scan(self) -> None:
        """The run directory has changed, and the daemon is told of it."""
        if self.daemon is not None:
            self.daemon.wake_scan()

    def run_until_quiet(self) -> None:
        """Have the trainer publish nothing more, and wait until what it has published has ended."""
        self.idle = True
        ends = self.now + 60.0
        while self.job.waiting is not None and self.now < ends:
            self.run(self.now + 0.5)
        self.run(self.now + 3.0)

    def declare_dead(self, members: Iterable[Member], looks: int = 4) -> None:
        """The operator says that earlier processes of these ranks are dead, when status shows none of them.

        And looks again: a round that had begun may have granted them something, a daemon may have died over it.
        """
        for member in members:
            left = looks
            if self._sees_no_other_than_the_last(member):
                self._ask(lambda daemon, m=member: DeadDeclared(daemon.next_id(), "operator", "", m))
                left -= 1
            if left:
                self.later(2.0, lambda member=member, left=left: self.declare_dead([member], left))

    def _sees_no_other_than_the_last(self, member: Member) -> bool:
        if self.daemon is None:
            return False
        if member.role == "inference":
            alive = [worker for worker in self.workers() if worker.member == member]
            last = alive[0].incarnation if alive else None
        elif any(job.size > member.rank and job.ranks[member.rank].alive for job in self.jobs[:-1]):
            return False
        else:
            last = self.job.ranks[member.rank].incarnation if member.rank < self.job.size else None
        connected = self.daemon.fleet.agents.get(member)
        return last == (connected.hello.incarnation if connected is not None else None)

    def hold(self, name: str, seconds: float) -> None:
        """The operator holds an engine, and releases it so many seconds later."""
        self.held.add(name)
        end = self.faults.begin([name])
        self._ask(lambda daemon: HoldAsked(daemon.next_id(), "operator", "", name, True), name)

        def release() -> None:
            self.held.discard(name)
            end()
            self._insist(
                lambda daemon: HoldAsked(daemon.next_id(), "operator", "", name, False),
                lambda daemon: name not in daemon.fleet.memory.holds,
                name,
            )

        self.later(seconds, release)

    def drain(self, name: str, seconds: float) -> None:
        """The operator has an engine drained, and releases it so many seconds later."""
        self._until_released(name, seconds, lambda daemon: DrainAsked(daemon.next_id(), "operator", "", name))

    def forget(self, name: str, seconds: float) -> None:
        """The operator has an engine forgotten, and takes it back so many seconds later."""
        self._until_released(name, seconds, lambda daemon: ForgetAsked(daemon.next_id(), "operator", "", name))

    def _until_released(self, name: str, seconds: float, what: "Callable[[SimulatedDaemon], Event]") -> None:
        unit = self.unit(name)
        self.held.update(unit)
        end = self.faults.begin(unit)
        self._ask(what, name)

        def release() -> None:
            self.held.difference_update(unit)
            end()
            for each in unit:  # one of a pair may have left meanwhile
                self._insist(
                    lambda daemon, each=each: HoldAsked(daemon.next_id(), "operator", "", each, False),  # type: ignore[misc]
                    lambda daemon, each=each: (  # type: ignore[misc]
                        each not in daemon.fleet.memory.drains and each not in daemon.fleet.memory.forgotten_engines
                    ),
                )

        self.later(seconds, release)

    def maintain(self) -> Work:
        """The operator has no round begin, until what is returned is called."""
        end = self.faults.begin(self.servers)
        self._ask(lambda daemon: MaintenanceAsked(daemon.next_id(), "operator", "", True))

        def over() -> None:
            end()
            self._insist(
                lambda daemon: MaintenanceAsked(daemon.next_id(), "operator", "", False),
                lambda daemon: daemon.fleet.memory.maintenance is None,
            )

        return over

    def _insist(
        self,
        what: "Callable[[SimulatedDaemon], Event]",
        done: "Callable[[SimulatedDaemon], bool]",
        engine: str = "",
        looks: int = 4,
    ) -> None:
        """Ask until status says several times that it is so: a daemon may die before it has written it down."""
        daemon = self.daemon
        if daemon is not None and daemon.alive:
            if done(daemon):
                looks -= 1
            elif not engine or engine in daemon.fleet.engines:
                daemon.post(what(daemon))
        if looks:
            self.later(2.0, lambda: self._insist(what, done, engine, looks))

    def _ask(self, what: "Callable[[SimulatedDaemon], Event]", engine: str = "") -> None:
        """Of the daemon, or of the next one; about an ``engine``, of one that knows it."""
        daemon = self.daemon
        if daemon is None or not daemon.alive or (engine and engine not in daemon.fleet.engines):
            self.later(0.5, lambda: self._ask(what, engine))
        else:
            daemon.post(what(daemon))

    # ------------------------------------------------------------------------------------------------------- engines
    def unit(self, name: str) -> list[str]:
        return next((list(pair) for pair in self._pairs if name in pair), [name])

    def start_engine(self, name: str) -> None:
        """Its processes, held, with what they loaded from disk."""
        workers = [self._worker(Member("inference", name, rank)) for rank in range(self.ranks)]
        self.servers[name] = Server(self, name, workers, self.applicants.get(name))
        self._workers |= {worker.member: worker for worker in workers}

    def _worker(self, member: Member) -> Worker:
        lands = self._lands.get(member.engine, "live")
        if lands == "live":
            return Worker(self, member, self.ranks)
        return ShadowWorker(self, member, self.ranks, lands, member.engine not in self._meeting)

    def changes_by_itself(self, name: str) -> bool:
        """Between two of its steps, without a pause."""
        alone = self.unit(name) == [name] and not self.policy.together and name not in self._meeting
        return alone and self._lands.get(name, "live") != "live"

    def kill_engine(self, name: str, for_seconds: float = 0.0, *, silently: bool = False) -> None:
        """All its processes die; others take their place."""
        server = self.servers[name]
        if server.alive:
            self.note(f"engine {name} dies")
            end = self.faults.begin([name])
            server.die_all(silently=silently)
            self.judge.died(name)

            def again() -> None:
                end()
                if name in self.servers and not self.servers[name].alive:
                    self.start_engine(name)

            self.later(for_seconds, again)

    def add_engine(self, name: str) -> None:
        """For the next configuration."""
        self.configured.append(name)
        self.configure()
        self.start_engine(name)

    def remove_engine(self, name: str) -> None:
        """Its processes end, and the next configuration does not know it."""
        self.configured.remove(name)
        self._pairs = [pair for pair in self._pairs if name not in pair]
        self.configure()
        server = self.servers.pop(name, None)
        if server is not None:
            server.die_all()
            self.judge.died(name)
            self.declare_dead(worker.member for worker in server.workers)  # it may have lent

    def bring_applicants(self, *names: str) -> None:
        """These come by themselves, as a pair if they are two."""
        self._left = {name: until for name, until in self._left.items() if name not in names}
        host, pair = self.next_id(), f"pair of {'-'.join(names)}".replace(" ", "-") if len(names) > 1 else ""
        if pair:
            self._pairs.append(names)
        for name, role in zip(names, ("prefill", "decode") if pair else ("both",), strict=True):
            self.applicants[name] = Applicant(name=name, urls=(f"http://{name}.host-{host}:80",), role=role, pair=pair)
            self.faults.hurt([name])
            self.start_engine(name)

    def end_applicant(self, name: str, *, silently: bool) -> None:
        """It ends for good; and nobody says so, if ``silently``."""
        del self.applicants[name]
        self.faults.hurt([name])  # and its pair
        self._pairs = [pair for pair in self._pairs if name not in pair]
        self._left[name] = self.now + LEAVING_SECONDS
        server = self.servers.pop(name)
        server.die_all(silently=silently)
        self.judge.died(name)
        self.declare_dead(worker.member for worker in server.workers)  # it may have lent

    def apply(self, application: Application) -> None:
        """What an engine says reaches the daemon."""
        if self.daemon is not None:
            self.daemon.applied(application)

    def workers(self) -> Iterator[Worker]:
        return (worker for worker in self._workers.values() if worker.alive)

    def worker(self, member: Member) -> Worker | None:
        return self._workers.get(member)

    # ------------------------------------------------------------------------------------------------------- trainer
    @property
    def job(self) -> Job:
        return self.jobs[-1]

    def start_trainer(self, size: int | None = None, host: str = "host") -> None:
        self.trainers = size or self.trainers
        self.jobs.append(Job(self, next(self._generations), self.trainers, host))

    def kill_trainer(
        self, size: int | None = None, for_seconds: float | None = None, *, silently: bool = False
    ) -> None:
        """All its ranks die; another start follows, maybe with another number of ranks."""
        if not self.job.dead and not self.two_trainers:
            self.note("the trainer dies")
            end = self.faults.begin(self.servers)
            self.job.die(silently=silently)
            old, size = self.job, size or self.trainers
            host = old.host if self.rng.random() < 0.7 else f"host {self.next_id()}"

            def again() -> None:
                end()
                self.start_trainer(size, host)
                # Nothing else could prove it: no other process takes their place where they were.
                self.declare_dead(rank.member for rank in old.ranks[size if host == old.host else 0 :])

            self.later(self.rng.uniform(0.5, 6.0) if for_seconds is None else for_seconds, again)

    def agents(self) -> list[Agent]:
        """Everybody who talks to the daemon."""
        return [*self.job.ranks, *self.workers()]

    def hurt_by(self, agent: Agent) -> list[str]:
        """The engines that may suffer when something is wrong with ``agent``."""
        return [agent.member.engine] if agent.member.role == "inference" else list(self.servers)

    # --------------------------------------------------------------------------------------------------------- calls
    def request(self, command: CallEngine, answered: Reply, url: str = "") -> None:
        """A call travels to an engine, is performed there, and its answer travels back, unless one of these fails.

        Args:
            url: of an engine that has said where it is; another one may be there now.
        """
        name, faults = command.engine, self.faults
        delay = self.latency()
        # A resume that is performed late is for the engine's own guard to refuse; nobody else could.
        if (self.guarded or command.call is not Call.RESUME) and faults.happens("late", name):
            delay += command.deadline * self.rng.uniform(1.0, 3.0)

        def reply(answer: Answer) -> None:
            if name not in faults.cut and name not in faults.cut_answers and not faults.happens("lost", name):
                self.later(self.latency(), lambda: answered(answer))

        def arrive() -> None:
            server = self.servers.get(name)
            if name in faults.cut:
                if self.rng.random() < 0.5:
                    answered(Answer(error="no route to host"))
            elif server is None or not server.alive or (url and server.applicant and url not in server.applicant.urls):
                answered(Answer(error="connection refused"))
            else:
                server.perform(command, reply)

        self.later(delay, arrive)
