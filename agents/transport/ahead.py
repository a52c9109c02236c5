"""Writes that run ahead of the version that they are of: what is converted travels while the rest is being made."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from weightsync.agents.transport.filling import Filling
from weightsync.agents.transport.grants import OpenGrant
from weightsync.agents.transport.interface import HandedOver, Sender
from weightsync.orchestrator.protocol.names import Digest, Member, Version

Digests = Mapping[Member, Digest]

CONVERT_SECONDS: Final = 600.0
"""For the conversion, beside the time for the write; who waits for either has deadlines of their own before that."""

LOOK_SECONDS: Final = 0.25
"""While a conversion goes on: between two looks at which peers the daemon has let go."""


async def write_ahead(
    sender: Sender,
    grant: OpenGrant,
    members: Sequence[Member],
    seconds: float,
    filling: Filling,
    digests: Callable[[Version], Awaitable[Digests]],
    tell: Callable[[Digests, HandedOver], None],
) -> None:
    """Have ``sender`` write what is filled, as it is filled.

    An edge that fails is told of at once. The end of one that has all its bytes is told when the version is staged, for
    until then nobody knows its digest; or that it has been given up; or that the daemon has ended it, for a conversion
    that hangs must not keep its engine from other rounds.

    Args:
        grant: what is granted; who is stopped.
        members: of the grant, to be written to.
        seconds: for the write, the conversion not counted.
        digests: of what each peer is owed, once the version is staged.
        tell: the digests, and how an edge has ended.
    """
    known: Digests | None = None
    held: list[HandedOver] = []

    def ended(end: HandedOver) -> None:
        if end.error or known is not None:
            tell(known or {}, end)
        else:
            held.append(end)

    await sender.write(grant.grant.round, members, seconds + CONVERT_SECONDS, ended, filling.filled)
    while not filling.ended.done():
        stopped = [end for end in held if end.member in grant.stopped]
        held = [end for end in held if end not in stopped]
        for end in stopped:
            tell({}, replace(end, error=grant.stopped[end.member]))
        await asyncio.wait([filling.ended], timeout=LOOK_SECONDS)
    if await filling.ended:
        known = await digests(filling.version)
    else:
        held = [replace(end, error=f"{filling.version} was given up") for end in held]
        known = {}
    for end in held:
        tell(known, end)
