"""What a simulated worker does for others: it writes what it serves into the memory of workers that catch up."""

from typing import TYPE_CHECKING

from contents import lent_chunks, owed
from weightsync.orchestrator.protocol.messages import Closed, Connect, EdgeFailure, Grant, Ready
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version
from wires import Agent
from writing import Writing, hanging, leave, open_edges, reach, told

if TYPE_CHECKING:
    from simulated_engine import Worker
    from world import World

RETRY_SECONDS = 1.0
"""Before edges that are not ready are tried again."""


class Lender(Agent):
    """The part of a worker that lends. It reads ``memory``, the live one, or its standby, as it is when a chunk
    lands."""

    def __init__(self, world: "World", member: Member, size: int) -> None:
        super().__init__(world, member, size)
        self.memory: list[Version] = []
        self.open: dict[RoundName, Writing] = {}
        self.connected: dict[Member, Worker] = {}
        self.reached: dict[Member, str] = {}
        self._lent: Connect | None = None
        self._unlent: tuple[EdgeFailure, ...] = ()

    # -------------------------------------------------------------------------------------------- ``writing.Writer``
    def chunks_for(self, target: Member) -> tuple[int, ...]:
        assert self._lent is not None
        return lent_chunks(self.member, target, self._lent.copies.decode().split(","))

    def reads(self, chunk: int) -> Version:
        return self._held[chunk]

    def may_post(self, chunk: int | None, version: Version) -> bool:
        return True

    @property
    def lends_standby(self) -> bool:
        """And not what it serves."""
        return self._lent is not None and self._lent.relays

    @property
    def _held(self) -> list[Version]:
        assert self._lent is not None
        return self.beside if self._lent.relays else self.memory

    @property
    def beside(self) -> list[Version]:
        """What has landed and is not served."""
        raise NotImplementedError

    def owed(self, target: Member, version: Version) -> tuple[Digest, int]:
        return owed(tuple((chunk, self._held[chunk]) for chunk in self.chunks_for(target)), target.rank)

    @property
    def stands_by(self) -> Version | None:
        """A version that it has verified there."""
        return None

    # ------------------------------------------------------------------------------------------------------ its edges
    def lend(self, connect: Connect) -> None:
        """Round 2 of a feed: connect to who borrows, again and again for as long as the feed stands."""
        leave(self, connect)
        self._lent, self.connected, self.reached = connect, {}, {}
        self.later(self.world.short(), lambda: self._try_to_lend(connect, first=True))

    def _try_to_lend(self, connect: Connect, first: bool = False) -> None:
        if self._lent is not connect:
            return
        failed = reach(self, connect)
        changed, self._unlent = failed != self._unlent, failed
        if first or changed:
            self.say(Ready(fingerprint=connect.fingerprint, failed=failed))
        if failed:
            self.later(RETRY_SECONDS, lambda: self._try_to_lend(connect))

    def tell_edges(self) -> None:
        if self._lent is not None:
            now = told(self, self._unlent)
            if now != self._unlent:
                self._unlent = now
                self.say(Ready(fingerprint=self._lent.fingerprint, failed=now))
            if hanging(self):
                self.later(RETRY_SECONDS, self.tell_edges)

    # -------------------------------------------------------------------------------------------------------- grants
    def granted(self, grant: Grant) -> None:
        """The right to lend ``grant.version`` once; said again it is one grant."""
        if grant.round in self.open:
            return
        objection = ""
        if grant.round.epoch != self.epoch:
            objection = f"grant of epoch {grant.round.epoch}"
        elif self._lent is None or grant.fingerprint != self._lent.fingerprint:
            objection = "grant for other edges"
        elif self._lent.relays and self.stands_by != grant.version:
            objection = f"{self.stands_by} stands by"
        elif any(not edge.stopped for edge in open_edges(self)):
            objection = "another round is still being lent"
        if objection:
            self.say_once(Closed(round=grant.round, error=objection, fault="engine"))
            return
        self.open[grant.round] = writing = Writing(self, grant)
        writing.begin()
