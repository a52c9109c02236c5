"""The processes of the simulated fleet: trainer ranks, engine workers, and the servers in front of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fleets import ANNOUNCE, BYTES_PER_EDGE
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import AgentSaid, Call
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Commit,
    Connect,
    EngineStatus,
    FromDaemon,
    Grant,
    Hold,
    Holding,
    Left,
    Outcome,
    PeerTransfer,
    Quiesced,
    Ready,
    TrainerStatus,
    Verified,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version, add_digests

if TYPE_CHECKING:
    from world import World


def digest_of(writer: int, version: Version | None, target: Member) -> tuple[int, int]:
    """Of the bytes that one writer owes one target, at a version."""
    return (hash((writer, version, target)) & (2**64 - 1), hash((version, target, writer)) & (2**64 - 1))


@dataclass
class Agent:
    """A process with one connection at most."""

    world: "World"
    member: Member
    incarnation: int
    connection: int = 0
    accepted: int = 0
    epoch: int = 0
    journal_id: str = ""
    alive: bool = True

    def status(self) -> dict[str, TrainerStatus | EngineStatus]:
        raise NotImplementedError

    def heard(self, message: FromDaemon) -> None:
        raise NotImplementedError

    def say(self, message: object) -> None:
        """Over the present connection, if there is one; order is kept."""
        if self.alive and self.connection:
            self.world.to_daemon(AgentSaid(self.world.next_id(), self.member, self.connection, message))  # type: ignore[arg-type]

    def receive(self, message: FromDaemon) -> None:
        match message:
            case Welcome():
                if (message.epoch, message.journal_id) < (self.epoch, "") or (
                    message.epoch == self.epoch and message.journal_id != self.journal_id
                ):
                    raise AssertionError(f"{self.member} was welcomed by an older daemon")
                self.epoch, self.journal_id = message.epoch, message.journal_id
                self.say(ANNOUNCE)
            case Connect():
                self.world.later(0.05, lambda: self.say(Ready(fingerprint=message.fingerprint)))
            case _:
                self.heard(message)


@dataclass
class Worker(Agent):
    """One rank of an engine. ``memory``: which version each writer's share holds; None is the checkpoint."""

    memory: dict[int, Version | None] = field(default_factory=dict)
    applied: Version | None = None
    torn: bool = False
    held: bool = False
    window: RoundName | None = None
    window_version: Version | None = None
    over: Callable[[bool], None] | None = None
    refused: set[RoundName] = field(default_factory=set)

    def status(self) -> dict[str, TrainerStatus | EngineStatus]:
        return {"engine": self.engine_status()}

    def engine_status(self) -> EngineStatus:
        return EngineStatus(self.applied, self.window, self.torn, self.held)

    @property
    def may_run(self) -> bool:
        return self.applied is not None and not self.torn and self.window is None and not self.held

    def enter(self, name: RoundName, version: Version, deadline: float, over: Callable[[bool], None]) -> None:
        """The update call reaches the worker."""
        if name in self.refused or self.window is not None:
            over(False)
            return
        self.window, self.window_version, self.over = name, version, over
        self.say(Quiesced(round=name))
        self.world.later(deadline, lambda: self.leave(name, False, True))

    def leave(self, name: RoundName, good: bool, torn: bool) -> None:
        if self.window != name or not self.alive:
            return
        version, over = self.window_version, self.over
        self.window, self.over = None, None
        if good:
            self.applied, self.torn, self.held = version, False, False
        else:
            self.torn = self.torn or torn
        self.say(Left(round=name, status=self.engine_status()))
        assert over is not None
        over(good)

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Verify():
                self.world.later(self.world.short(), lambda: self._verify(message))
            case Commit():
                self.leave(message.round, True, False)
            case Hold():
                self.held = message.held
                self.say(Holding(status=self.engine_status()))
            case Abort():
                self.refused.add(message.round)
                self.leave(message.round, False, message.torn)
            case _:
                pass

    def _verify(self, message: Verify) -> None:
        if self.window != message.round:
            return
        digest = add_digests(*(digest_of(w, v, self.member) for w, v in self.memory.items()))
        size = BYTES_PER_EDGE * self.world.trainers
        self.say(Verified(round=message.round, digest=digest, bytes=size, apply_seconds=0.0, digest_seconds=0.0))


@dataclass
class Trainer(Agent):
    """One trainer rank."""

    generation: int = 0
    staged: Version | None = None
    open: RoundName | None = None

    def status(self) -> dict[str, TrainerStatus | EngineStatus]:
        return {"trainer": TrainerStatus(self.staged, (self.open,) if self.open is not None else ())}

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Grant():
                self._write(message)
            case Outcome():
                self.world.outcome(self, message)
            case _:
                pass

    def _write(self, grant: Grant) -> None:
        busy = self.open is not None and self.world.guarded
        if busy or self.staged != grant.version or grant.round.epoch != self.epoch:
            self.say(Closed(round=grant.round, error="the slots hold another version", fault="trainer"))
            return
        self.open = grant.round
        version = grant.version
        targets = [self.world.workers[m] for m in grant.members]
        stopped = self.world.fault("stopped writer")
        for worker in targets:
            delay = self.world.rng.uniform(1, 60) if stopped else self.world.short()
            corrupt = self.world.fault("corrupt write")
            self.world.later(delay, lambda w=worker, c=corrupt: self._land(w, version, c))
        ends = 61.0 if stopped else self.world.SHORT
        self.world.later(ends, lambda: self._close(grant, targets))

    def _land(self, worker: Worker, version: Version, corrupt: bool) -> None:
        if worker.alive and self.alive:  # a dead process writes nothing more; a stopped one does
            worker.memory[self.member.rank] = Version(0, -1) if corrupt else version

    def _close(self, grant: Grant, targets: list[Worker]) -> None:
        if not self.alive:
            return
        rank = self.member.rank
        self.open = None
        peers = tuple(
            PeerTransfer(w.member, BYTES_PER_EDGE, 1, 0.01, digest_of(rank, grant.version, w.member)) for w in targets
        )
        dead = [w for w in targets if not w.alive]
        error = f"{dead[0].member} is gone" if dead else ""
        self.say(Closed(round=grant.round, peers=() if dead else peers, error=error))


@dataclass
class Server:
    """An engine's API server and core: held from its start, serving when not paused."""

    world: "World"
    name: str
    paused: bool = True

    def perform(self, command: CallEngine, answer: Callable[..., None]) -> None:
        """A call arrives. ``answer(good, paused)`` is its answer."""
        if self.world.servers[self.name] is not self:
            answer(False)  # a call ends with the process that it was made to
            return
        workers = [w for w in self.world.workers.values() if w.member.engine == self.name]
        if self.world.fault("call refused"):
            answer(False)
            return
        match command.call:
            case Call.PROBE:
                answer(True, self.paused)
            case Call.ATTACH:
                for worker in workers:
                    self.world.connect(worker)
                answer(True)
            case Call.PAUSE:
                self.paused = True
                answer(True, True)
            case Call.SWITCH:
                _update(command, workers, answer)
            case Call.FINISH:
                answer(True)
            case Call.RESUME:
                servable = not self.world.guarded or all(w.may_run for w in workers)
                if servable:
                    self.paused = False
                answer(servable, self.paused)


def _update(command: CallEngine, workers: list[Worker], answer: Callable[..., None]) -> None:
    """Every worker enters the update call; it answers when the last one has left."""
    assert command.round is not None
    assert command.version is not None
    results: list[bool] = []

    def over(good: bool) -> None:
        results.append(good)
        if len(results) == len(workers):
            answer(all(results), True)

    for worker in workers:
        worker.enter(command.round, command.version, command.deadline * AGENT_SHARE, over)
