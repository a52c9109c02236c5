"""The seam between the daemon and an inference engine's server: what a new kind of engine implements.

An engine is reached in two ways. Its *ranks* are our agents: they run inside the engine's own processes, come to the
hub by themselves, receive the bytes and say what their memory holds. Its *server* is reached over HTTP, by an
``EngineClient``, and everything that only that server knows (routes, bodies, flags to start it with, pause modes, error
texts) stays in the one module that implements it. Nothing here says that scheduler and worker are different processes,
that ranks know a version, or that the server acknowledges a pause: the agents' words are the proof of all of that.

The life of a client, in the order in which the core calls it:

1. ``probe``: is the server alive, does it have what we need, do the settings fit it? Repeated every
   ``deadlines.probe_seconds`` while the engine is in no round, each time followed by ``is_paused``.
2. ``attach``: tell the ranks where the hub is. Each of them connects and announces the layout of its weights. Repeated
   while no rank is connected, so also after the daemon or the server was restarted, then with another address perhaps.
3. For each round, of an engine whose ranks land ``live``: ``pause``, ``update``, ``finish``, ``resume``. ``update``
   lasts as long as the round: it brings every rank into the window in which its weights may change, and returns when
   every rank has left it. That a rank stands still it says itself (Quiesced), and that it has left it says itself
   (Left); only those words count. ``finish`` tells the server the version's name, for it to show to its users. A round
   that fails before a byte was written goes from there to ``resume``; an engine that may be torn stays paused, and the
   next round begins with ``pause`` again.
4. For each round, of one whose ranks land in ``copy`` or ``flip``: ``switch``, between two of its steps, once all that
   it needs is in its ranks' standby. ``pause`` before it and ``resume`` after it only where it may not serve meanwhile.
5. ``close``, once.

Methods may overlap: ``is_paused`` beside an ``update``, a ``pause`` while an earlier one is still under way. Pausing
what is paused and resuming what runs are no errors.

All deadlines are totals in seconds, retries included, and come from the command that the call performs; a client has no
deadline of its own. Every method but ``close`` raises an EngineError and nothing else. A call that is cancelled may
still have its effect.

A new kind of engine is a module with a client, and its line in ``kinds.CLIENTS``; the settings then take its name as
``engines[].kind``.
"""

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from weightsync.orchestrator.protocol.names import RoundName, Version

PauseMode = Literal["keep", "wait", "abort"]
"""What becomes of requests in flight: they keep their place, are waited for, or end."""

CachePolicy = Literal["keep", "drop", "recompute"]
"""What becomes of what was computed with the old weights, of requests that keep their place: the prefix cache stays; it
goes, and they go on with their own part; all of it goes, and they are computed again."""


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """One engine's part of the settings, as its client needs it.

    ``api_key``: the bearer token of its HTTP routes, None where it asks for none. ``cache``: at a pause and at a
    switch. ``tls``: for an https URL. ``admin_keys``: asked before each call; what may open its admin routes at present
    (``protocol/proof.py``).
    """

    name: str
    url: str
    api_key: str | None = field(repr=False)
    pause_mode: PauseMode
    cache: CachePolicy
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    admin_keys: Callable[[], Sequence[str]] = field(default=tuple, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a probe has found. ``server``: name and version of the program; ``ranks``: over all its parallel replicas.

    ``notes``: for people only, what else is worth a word in ``config check``.
    """

    server: str
    ranks: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HubAddress:
    """Where the ranks' agents find the daemon: WebSocket URL, and the run's name. Their token they know themselves."""

    url: str
    run_id: str


@dataclass(frozen=True, slots=True)
class RoundUpdate:
    """One round in one engine. The ranks give up by themselves after ``rank_seconds``, before the call's deadline."""

    round: RoundName
    version: Version
    rank_seconds: float


@dataclass(frozen=True, slots=True)
class Switch:
    """One switch of an engine to the standby of its ranks: rank → incarnation of the processes that are meant."""

    round: RoundName
    version: Version
    incarnations: Mapping[int, int]
    rank_seconds: float


@dataclass(frozen=True, slots=True)
class Switched:
    """``paused``: whether the engine is now, as it was before. ``seconds``: how long it took no step for the switch."""

    paused: bool
    seconds: float


class EngineClient(Protocol):
    """One engine's server. Made inside a running loop; methods may be called while others are under way."""

    @property
    def name(self) -> str:
        """As the settings call it."""

    async def probe(self, deadline: float) -> EngineFacts:
        """Find out whether the server can take part. Changes nothing in it.

        Raises:
            EngineMisconfigured: it was started without something that we need, or cannot do what the settings ask for;
                the error says what to change.
        """

    async def attach(self, hub: HubAddress, deadline: float) -> None:
        """Have an agent in every rank connect to ``hub``. The same again changes nothing."""

    async def pause(self, deadline: float) -> None:
        """Let no new step begin. Returns when the server says so, or, where it acknowledges nothing, once it was asked.

        ``EngineSetup.pause_mode`` and ``cache`` say how. One that cannot drop only the prefix cache drops all.
        """

    async def update(self, update: RoundUpdate, deadline: float) -> None:
        """Bring every rank into the round's window; returns when each has left it with the new version.

        Never repeated once it may have arrived. An error with ``sent`` says nothing about the ranks: their agents do.
        """

    async def switch(self, switch: Switch, deadline: float) -> Switched:
        """Have every rank serve its standby, between two steps of the engine, which is told the version's name.

        What is asked again after it took place changes nothing and is answered as before, so that a lost answer is
        asked for again. A round that the ranks have gone beyond is refused. An engine of which a rank fails pauses
        itself. What the ranks hold afterwards they say themselves (Left), once they have looked.

        Raises:
            EngineNotServable: a rank has not this version in its standby or is another process.
        """

    async def landing(self, deadline: float) -> tuple[str, ...]:
        """How versions land in its ranks, and why, in lines for people; empty where it cannot tell. Changes nothing."""

    async def finish(self, version: Version, deadline: float) -> None:
        """Tell the server which version it serves from now on. Called after ``update``, before ``resume``."""

    async def resume(self, incarnations: Mapping[int, int], deadline: float) -> None:
        """Let the engine take steps again, if its ranks are the processes that are meant.

        Args:
            incarnations: rank → incarnation of the process whose words let it serve. One that was started in its place
                since, perhaps at the same URL, must refuse.

        Raises:
            EngineNotServable: a rank holds no whole committed version or is another process; the engine stays paused.
        """

    async def is_paused(self, deadline: float) -> bool | None:
        """Whether no step can begin; None where the server has no way to tell."""

    async def close(self) -> None:
        """End all connections. No other call may be under way."""


EngineFactory = Callable[[EngineSetup], EngineClient]
