"""Connections between agents and the daemon, and what goes wrong with them: each end has its own idea of them."""

from typing import TYPE_CHECKING

from virtual_time import Process
from weightsync.orchestrator.protocol.codec import decode_from_daemon, encode
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Bye,
    Closed,
    Exposed,
    FromAgent,
    FromDaemon,
    Heartbeat,
    Hello,
    Left,
    Quiesced,
    Refused,
    Verified,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName

if TYPE_CHECKING:
    from simulated_daemon import SimulatedDaemon
    from world import World

ANNOUNCE = Announce(layout=Layout((), (), b""), lends_name="lends")
"""Of a layout the core reads only how its owner lands."""

Word = Quiesced | Exposed | Closed | Verified | Left
"""What an agent repeats after a Welcome: the last of each kind, of its last round."""


class Link:
    """One connection. Order is kept in each direction; what is under way when it is ``cut`` is lost."""

    def __init__(self, world: "World", agent: "Agent", daemon: "SimulatedDaemon") -> None:
        self.world, self.agent, self.daemon = world, agent, daemon
        self.number = world.next_id()
        self.near = True
        """The agent takes it for open …"""
        self.far = True
        """… and so does the daemon."""
        self.cut = False
        self.accepted = False
        self.welcomed = False
        """As far as the agent has heard."""
        self.hello: Hello | None = None
        self._up = self._down = 0.0

    # ---------------------------------------------------------------------------------------------------- messages
    def to_daemon(self, message: FromAgent) -> None:
        if not self.near:
            return
        data = encode(message)
        self._up = max(self._up, self.world.now + self.world.latency())

        def arrive() -> None:
            if self.far and not self.cut:
                self.daemon.heard(self, data)

        self.world.at(self._up, arrive)

    def to_agent(self, message: FromDaemon) -> None:
        """What is sent must be readable: it travels as bytes, as everything does."""
        data = encode(message)
        read = decode_from_daemon(data)
        assert read == message, f"{message} arrives as {read}"
        self._down = max(self._down, self.world.now + self.world.latency())

        def arrive() -> None:
            if self.near and not self.cut:
                self.agent.do(lambda: self.agent.received(self, read))

        self.world.at(self._down, arrive)

    # ------------------------------------------------------------------------------------------------------ endings
    def closed_by_daemon(self) -> None:
        """The agent hears of it after all that was sent before; not at all while nothing passes."""
        self.far = False
        self._down = max(self._down, self.world.now + self.world.latency())

        def arrive() -> None:
            if not self.cut:
                self.agent.do(lambda: self.agent.lost(self))

        self.world.at(self._down, arrive)

    def closed_by_agent(self, reason: str) -> None:
        """An end that both hear of."""
        self.near = False
        self._up = max(self._up, self.world.now + self.world.latency())

        def arrive() -> None:
            if not self.cut:
                self.daemon.lost(self, reason)

        self.world.at(self._up, arrive)
        self.agent.lost(self)

    def reset_half(self) -> None:
        """Only the agent hears of the end; what was under way is lost. The daemon misses heartbeats, in time."""
        self.cut = True
        self._daemon_misses_heartbeats()
        self.agent.lost(self)

    def go_silent(self) -> None:
        """Nothing passes any more, and nobody is told; each end misses heartbeats, in time."""
        self.cut = True
        self.agent.hears_nothing()
        self._daemon_misses_heartbeats()
        self.agent.later(self.world.silence, lambda: self.agent.lost(self))

    def _daemon_misses_heartbeats(self) -> None:
        self.world.later(self.world.silence, lambda: self.daemon.lost(self, "no heartbeat"))


class Agent(Process):
    """A process of ours with one connection at most."""

    def __init__(self, world: "World", member: Member, size: int) -> None:
        super().__init__(world)
        self.world, self.member, self.size = world, member, size
        self.incarnation = world.next_id()
        self.host, self.boot = "host", "boot"
        self.generation = 0
        self.announce = ANNOUNCE
        self.link: Link | None = None
        self.epoch, self.journal_id, self.life = 0, "", ""
        self.unreachable_until = 0.0
        self.silent_since: float | None = None
        """Since when it has heard nothing of the daemon that it obeys; None: it hears it, or obeyed none yet."""
        self.lease = 0.0
        self.ended = False
        """It was refused for good."""
        self._dialling = False
        self._since_hello: list[FromAgent] = []
        self._words: dict[type, Word] = {}
        self._words_of: RoundName | None = None

    # ------------------------------------------------------------------------------------------------- what differs
    def introduce(self, hello: Hello) -> Hello:
        """``hello`` with what the memory holds."""
        raise NotImplementedError

    def heard(self, message: FromDaemon) -> None:
        """Everything but Welcome and Refused."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------- connections
    def dial(self, delay: float = 0.0) -> None:
        """Connect, again and again until the daemon is there."""
        if not self._dialling and self.link is None and not self.ended:
            self._dialling = True
            self.later(delay, self._dial)

    def _dial(self) -> None:
        self._dialling = False
        daemon = self.world.daemon
        if self.link is not None:
            return
        if daemon is None or not daemon.alive or self.world.now < self.unreachable_until:
            self.dial(self.world.rng.uniform(0.2, 0.8))
            return
        self.link = link = Link(self.world, self, daemon)
        self._since_hello = []
        daemon.links.append(link)
        link.to_daemon(self.introduce(Hello(
            schema=SCHEMA_VERSION, run_id="sim", member=self.member, incarnation=self.incarnation, world=self.size,
            generation=self.generation, epoch_seen=self.epoch, journal_id=self.journal_id, life_seen=self.life,
            host=self.host, boot=self.boot, pid=self.incarnation,
        )))  # fmt: skip

    def lost(self, link: Link) -> None:
        """The agent knows that the connection is over."""
        link.near = False
        if self.link is link:
            self.link = None
            self.hears_nothing()
            self.dial(self.world.rng.uniform(0.01, 0.8))

    def hears_nothing(self) -> None:
        """From now on, if it has obeyed a daemon at all."""
        if self.silent_since is None and self.epoch:
            self.silent_since = self.world.now

    @property
    def abandoned(self) -> bool:
        """The lease that the daemon gave has run out."""
        return bool(self.lease) and self.silent_since is not None and self.world.now - self.silent_since >= self.lease

    def thaw(self) -> None:
        """It has not waited while it stood still."""
        if self.silent_since is not None:
            self.silent_since = self.world.now
        super().thaw()

    def stop(self) -> None:
        """Stopped: its kernel keeps the connection, it says nothing more."""
        super().stop()
        link, since = self.link, self.world.now
        self._stopped_since = since

        def missed() -> None:
            if link is not None and self.stopped and self._stopped_since == since:
                link.daemon.lost(link, "no heartbeat")

        self.world.later(self.world.silence, missed)

    def die(self, *, silently: bool = False) -> None:
        """Its kernel resets the connection; or dies with it, and the daemon hears nothing more."""
        super().die()
        link, self.link = self.link, None
        if link is not None:
            link.near = False
            if silently:
                link.go_silent()
            elif not link.cut:
                self.world.later(self.world.latency(), lambda: link.daemon.lost(link, "process died"))

    # ----------------------------------------------------------------------------------------------------- messages
    def say(self, message: FromAgent) -> None:
        """Over the present connection, if there is one; before its Welcome, right after that."""
        if self.link is not None and self.link.welcomed:
            self.link.to_daemon(message)
        elif self.link is not None:
            self._since_hello.append(message)

    def say_once(self, word: Word) -> None:
        """Now, and again after each Welcome, until words of another round take its place."""
        if word.round != self._words_of:
            self._words_of = word.round
            self._words = {}
        self._words.pop(type(word), None)
        self._words[type(word)] = word
        self.say(word)

    def received(self, link: Link, message: FromDaemon) -> None:
        if link is not self.link:
            return
        match message:
            case Welcome():
                self._welcomed(link, message)
            case Refused():
                self.ended = not message.retry
            case Heartbeat():
                pass
            case _:
                self.heard(message)

    def _welcomed(self, link: Link, welcome: Welcome) -> None:
        """Of one epoch an agent obeys one life, and never an earlier epoch."""
        same = (welcome.journal_id, welcome.life) == (self.journal_id, self.life)
        if welcome.epoch < self.epoch or (welcome.epoch == self.epoch and not same):
            link.closed_by_agent("a daemon of another life")
            return
        self.epoch, self.journal_id, self.life = welcome.epoch, welcome.journal_id, welcome.life
        self.lease, self.silent_since, link.welcomed = welcome.lease_seconds, None, True
        self.say(self.announce)
        for word in self._words.values():
            self.say(self.again(word))
        since, self._since_hello = self._since_hello, []
        for message in since:
            self.say(message)

    def again(self, word: Word) -> Word:
        """A word that is repeated: what it says of the memory is true now."""
        return word

    def leave(self) -> None:
        """An orderly end."""
        self.say(Bye(reason="the job is over"))
        if self.link is not None:
            self.link.closed_by_agent("good-bye")
        self.ended = True
        super().die()
