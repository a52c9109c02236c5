"""Writes that run ahead of the version that they are of: what is converted travels while the rest is being made."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from weightsync.agents.transport.filling import Filling
from weightsync.agents.transport.interface import HandedOver, Sender
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version

Digests = Mapping[Member, Digest]

CONVERT_SECONDS: Final = 600.0
"""For the conversion, beside the time for the write; who waits for either has deadlines of their own before that."""


async def write_ahead(
    sender: Sender,
    round_name: RoundName,
    members: Sequence[Member],
    seconds: float,
    filling: Filling,
    digests: Callable[[Version], Awaitable[Digests]],
    tell: Callable[[Digests, HandedOver], None],
) -> None:
    """Have ``sender`` write what is filled, as it is filled.

    An edge that fails is told of at once. The end of one that has all its bytes is told when the version is staged, for
    until then nobody knows its digest; or that it has been given up.

    Args:
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

    await sender.write(round_name, members, seconds + CONVERT_SECONDS, ended, filling.filled)
    if await filling.ended:
        known = await digests(filling.version)
    else:
        held = [replace(end, error=f"{filling.version} was given up") for end in held]
        known = {}
    for end in held:
        tell(known, end)
