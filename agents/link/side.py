"""What differs between a trainer rank and an inference worker, and what these ask of the thread that they share."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from weightsync.orchestrator.protocol.messages import (
    Announce,
    Connect,
    EngineStatus,
    Fault,
    FromAgent,
    FromDaemon,
    RoundWord,
    TrainerStatus,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member


class AgentSide(Protocol):
    """What differs between a trainer rank and an inference worker. Every method runs on the agent's thread."""

    here: Fault
    """Who is to blame for errors of this process that are nobody else's."""

    def status(self) -> TrainerStatus | EngineStatus:
        """What this rank's memory holds now."""

    def welcomed(self, welcome: Welcome) -> None:
        """The transport is known; open it on the first call. What it raises ends the agent."""

    def announcement(self) -> Announce | None:
        """Layout, and how the transport reaches this rank; None while there is no layout yet."""

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        """Prepare and warm up the edges that are not ready. Called again with the same plan for as long as some are not
        and for each ``Link.reconnect``.

        Returns:
            The peers whose edges cannot be used now, and why.
        """

    def heard(self, message: FromDaemon) -> None:
        """A message that is not part of the rendezvous; a Connect that ``lends`` or ``relays`` is none."""

    def poll(self) -> bool:
        """Let the transport make progress; true while a grant is open here."""

    def shut(self) -> None:
        """Close the transport."""


class Link(Protocol):
    """What a side asks of its thread, on that thread."""

    @property
    def epoch(self) -> int:
        """Of the daemon that this agent obeys."""

    def send(self, message: FromAgent) -> bool:
        """Tell the daemon, if it is there."""

    def say_once(self, word: RoundWord) -> None:
        """Tell the daemon, now and again after each Welcome of a new connection, until a newer round's word comes.

        Each kind of word replaces its own last one.
        """

    def announce(self) -> None:
        """Say the layout anew, because it has changed."""

    def reconnect(self) -> None:
        """Ask for ``connect`` with the present plan: edges may have become ready, or have been lost."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Begin a task of the agent's thread."""
