"""A simulated engine: its workers, whose memory is the judge of everything, and the server in front of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from answers import Answer, Reply
from contents import CHECKPOINT, SIZES, memory_digest
from simulated_lender import Lender
from simulated_switch import CoreSwitch
from virtual_time import Process
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.protocol.application import Applicant, Application
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Commit,
    Connect,
    EngineStatus,
    Expose,
    Exposed,
    FromDaemon,
    Grant,
    Hello,
    Hold,
    Holding,
    Left,
    Quiesced,
    Ready,
    Renew,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

if TYPE_CHECKING:
    from wires import Word
    from world import World


@dataclass(slots=True)
class Written:
    """The last round that may have written into a worker's memory. ``whole``: what was there before was not torn."""

    round: RoundName
    version: Version
    whole: bool
    verified: bool = False


APPLY_SECONDS: Final = 1.5
"""Between two applications of an engine that makes itself a member."""


class Worker(Lender):
    """One rank of an engine. ``memory``: the version of each chunk."""

    def __init__(self, world: "World", member: Member, size: int) -> None:
        super().__init__(world, member, size)
        self.memory = [CHECKPOINT] * len(SIZES)
        self.applied: Version | None = None
        self.torn = False
        self.held = False
        self.window: RoundName | None = None
        self.lands = "live"
        self.ill = ""
        """``digest``: it says a wrong one; ``silent``: it never answers Verify; ``switch``, ``audit``, ``late
        audit``: these fail."""
        self.renew()
        self._connect: Connect | None = None
        self.relayed: Connect | None = None
        """By which others of its rounds write to it."""
        self._version = CHECKPOINT
        self._over: Callable[[str], None] | None = None
        self._ended: dict[RoundName, str] = {}
        self._exposed = False
        """Somebody may have been granted since it stands in the window."""
        self._written: Written | None = None

    def renew(self, spare: bool = False) -> None:
        """Another endpoint: nothing that was posted to the one before lands any more."""
        assert not spare, f"{self.member} lands live, and no spare can take the place of that"
        self.endpoint = f"{self.member}-{self.world.next_id()}"
        self.announce = msgspec.structs.replace(self.announce, endpoint_name=self.endpoint)

    # ----------------------------------------------------------------------------------------------------- its status
    @property
    def status(self) -> EngineStatus:
        return EngineStatus(self.applied, self.window, self.torn, self.held)

    @property
    def refusal(self) -> str:
        """Why it refuses to run; empty when it does not."""
        if self.torn:
            return "torn"
        if self.serves is None:
            return "nothing was committed here"
        return "a round is changing the weights" if self.window is not None else "held" if self.held else ""

    @property
    def serves(self) -> Version | None:
        """The version that it takes its live memory for."""
        return self.applied

    def prepared(self, name: RoundName, version: Version) -> list[Version] | None:
        """The memory that a decision of round ``name`` is about; None if it is in no such round."""
        return self.memory if self.window == name else None

    def introduce(self, hello: Hello) -> Hello:
        return msgspec.structs.replace(hello, engine=msgspec.structs.replace(self.status, lending=tuple(self.open)))

    def again(self, word: "Word") -> "Word":
        return msgspec.structs.replace(word, status=self.status) if isinstance(word, Left) else word

    # ---------------------------------------------------------------------------------------------------- its window
    def enter(self, name: RoundName, version: Version, deadline: float, over: Callable[[str], None]) -> None:
        """The update call reaches the worker's main thread."""
        known = self._ended.get(name)
        if known is not None or self.window is not None:
            over(known if known is not None else "inside another round")
            return
        self.window, self._version, self._over, self._exposed = name, version, over, False
        self.later(self.world.short(), lambda: self._stands_still(name))
        self.later(deadline, lambda: self._leave(name, "nothing was decided in time", self._exposed))

    def _stands_still(self, name: RoundName) -> None:
        if self.window == name:
            self.say_once(Quiesced(round=name))
            self._look_for_the_daemon(name)

    def _look_for_the_daemon(self, name: RoundName) -> None:
        """As long as nobody was granted, a worker whose daemon is gone may leave with what it had."""
        if self.window == name and not self._exposed and self.lease:
            if self.abandoned:
                self._leave(name, "the daemon is gone", False)
            else:
                self.later(0.5, lambda: self._look_for_the_daemon(name))

    def _expose(self, name: RoundName) -> None:
        if self.window == name:
            if not self._exposed:
                self._exposed = True
                self._written = Written(name, self._version, whole=not self.torn)
            self.say_once(Exposed(round=name))

    def _leave(self, name: RoundName, failure: str, torn: bool) -> None:
        if self.window != name:
            return
        over, self._over, self.window = self._over, None, None
        if failure:
            self.torn = self.torn or torn
        else:
            self._commit(self._version)
        self._ended[name] = failure
        self.say_once(Left(round=name, status=self.status))
        assert over is not None
        over(failure)

    def _commit(self, version: Version) -> None:
        self.applied, self.torn, self.held, self._written = version, False, False, None

    def _mend(self, message: Commit | Abort) -> None:
        """The word of a daemon that was away while the worker left: its memory may be whole after all."""
        written = self._written
        if self.window is not None or not self.torn or written is None or written.round != message.round:
            return
        if isinstance(message, Commit) and written.verified and written.version == message.version:
            self._commit(message.version)
        elif isinstance(message, Abort) and not message.torn and written.whole:
            self.torn, self._written = False, None
        else:
            return
        self.say_once(Left(round=message.round, status=self.status))

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Expose():
                self._expose(message.round)
            case Connect(lends=True):
                self.lend(message)
            case Grant():
                self.granted(message)
            case Abort() if message.members:
                if message.round in self.open:
                    self.open[message.round].stop(message.members)
            case Connect(relays=True):
                self.relayed = message
                self.later(self.world.short(), lambda: self._ready_beside(message))
            case Connect():
                self._connect = message
                self.later(self.world.short(), lambda: self._ready(message))
            case Verify():
                self.later(self.world.short(), lambda: self._verify(message))
            case Commit():
                self._mend(message)
                self._leave(message.round, "", False)
            case Abort():
                self._mend(message)
                self._ended.setdefault(message.round, "aborted")
                self._leave(message.round, "aborted", message.torn)
            case Renew():
                self.renew(message.spare)
                self.say(self.announce)
            case Hold():
                self.held = message.held
                self.say(Holding(status=self.status))
            case _:
                pass

    def _ready(self, connect: Connect) -> None:
        if self._connect is connect:
            self.say(Ready(fingerprint=connect.fingerprint))

    def _ready_beside(self, connect: Connect) -> None:
        if self.relayed is connect:
            self.say(Ready(fingerprint=connect.fingerprint))

    def _verify(self, message: Verify) -> None:
        if self.window != message.round or self.ill == "silent":
            return
        first, second = memory_digest(self.memory, self.member)
        digest = (first ^ 1, second) if self.ill == "digest" else (first, second)
        if self._written is not None:
            self._written.verified = True
        self.say_once(Verified(
            round=message.round, digest=digest, bytes=sum(SIZES), apply_seconds=0.0, digest_seconds=0.0
        ))  # fmt: skip

    # ------------------------------------------------------------------------------------- of those that land elsewhere
    def land(self, chunk: int, held: Version, name: RoundName) -> None:
        """A write of round ``name`` arrives."""
        self.memory[chunk] = held
        self.world.judge.written(self)

    def switch_refusal(self, order: CallEngine) -> str:
        """Why it would not switch; empty when it would."""
        return "it lands live"

    def switch(self, order: CallEngine, over: Callable[[str], None]) -> None:
        """Its main thread switches, and says so by ``over``, with what went wrong."""
        raise NotImplementedError


class Server(Process):
    """An engine's API server and engine core: paused from its start, serving when it is not.

    ``applicant``: what it says of itself, if it makes itself a member.
    """

    def __init__(self, world: "World", name: str, workers: list[Worker], applicant: Applicant | None = None) -> None:
        super().__init__(world)
        self.applicant = applicant
        self.world, self.name, self.workers = world, name, workers
        self.paused = True
        self.ill: dict[Call, str] = {}
        """What is wrong with a call for as long as it stands here: ``500`` or ``hangs``."""
        self._waiting: list[Reply] = []
        self._armed = False
        """The daemon has paused it, so that it may resume by itself when the daemon is gone."""
        self._switching: CoreSwitch | None = None
        self._behind: list[Callable[[], None]] = []
        """Calls that wait until the engine core has switched."""
        self._switched: RoundName | None = None
        if applicant is not None:
            self.later(world.short(), self._apply)

    def _apply(self) -> None:
        """Say where it is, again and again, whether or not the daemon takes it in."""
        assert self.applicant is not None
        said = Application(run_id="sim", engine=self.applicant)
        if self.world.now >= max(worker.unreachable_until for worker in self.workers):
            self.world.later(self.world.latency(), lambda: self.world.apply(said))
        self.later(APPLY_SECONDS, self._apply)

    @property
    def serves(self) -> bool:
        """Requests run: its scheduler does, and so does every worker."""
        if not self.alive or self.stopped or self.paused:
            return False
        # The gate of a worker whose audit did not agree lets no batch through.
        return not any(worker.stopped or (worker.torn and worker.lands != "live") for worker in self.workers)

    # --------------------------------------------------------------------------------------------- all its processes
    def processes(self) -> list[Process]:
        return [self, *self.workers]

    def stop_all(self) -> None:
        for process in self.processes():
            process.stop()

    def thaw_all(self) -> None:
        for process in self.processes():
            process.thaw()
        self.world.judge.look(self.name)

    def die_all(self, *, silently: bool = False) -> None:
        """With their host (``silently``), or alone, so that its kernel says so."""
        for process in self.processes():
            process.die(silently=silently)
        self.paused = True
        waiting, self._waiting = self._waiting, []
        self._switching, self._behind = None, []
        for reply in () if silently else waiting:
            reply(Answer(error="connection reset"))

    # --------------------------------------------------------------------------------------------------------- calls
    def perform(self, command: CallEngine, reply: Reply) -> None:
        """A call arrives. A stopped server performs it when it is thawed, whoever still waits for it."""
        self._waiting.append(reply)

        def answer(answer: Answer) -> None:
            if self.alive and reply in self._waiting:
                self._waiting.remove(reply)
                reply(answer)

        self.do(lambda: self._perform(command, answer))

    def _perform(self, command: CallEngine, answer: Reply) -> None:
        if self._switching is not None and command.call is not Call.ATTACH:
            self._behind.append(lambda: self._perform(command, answer))  # one engine core answers them in their order
            return
        ill = self.ill.get(command.call, "")
        if ill == "hangs":
            return
        if ill or self.world.faults.happens("refused", self.name):
            answer(Answer(error="500"))
            return
        match command.call:
            case Call.PROBE:
                answer(Answer(self.paused))
            case Call.ATTACH:
                for worker in self.workers:
                    worker.do(worker.dial)
                answer(Answer())
            case Call.PAUSE:
                self.set_paused(True)
                if not self._armed:
                    self._armed = True
                    self._look_for_the_daemon()
                answer(Answer(True))
            case Call.UPDATE:
                self._update(command, answer)
            case Call.SWITCH:
                self._switch(command, answer)
            case Call.FINISH:
                answer(Answer(True))
            case Call.RESUME:
                refusal = self.refusal(command)
                if not refusal:
                    self._armed = False
                    self.set_paused(False)
                answer(Answer(None if refusal else False, refusal))

    def set_paused(self, paused: bool) -> None:
        if self.paused != paused:
            self.paused = paused
            self.world.judge.pause_changed(self)

    def _look_for_the_daemon(self) -> None:
        """The dead man's switch: every worker holds a whole version and has not heard the daemon for its lease."""
        if not self._armed:
            return
        if self.paused and all(w.abandoned and not w.refusal and not w.stopped for w in self.workers):
            self.world.note(f"{self.name} resumes by itself")
            self._armed = False
            self.set_paused(False)
        else:
            self.later(1.0, self._look_for_the_daemon)

    def refusal(self, command: CallEngine) -> str:
        """Why it does not resume: it means other processes, or, where there is a guard, workers that may not run."""
        stopped = next((w for w in self.workers if w.stopped or not w.alive), None)
        if stopped is not None:
            return "a worker does not answer"
        if command.ranks != tuple((worker.member.rank, worker.incarnation) for worker in self.workers):
            return f"it means {command.ranks}"
        if not self.world.guarded:
            return ""
        return next((worker.refusal for worker in self.workers if worker.refusal), "")

    def _update(self, command: CallEngine, answer: Reply) -> None:
        """Every worker enters the update call; it answers when the last one has left."""
        name, version = command.round, command.version
        assert name is not None
        assert version is not None
        if not self.paused:
            answer(Answer(error="the engine is serving"))
            return
        results: list[str] = []

        def over(failure: str) -> None:
            results.append(failure)
            if len(results) == len(self.workers):
                answer(Answer(True, next((result for result in results if result), "")))

        deadline = command.deadline * AGENT_SHARE
        for worker in self.workers:
            worker.do(lambda w=worker: w.enter(name, version, deadline, over))

    # ------------------------------------------------------------------------------------- between two of its steps
    def _switch(self, command: CallEngine, answer: Reply) -> None:
        name = command.round
        assert name is not None
        error = ""
        if command.ranks != tuple((worker.member.rank, worker.incarnation) for worker in self.workers):
            error = f"it means {command.ranks}"
        elif self._switched is not None and name < self._switched:
            error = "of an earlier round"
        elif not self.workers[0].announce.layout.boundary and not self.paused:
            error = "its ranks meet others: pause first"
        if error or name == self._switched:
            answer(Answer(self.paused, error))
        else:
            self._switching = switching = CoreSwitch(self, command, answer)
            switching.begin()

    def switched(self, done: bool, name: RoundName, paused: bool) -> None:
        """The switch under way has ended; ``done``: every worker has switched."""
        self._switching = None
        self._switched = name if done else self._switched
        self.set_paused(paused)

    def go_on(self) -> None:
        """With the calls that waited behind the switch."""
        behind, self._behind = self._behind, []
        for work in behind:
            work()
