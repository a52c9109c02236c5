"""One life of the simulated daemon: the real core between an inbox, an outbox with a disk that takes time, and a hub.

It does what ``weightsync.orchestrator.daemon`` does, in virtual time: events that come together are decided together;
commands are performed in order, and nothing leaves before the records in front of it are durable.
"""

import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from answers import Answer
from contents import plan_of
from places import Disk
from told import round_trip
from weightsync.orchestrator.core.commands import (
    Accept,
    Append,
    CallEngine,
    Command,
    Drop,
    LookForStable,
    MakePlan,
    Refuse,
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
    CallDone,
    CallFailed,
    EngineApplied,
    Event,
    MarkersSeen,
    PlanReady,
    StableSeen,
    Tick,
)
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.membership import admission
from weightsync.orchestrator.protocol.application import Application
from weightsync.orchestrator.protocol.codec import decode_from_agent
from weightsync.orchestrator.protocol.messages import FromDaemon, Hello, Refused, Welcome
from weightsync.orchestrator.protocol.names import Member
from wires import Link

if TYPE_CHECKING:
    from world import World

TICK_SECONDS: Final = 0.25
RESCAN_SECONDS: Final = 5.0
TURN_SECONDS: Final = 0.001
"""Of the daemon's loop: what comes within one is decided together."""


class SimulatedDaemon:
    """From its start to its death; the next one is another object.

    Its clock is monotonic and begins anywhere: another life, after another boot, may begin earlier.
    """

    def __init__(self, world: "World", disk: Disk) -> None:
        self.world, self.disk = world, disk
        self.alive = True
        self.links: list[Link] = []
        self._members: dict[Member, Link] = {}
        self._ids = itertools.count(1)
        self._pending: list[Event] = []
        self._batches: deque[deque[Command]] = deque()
        self._appending = False
        self._posted: tuple[StableSeen, ...] = ()
        self._clock = world.rng.uniform(0.0, 1e5) - world.now
        records = disk.records()
        self.fleet, commands = start(world.policy, world.journal_id, records, self._now(), f"life {world.next_id()}")
        world.note(f"a daemon starts, epoch {self.fleet.epoch}")
        self._put(commands)
        self._scan()
        self._tick()
        self._rescan()

    # ------------------------------------------------------------------------------------------------------ its loop
    def post(self, event: Event) -> None:
        if not self.alive:
            return
        self._pending.append(event)
        if len(self._pending) == 1:
            self.world.later(TURN_SECONDS, self._decide)

    def next_id(self) -> int:
        return next(self._ids)

    def _now(self) -> float:
        return self.world.now + self._clock

    def _decide(self) -> None:
        events, self._pending = self._pending, []
        if not self.alive:
            return
        self.world.note_events(events)
        self._put(step(self.fleet, events, self._now()))

    def _tick(self) -> None:
        if self.alive:
            self.post(Tick(self.next_id()))
            self.world.later(TICK_SECONDS, self._tick)

    def die(self) -> None:
        """Whatever it was about to do is not done. Its kernel resets all connections."""
        self.world.note("the daemon dies")
        self.alive = False
        self.disk.interrupted()
        for link in list(self.links):
            if link.far:
                link.closed_by_daemon()

    # ---------------------------------------------------------------------------------------------------- its outbox
    def _put(self, commands: list[Command]) -> None:
        if commands:
            self._batches.append(deque(commands))
            self._perform()

    def _perform(self) -> None:
        """Everything up to the next record; what comes after it waits until it is durable."""
        while self.alive and self._batches and not self._appending:
            batch = self._batches[0]
            if not batch:
                self._batches.popleft()
            elif self.world.faults.happens("commands"):
                self.world.kill_daemon()
            elif isinstance(batch[0], Append):
                self._append(batch)
            else:
                self._do(batch.popleft())

    def _append(self, batch: deque[Command]) -> None:
        """Neighbours in one commit, all or none."""
        commands: list[Append] = []
        while batch and isinstance(batch[0], Append):
            command = batch.popleft()
            assert isinstance(command, Append)
            commands.append(command)
            self.world.saw(command.record)
        self._appending = True

        def durable() -> None:
            self._appending = False
            for command in commands:
                if command.answer:
                    name = getattr(command.record, "round", None)
                    self.post(Appended(self.next_id(), type(command.record).__name__, name))
            self._perform()

        self.disk.append([command.record for command in commands], self, durable)

    def _do(self, command: Command) -> None:
        self.world.saw(command)
        match command:
            case CallEngine():
                self._call(command)
            case Send(member=member, message=message):
                self._send(member, message)
            case SendPlan(member=member, connect=connect):
                self._send(member, connect)
            case Accept():
                self._accept(command.member, command.connection, command.welcome)
            case Refuse():
                self._refuse(command.member, command.connection, command.refused)
            case Drop():
                link = self._members.get(command.member)
                if link is not None and link.number == command.connection:
                    self._end(link)
            case MakePlan():
                self.world.later(self.world.short(), lambda: self._planned(command))
            case LookForStable(after_seconds=seconds):
                self.world.later(seconds, self._look)
            case WriteMarker():
                self._mark(command)
            case Say():
                self.world.note(command.sentence)
            case _:
                raise TypeError(f"the simulation performs no {type(command).__name__}")

    def _planned(self, command: MakePlan) -> None:
        self.post(PlanReady(self.next_id(), command.number, plan_of(command), command.lends))

    # ------------------------------------------------------------------------------------------------- run directory
    def _scan(self) -> bool:
        seen = self.world.directory.waiting()
        if not self.alive or seen == self._posted:
            return False
        self._posted = seen
        self.post(MarkersSeen(self.next_id(), seen))
        return True

    def wake_scan(self) -> None:
        """Something changed in the directory."""
        self._scan()

    def _look(self) -> None:
        if self.alive and not self._scan():
            self.post(MarkersSeen(self.next_id(), self._posted))

    def _rescan(self) -> None:
        if self.alive:
            self._scan()
            self.world.later(RESCAN_SECONDS, self._rescan)

    def _mark(self, command: WriteMarker) -> None:
        """By a thread of its own, which dies with the daemon."""
        round_trip([command])

        def write() -> None:
            if self.alive:
                self.world.directory.write(command)
                self._scan()

        self.world.later(self.world.latency(), write)

    # ------------------------------------------------------------------------------------------------------- its hub
    def heard(self, link: Link, data: bytes) -> None:
        if not self.alive or not link.far:
            return
        message = decode_from_agent(data)
        self.world.saw(message)
        if isinstance(message, Hello):
            link.hello = message
            self.post(AgentConnected(self.next_id(), message.member, link.number, message))
        elif link.accepted and link.hello is not None:
            self.post(AgentSaid(self.next_id(), link.hello.member, link.number, message))
        else:
            self.lost(link, "out of turn")

    def lost(self, link: Link, reason: str) -> None:
        """The connection ended from the daemon's point of view, and the daemon did not end it."""
        if self.alive and link.far:
            self._end(link)
            if link.hello is not None:
                self.post(AgentLost(self.next_id(), link.hello.member, link.number, reason))

    def _end(self, link: Link) -> None:
        self.links.remove(link)
        if link.hello is not None and self._members.get(link.hello.member) is link:
            del self._members[link.hello.member]
        link.closed_by_daemon()

    def _waiting(self, member: Member, number: int) -> Link | None:
        for link in self.links:
            if link.number == number and link.hello is not None and link.hello.member == member and not link.accepted:
                return link
        return None

    def _accept(self, member: Member, number: int, welcome: Welcome) -> None:
        link = self._waiting(member, number)
        if link is not None:
            older = self._members.get(member)
            if older is not None:
                self._end(older)
            link.accepted = True
            self._members[member] = link
            link.to_agent(welcome)

    def _refuse(self, member: Member, number: int, refused: Refused) -> None:
        link = self._waiting(member, number)
        if link is not None:
            link.to_agent(refused)
            self._end(link)

    def _send(self, member: Member, message: FromDaemon) -> None:
        link = self._members.get(member)
        if link is not None:
            link.to_agent(message)

    # ------------------------------------------------------------------------------------------------ calls to engines
    def applied(self, application: Application) -> None:
        """An engine says where it is. It is checked, though another one may come between that and the decision."""
        if self.alive and not admission.objection(self.fleet, application, self._now()):
            self.post(EngineApplied(self.next_id(), application))

    def _call(self, command: CallEngine) -> None:
        """One CallDone or CallFailed within the deadline, whatever the engine does, and whenever it does it."""
        name, call, began = command.engine, command.call, self.world.now
        admitted = self.fleet.memory.admitted.get(name)
        ended = False

        def once(make: "Callable[[], Event]") -> None:
            nonlocal ended
            if not ended:
                ended = True
                self.post(make())

        def failed(reason: str) -> None:
            once(lambda: CallFailed(self.next_id(), name, call, command.number, reason))

        def answered(answer: Answer) -> None:
            if answer.error:
                failed(answer.error)
                return
            seconds = self.world.now - began
            once(lambda: CallDone(self.next_id(), name, call, command.number, seconds, answer.paused))

        self.world.later(command.deadline, lambda: failed(f"no answer within {command.deadline:g} s"))
        self.world.request(command, answered, admitted.urls[0] if admitted is not None else "")
