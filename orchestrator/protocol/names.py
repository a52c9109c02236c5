"""Who and which: members of the fleet, versions, rounds. The words are those of docs/protocol.md."""

from typing import Literal

import msgspec

Role = Literal["trainer", "inference"]


class Member(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One agent's place: a trainer rank (``engine`` is empty) or a rank of an engine. Survives restarts."""

    role: Role
    engine: str
    rank: int

    def __str__(self) -> str:
        return f"trainer/{self.rank}" if self.role == "trainer" else f"{self.engine}/{self.rank}"


class Version(msgspec.Struct, frozen=True, order=True, array_like=True):
    """A weight version: the trainer's step, named together with the trainer's generation.

    ``generation`` is drawn anew at each trainer start; ``step`` is the trainer's step. Neither is an order: the order
    is the journal's commit sequence.
    """

    generation: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} (generation {self.generation:x})"


class RoundName(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One attempt: the daemon's epoch and a number that grows within the journal."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}"


Digest = tuple[int, int]
"""Two 64-bit sums (one per seed) of the order-sensitive digest; additive over disjoint boxes, modulo 2**64."""

NO_BYTES: Digest = (0, 0)


def add_digests(*digests: Digest) -> Digest:
    """Sum of digests of disjoint boxes, modulo 2**64."""
    mask = (1 << 64) - 1
    return (sum(d[0] for d in digests) & mask, sum(d[1] for d in digests) & mask)
