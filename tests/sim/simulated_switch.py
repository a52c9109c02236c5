"""How the core of a simulated engine switches its workers to what stands by, between two of its steps."""

from typing import TYPE_CHECKING

from answers import Answer, Reply
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.policy import AGENT_SHARE

if TYPE_CHECKING:
    from simulated_engine import Server, Worker


class CoreSwitch:
    """One switch of an engine core: it asks every worker whether it can, then has all of them do it.

    No step is taken meanwhile. One that fails leaves the engine paused.
    """

    def __init__(self, server: "Server", command: CallEngine, answer: Reply) -> None:
        self.server, self.command, self.answer = server, command, answer
        self.was_paused = server.paused
        self.changing = self.over = False
        self._said: list[str] = []

    def begin(self) -> None:
        self.server.set_paused(True)
        for worker in self.server.workers:
            worker.do(lambda worker=worker: self._can(worker))
        deadline = self.command.deadline * AGENT_SHARE
        self.server.later(deadline, lambda: self._end("a worker does not answer", self.changing))

    def _can(self, worker: "Worker") -> None:
        self._said.append(worker.switch_refusal(self.command))
        if len(self._said) < len(self.server.workers) or self.over:
            return
        refusal, self._said = next(filter(None, self._said), ""), []
        if refusal:
            self._end(refusal, False)
            return
        self.changing = True
        for each in self.server.workers:
            each.do(lambda each=each: each.switch(self.command, self._has))

    def _has(self, failure: str) -> None:
        self._said.append(failure)
        if len(self._said) == len(self.server.workers):
            failed = next(filter(None, self._said), "")
            self._end(failed, bool(failed))

    def _end(self, error: str, stays_paused: bool) -> None:
        if self.over or not self.server.alive:
            return
        self.over = True
        assert self.command.round is not None
        self.server.switched(not error, self.command.round, self.was_paused or stays_paused)
        self.answer(Answer(None if error else self.was_paused, error))
        self.server.go_on()
