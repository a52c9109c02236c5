"""A worker of a simulated engine that serves while the next version lands beside what it serves."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from contents import GARBAGE, SIZES, memory_digest
from simulated_engine import Worker
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Commit,
    EngineStatus,
    Expose,
    Exposed,
    FromDaemon,
    Grant,
    Holding,
    Left,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName, Version

if TYPE_CHECKING:
    from world import World


SPARES: Final = 100
"""Of a worker: more than a story takes."""

AUDIT_SECONDS: Final = 0.02
"""Of pages that were exchanged, when the switch is told and nobody waits."""


class ShadowWorker(Worker):
    """One rank of an engine. ``memory`` is live memory, which nothing remote reaches.

    In ``copy`` the ``landing`` holds all that arrives, and is copied over live memory. In ``flip`` what a round writes
    goes on from the landing into a second set of pages, and the two sets change places.
    """

    def __init__(
        self, world: "World", member: Member, size: int, lands: Literal["copy", "flip"], boundary: bool
    ) -> None:
        super().__init__(world, member, size)
        self.lands = lands
        layout = Layout((), (), b"", lands=lands, boundary=boundary)
        self.announce = Announce(layout=layout, endpoint_name=self.endpoint, lends_name="lends", spares=SPARES)
        self.landing = [GARBAGE] * len(SIZES)
        """What remote writers reach, whoever they are."""
        self.pages = [GARBAGE] * len(SIZES)
        """Of ``flip``: the set that is not served."""
        self.running: Version | None = None
        """What it computes with, audited or not; ``applied`` is what it says."""
        self.standby: Version | None = None
        self.standby_digest: Digest = NO_BYTES
        self.exposed: RoundName | None = None
        self._verified: Verified | None = None
        self._live_digest: Digest = NO_BYTES
        self._audits = 0
        self._switches: list[RoundName] = []
        """Of what it runs: the rounds that asked for it."""

    def renew(self, spare: bool = False) -> None:
        super().renew()
        if spare:  # what still comes for the memory before lands there, and nobody reads that any more
            self.announce = msgspec.structs.replace(self.announce, spares=self.announce.spares - 1)
            assert self.announce.spares >= 0, f"{self.member} has no spare left"
            self.landing = [GARBAGE] * len(SIZES)
            if self.lands == "copy" or (self.exposed is not None and self._verified is None):
                self._drop()
            self.say(Holding(status=self.status))

    # ----------------------------------------------------------------------------------------------------- its status
    @property
    def status(self) -> EngineStatus:
        return EngineStatus(self.applied, None, self.torn, self.held, self.standby, self.standby_digest)

    @property
    def serves(self) -> Version | None:
        return self.running

    def prepared(self, name: RoundName, version: Version) -> list[Version] | None:
        if self.exposed == name or self.standby == version:
            return self.beside
        return None

    @property
    def beside(self) -> list[Version]:
        return self.landing if self.lands == "copy" else self.pages

    # -------------------------------------------------------------------------------------------------- what it hears
    @property
    def stands_by(self) -> Version | None:
        return self.standby

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Expose():
                assert not message.relays or self.relayed is not None, f"{self.member} has no edges for {message}"
                self._expose_beside(message.round)
            case Verify():
                self.later(self.world.short(), lambda: self._verify_beside(message))
            case Abort() if not message.members:
                assert not message.torn, f"{self.member} is told {message}, and nothing reaches its live memory"
                if message.round in self.open:
                    self.open[message.round].stop(())
                if message.round == self.exposed:
                    self._drop()
                    self.say_once(Left(round=message.round, status=self.status))
            case Commit():
                raise AssertionError(f"{self.member} is told {message}, which is for workers that land live")
            case _:
                super().heard(message)

    def granted(self, grant: Grant) -> None:
        """What it lends of what it serves is packed where versions land."""
        fresh = grant.round not in self.open
        super().granted(grant)
        if fresh and grant.round in self.open and self.lands == "copy" and not self.lends_standby:
            self.landing = [GARBAGE] * len(SIZES)

    def _expose_beside(self, name: RoundName) -> None:
        if name != self.exposed:
            self._drop()
            self.exposed = name
        self.say_once(Exposed(round=name))

    def _drop(self) -> None:
        self.exposed = self._verified = None
        self.standby, self.standby_digest = None, NO_BYTES

    def _verify_beside(self, order: Verify) -> None:
        if order.round != self.exposed or self.ill == "silent":
            return
        if self._verified is None:
            first, second = memory_digest(self.beside, self.member)
            digest = (first ^ 1, second) if self.ill == "digest" else (first, second)
            self.standby, self.standby_digest = order.version, digest
            self._verified = Verified(
                round=order.round, digest=digest, bytes=sum(SIZES), apply_seconds=0.0, digest_seconds=0.0
            )
        self.say_once(self._verified)

    # ----------------------------------------------------------------------------------------------------- its memory
    def land(self, chunk: int, held: Version, name: RoundName) -> None:
        """In ``flip`` a writer of another round than the one that lands reaches the landing, and no further."""
        self.landing[chunk] = held
        if self.lands == "flip" and name == self.exposed and self._verified is None:
            self.pages[chunk] = held

    def enter(self, name: RoundName, version: Version, deadline: float, over: Callable[[str], None]) -> None:
        raise AssertionError(f"{self.member} is called into a window, which is for workers that land live")

    # --------------------------------------------------------------------------------------------------- its switch
    def switch_refusal(self, order: CallEngine) -> str:
        if self._runs(order.version) or self.standby == order.version:
            return ""
        return f"{self.standby} stands by, not {order.version}"

    def _runs(self, version: Version | None) -> bool:
        return self.running == version and not self.torn

    def switch(self, order: CallEngine, over: Callable[[str], None]) -> None:
        assert order.round is not None
        name = order.round
        if self._runs(order.version):
            self._switches.append(name)
            if self.applied == order.version:
                self.say_once(Left(round=name, status=self.status))
            over("")
        else:
            self.later(self.world.short(), lambda: self._changed(order, name, over))

    def _changed(self, order: CallEngine, name: RoundName, over: Callable[[str], None]) -> None:
        """What has landed is what it computes with from now on; or half of it, if something fails on the way."""
        assert order.version is not None
        broken = self.ill == "switch" or self.world.faults.happens("switch", self.member.engine)
        half = len(SIZES) // 2
        new = [*self.beside]
        old = self.memory  # which is no version where the switch before failed on the way
        before = (None, NO_BYTES) if self.torn else (self.applied, self._live_digest)
        self.exposed = self._verified = None
        self._audits += 1
        if broken:
            self.memory = new[:half] + old[half:]
            self.torn = True
            self.standby, self.standby_digest = None, NO_BYTES
            self.say_once(Left(round=name, status=self.status))
            over("a copy failed")
            return
        audit, expected = self._audits, self.standby_digest
        self.memory, self.running = new, order.version
        self._switches = [name]
        self.torn = self.held = False
        if self.lands == "flip":
            self.pages = old
        over("")
        self.later(self.world.short(), lambda: self._audited(audit, expected, before))

    def _audited(self, audit: int, expected: Digest, before: tuple[Version | None, Digest]) -> None:
        if audit != self._audits or self.ill == "audit hangs":
            return
        if memory_digest(self.memory, self.member) != expected or self.ill == "audit":
            self.torn = True
            self.standby, self.standby_digest = None, NO_BYTES
        else:
            self.applied, self._live_digest = self.running, expected
            if self.exposed is None:
                keeps = self.lands == "flip" and before[0] is not None
                self.standby, self.standby_digest = before if keeps else (None, NO_BYTES)
        for name in self._switches:
            self.say_once(Left(round=name, status=self.status, switch_seconds=0.001, audit_seconds=0.001))
        if self.lands == "flip" and not self.torn:
            self.later(AUDIT_SECONDS, lambda: self._audited_whole(audit))

    def _audited_whole(self, audit: int) -> None:
        """Of pages all is looked at when nobody waits for it any more."""
        if audit == self._audits and self.ill == "late audit":
            self.torn = True
            self.standby, self.standby_digest = None, NO_BYTES
            self.say(Holding(status=self.status))
