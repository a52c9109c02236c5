"""Which daemon a process obeys, and what it said last: both outlive connections, and the agent that is replaced."""

from dataclasses import dataclass, field

import msgspec
from weightsync.agents.link.connection import NotObeyed
from weightsync.orchestrator.protocol.messages import (
    EngineStatus,
    Exposed,
    Left,
    Quiesced,
    RoundWord,
    TrainerStatus,
    Welcome,
)


@dataclass(slots=True)
class Obedience:
    """Of one process, for as long as it lives. On the agent's thread; the numbers may be read on any.

    Writers that could reach this memory still can after a change of the agent, so the ``incarnation`` stays. A daemon
    of a lower epoch would give its rounds the names of rounds that are over here, and so would a second life of the
    same epoch, as after a copy of a state directory: only one life of an epoch is obeyed.

    Attributes:
        incarnation: random number of this process.
        epoch, journal_id, life: of the last daemon that was obeyed; 0 and empty before.
        lease_seconds: as that daemon's Welcome tells it; 0 for none.
    """

    incarnation: int
    epoch: int = 0
    journal_id: str = ""
    life: str = ""
    lease_seconds: float = 0.0
    _words: dict[type[RoundWord], RoundWord] = field(default_factory=dict)

    def obey(self, welcome: Welcome) -> None:
        """Take the daemon of this Welcome for ours.

        Raises:
            NotObeyed: it is a daemon of the past, or another than the one of this epoch.
        """
        obeyed = f"this process obeyed epoch {self.epoch}, life {self.life or '?'}, journal {self.journal_id or '?'}"
        if welcome.epoch < self.epoch:
            raise NotObeyed(f"its epoch {welcome.epoch} is over: {obeyed}; end that daemon")
        same = (welcome.life, welcome.journal_id) == (self.life, self.journal_id)
        if welcome.epoch == self.epoch and not same:
            raise NotObeyed(
                f"it is another daemon of epoch {welcome.epoch} (life {welcome.life or '?'}, journal "
                f"{welcome.journal_id}): {obeyed}; two daemons run on copies of one state directory: end one of them"
            )
        self.epoch, self.journal_id, self.life = welcome.epoch, welcome.journal_id, welcome.life
        self.lease_seconds = welcome.lease_seconds

    def keep(self, word: RoundWord) -> None:
        """Remember a word of the last round, one of each kind; a word of an older round is not kept."""
        last = max((known.round for known in self._words.values()), default=word.round)
        if word.round < last:
            return
        if word.round > last:
            self._words.clear()
        if isinstance(word, Left):  # it is inside no longer, whatever it said before
            self._words.pop(Quiesced, None)
            self._words.pop(Exposed, None)
        self._words.pop(type(word), None)  # said again it comes last
        self._words[type(word)] = word

    def repeated(self, status: TrainerStatus | EngineStatus) -> tuple[RoundWord, ...]:
        """Words of the last round, in the order in which they were said: a connection may have been lost with them.

        Left says what the memory holds now, which is ``status``: it may have been held since, or written anew.
        """
        return tuple(
            msgspec.structs.replace(word, status=status)
            if isinstance(word, Left) and isinstance(status, EngineStatus)
            else word
            for word in self._words.values()
        )
