"""A simulated fleet under the real core: virtual time, seeded faults, workers whose memory is the judge.

Only the core runs for real. Trainers, engines, wires and the disk are models small enough to be read; what they get
wrong is what real ones get wrong: answers that are lost, writers that stop and write later, processes that die and
return, digests that do not match. ``World.check`` looks at the workers alone, never at the daemon's own state.
"""

import heapq
import itertools
import random
from collections.abc import Callable

from fleets import plan_facts, policy_for
from processes import Agent, Server, Trainer, Worker
from weightsync.orchestrator.core.commands import (
    Accept,
    Append,
    CallEngine,
    Command,
    Drop,
    LookForStable,
    MakePlan,
    Refuse,
    Send,
    SendPlan,
    WriteMarker,
)
from weightsync.orchestrator.core.events import (
    AgentConnected,
    AgentLost,
    Appended,
    CallDone,
    CallFailed,
    Event,
    MarkersSeen,
    PlanReady,
    StableSeen,
    Tick,
)
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.records import AnyRecord, Committed, Decided, Record, decode_record, encode_record
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import FromDaemon, Hello, Outcome, Staged
from weightsync.orchestrator.protocol.names import Member, Version


class World:
    """Everything, and the clock.

    Agents and engines refuse by themselves what would do harm: a resume of what is not servable, a second grant. In a
    world that is not ``guarded`` they do not, so that the daemon is judged alone.
    """

    SHORT = 0.2

    def __init__(
        self,
        seed: int,
        engines: int = 2,
        ranks: int = 2,
        trainers: int = 2,
        faults: float = 0.0,
        *,
        guarded: bool = True,
        paired: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.faults, self.trainers, self.ranks, self.guarded = faults, trainers, ranks, guarded
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ids = itertools.count(1)
        self.log: list[str] = []
        self.policy = policy_for(
            [f"e{i}" for i in range(engines)], [("e0", "e1")] if paired else [], run_id="sim", retry=60.0, backoff=0.5,
            join=2000.0, staged=500.0, rendezvous=20.0, probe=4.0, probe_interval=2.0, attach=8.0, pause=10.0,
            quiesce=10.0, transfer=10.0, verify=10.0, finish=10.0,
        )  # fmt: skip
        self.disk: list[bytes] = []
        self.stable: set[StableSeen] = set()
        self.committed: list[Version] = []
        self.decided: set[Version] = set()
        self.servers: dict[str, Server] = {}
        self.workers: dict[Member, Worker] = {}
        self.trainer_ranks: list[Trainer] = []
        self.generation = 0
        self.step_number = 0
        self.waiting: Version | None = None
        self.fleet: Fleet | None = None
        self.life = 0
        self.finished_versions = 0
        for i in range(engines):
            self.start_engine(f"e{i}")
        self.start_trainer()
        self.start_daemon()

    # ------------------------------------------------------------------------------------------------------ machinery
    def next_id(self) -> int:
        return next(self._ids)

    def later(self, delay: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), work))

    def short(self) -> float:
        return self.rng.uniform(0.001, self.SHORT / 2)

    def fault(self, what: str) -> bool:
        happens = self.rng.random() < self.faults
        if happens:
            self.log.append(f"{self.now:9.3f} FAULT {what}")
        return happens

    def run(self, until: float) -> None:
        """Advance to ``until``, checking after everything that happens."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, work = heapq.heappop(self._heap)
            work()
            self.check()
        self.now = until

    def check(self) -> None:
        """S1, judged from the workers: who serves holds one whole version that was decided."""
        for server in self.servers.values():
            if server.paused:
                continue
            workers = [w for w in self.workers.values() if w.member.engine == server.name]
            held = {version for w in workers for version in w.memory.values()}
            applied = {w.applied for w in workers}
            assert len(held) == 1, f"{server.name} serves a mixture: {held}\n{self.story()}"
            assert held == applied, f"{server.name} serves {held}, its workers say {applied}\n{self.story()}"
            assert held <= self.decided, f"{server.name} serves {held}, decided {self.decided}\n{self.story()}"

    def story(self) -> str:
        return "\n".join(self.log[-80:])

    # --------------------------------------------------------------------------------------------------------- daemon
    def start_daemon(self) -> None:
        self.life += 1
        records: list[AnyRecord] = [decode_record(body) for body in self.disk]
        self.fleet, commands = start(self.policy, "journal", records, self.now)
        self.log.append(f"{self.now:9.3f} daemon starts with epoch {self.fleet.epoch}")
        self._perform(commands)
        self.scan()
        self._tick(self.life)
        for agent in [*self.trainer_ranks, *self.workers.values()]:
            agent.connection = 0
            self.later(self.rng.uniform(0, 3), lambda a=agent: self.connect(a))

    def crash_daemon(self) -> None:
        self.log.append(f"{self.now:9.3f} daemon is killed")
        self.fleet = None
        self.life += 1
        for agent in [*self.trainer_ranks, *self.workers.values()]:
            agent.connection = 0
        self.later(self.rng.uniform(0.1, 20), self.start_daemon)

    def _tick(self, life: int) -> None:
        if life == self.life:
            self.to_daemon(Tick(self.next_id()))
            self.later(0.25, lambda: self._tick(life))

    def to_daemon(self, event: Event) -> None:
        """Delivered at once, in order; lost when there is no daemon."""
        life = self.life
        self.later(0.0, lambda: self._step(event, life))

    def _step(self, event: Event, life: int) -> None:
        if self.fleet is None or life != self.life:
            return
        if not isinstance(event, Tick):
            self.log.append(f"{self.now:9.3f} {event}")
        self._perform(step(self.fleet, [event], self.now))

    def _perform(self, commands: list[Command]) -> None:
        life = self.life
        for number, command in enumerate(commands):
            if not isinstance(command, Append):
                self._do(command)
                continue
            self.log.append(f"{self.now:9.3f} journal {command.record}")
            if self.fault("killed at a record") and self.faults:
                if self.rng.random() < 0.5:
                    self._durable(command.record)
                self.crash_daemon()
                return
            self._durable(command.record)
            if command.answer:
                kind, name = type(command.record).__name__, getattr(command.record, "round", None)
                self.later(0.002, lambda k=kind, n=name: self._step(Appended(self.next_id(), k, n), life))
            del number

    def _durable(self, record: Record) -> None:
        self.disk.append(encode_record(record))
        if isinstance(record, Decided):
            self.decided.add(record.version)
        if isinstance(record, Committed):
            self.committed.append(record.version)

    def _do(self, command: Command) -> None:
        match command:
            case Accept():
                self._deliver(command.member, command.connection, command.welcome)
            case Refuse() | Drop():
                agent = self.agent(command.member)
                if agent.connection == command.connection:
                    agent.connection = 0
                    self.later(self.rng.uniform(0.5, 2), lambda: self.connect(agent))
            case Send():
                self._deliver(command.member, None, command.message)
            case SendPlan():
                self._deliver(command.member, None, command.connect)
            case MakePlan():
                self.to_daemon(PlanReady(self.next_id(), command.number, plan_facts(command)))
            case CallEngine():
                self._call(command)
            case LookForStable():
                self.later(command.after_seconds, self.scan)
            case WriteMarker():
                if command.kind != "TRANSFER_READY":
                    self.stable = {s for s in self.stable if s.step != command.version.step}
            case _:
                self.log.append(f"{self.now:9.3f} {command}")

    def agent(self, member: Member) -> Agent:
        return self.trainer_ranks[member.rank] if member.role == "trainer" else self.workers[member]

    def _deliver(self, member: Member, connection: int | None, message: FromDaemon) -> None:
        """To a connection that is being accepted, or (None) to the member's accepted one, if it has one now."""
        agent = self.agent(member)
        if connection is not None:
            agent.accepted = connection
        at = agent.accepted

        def arrive() -> None:
            if agent.alive and agent.connection == at and at:
                agent.receive(message)

        self.later(0.001, arrive)

    # --------------------------------------------------------------------------------------------------------- agents
    def connect(self, agent: Agent) -> None:
        if not agent.alive or agent.connection or self.fleet is None:
            if agent.alive and not agent.connection:
                self.later(1.0, lambda: self.connect(agent))
            return
        agent.connection = self.next_id()
        hello = Hello(
            schema=SCHEMA_VERSION, run_id="sim", member=agent.member, incarnation=agent.incarnation,
            world=self.trainers if agent.member.role == "trainer" else self.ranks,
            generation=getattr(agent, "generation", 0), epoch_seen=agent.epoch, journal_id=agent.journal_id,
            **agent.status(),  # type: ignore[arg-type]
        )  # fmt: skip
        self.to_daemon(AgentConnected(self.next_id(), agent.member, agent.connection, hello))

    def disconnect(self, agent: Agent) -> None:
        if agent.connection:
            self.to_daemon(AgentLost(self.next_id(), agent.member, agent.connection, "connection reset"))
            agent.connection = 0
            self.later(self.rng.uniform(0.1, 5), lambda: self.connect(agent))

    def start_engine(self, name: str) -> None:
        self.servers[name] = Server(self, name)
        for rank in range(self.ranks):
            member = Member("inference", name, rank)
            self.workers[member] = Worker(
                self, member, self.next_id(), memory=dict.fromkeys(range(self.trainers), None)
            )

    def kill_engine(self, name: str) -> None:
        """All its processes die; they return with checkpoint weights, held."""
        self.log.append(f"{self.now:9.3f} engine {name} dies")
        self.servers[name].paused = True
        for worker in [w for w in self.workers.values() if w.member.engine == name]:
            worker.alive = False
            if worker.over is not None:
                over, worker.over = worker.over, None
                over(False)
            if worker.connection:
                self.to_daemon(AgentLost(self.next_id(), worker.member, worker.connection, "process died"))
                worker.connection = 0
        self.start_engine(name)

    def start_trainer(self) -> None:
        self.generation += 1
        self.step_number += 1
        self.trainer_ranks = [
            Trainer(self, Member("trainer", "", rank), self.next_id(), generation=self.generation)
            for rank in range(self.trainers)
        ]
        for agent in self.trainer_ranks:
            self.later(self.rng.uniform(0, 2), lambda a=agent: self.connect(a))
        self.waiting = None
        generation = self.generation
        self.later(3.0, lambda: self.publish(generation))

    def kill_trainer(self) -> None:
        if not any(agent.alive for agent in self.trainer_ranks):
            return  # its next start is on the way
        self.log.append(f"{self.now:9.3f} the trainer dies")
        for agent in self.trainer_ranks:
            agent.alive = False
            if agent.connection:
                self.to_daemon(AgentLost(self.next_id(), agent.member, agent.connection, "process died"))
                agent.connection = 0
        self.later(self.rng.uniform(1, 10), self.start_trainer)

    def publish(self, generation: int) -> None:
        """All ranks stage the next version, rank 0 marks it; again when its fate is known."""
        if generation != self.generation or not all(agent.alive for agent in self.trainer_ranks):
            return
        if self.waiting is not None or any(agent.open for agent in self.trainer_ranks):
            self.later(1.0, lambda: self.publish(generation))
            return
        self.step_number += 1
        self.waiting = version = Version(generation, self.step_number)
        for agent in self.trainer_ranks:
            agent.staged = None  # the slots are being converted into, and written by nobody
        self.later(self.rng.uniform(0.0, 2.0), lambda: self._staged(version))

    def _staged(self, version: Version) -> None:
        if version != self.waiting or not all(agent.alive for agent in self.trainer_ranks):
            return
        generation = version.generation
        for agent in self.trainer_ranks:
            agent.staged = version
            agent.say(Staged(version=version, bytes=1, convert_seconds=0.0, digest_seconds=0.0))
        self.stable.add(StableSeen(version.step, generation if self.rng.random() < 0.5 else None))
        self.scan()

    def scan(self) -> None:
        """The daemon looks at the run directory."""
        self.to_daemon(MarkersSeen(self.next_id(), tuple(sorted(self.stable, key=lambda s: s.step))))

    def outcome(self, trainer: Trainer, message: Outcome) -> None:
        if message.version == self.waiting and trainer.generation == self.generation:
            if message.committed:
                assert message.version in self.committed, f"told of a commit that is not durable\n{self.story()}"
            self.waiting = None
            self.finished_versions += 1
            generation = self.generation
            self.later(self.rng.uniform(0.5, 5), lambda: self.publish(generation))

    # -------------------------------------------------------------------------------------------------------- engines
    def _call(self, command: CallEngine) -> None:
        life = self.life

        def answer(good: bool, paused: bool | None = None) -> None:
            if self.fault("answer lost"):
                left = max(0.0, command.deadline - 0.2)
                self.later(left, lambda: report(CallFailed(self.next_id(), name, call, command.number, "no answer")))
            elif good:
                report(CallDone(self.next_id(), name, call, command.number, 0.01, paused))
            else:
                report(CallFailed(self.next_id(), name, call, command.number, "500"))

        def report(event: Event) -> None:
            self.later(0.0, lambda: self._step(event, life))

        name, call = command.engine, command.call
        server = self.servers[name]
        self.later(self.short(), lambda: server.perform(command, answer))
