"""Who and which: members, versions, rounds, an adapter's tensors. The words are those of docs/protocol.md."""

import re
from typing import Annotated, Final, Literal

import msgspec
from weightsync.orchestrator.protocol.fields import Count, DigestWord, Nonce, Step
from weightsync.orchestrator.protocol.limits import MAX_WORLD
from weightsync.orchestrator.protocol.text import clean

Role = Literal["trainer", "inference"]

IDENTIFIER: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""Names of engines, of runs, and whatever else the settings name: without a slash, which separates a rank from them."""

_identifier = re.compile(IDENTIFIER)


class Member(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One agent's place: a trainer rank (``engine`` is empty) or a rank of an engine. Survives restarts.

    Raises:
        ValueError: a rank that is none, a trainer's with an engine, an engine's without, or with a name that is none.
    """

    role: Role
    engine: str
    rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_WORLD)]

    def __post_init__(self) -> None:
        if not 0 <= self.rank < MAX_WORLD:
            raise ValueError(f"rank {self.rank} is not one from 0 to {MAX_WORLD - 1}")
        if self.role == "trainer":
            if self.engine:
                raise ValueError(f"a trainer rank belongs to no engine, but this one to {clean(self.engine, 100)!r}")
        elif _identifier.fullmatch(self.engine) is None:
            wanted = "1 to 128 letters, digits, '.', '_' and '-', the first one a letter or a digit"
            raise ValueError(f"{clean(self.engine, 200)!r} is no engine's name: use {wanted}")

    def __str__(self) -> str:
        return f"trainer/{self.rank}" if self.role == "trainer" else f"{self.engine}/{self.rank}"


class Version(msgspec.Struct, frozen=True, order=True, array_like=True):
    """A weight version: the trainer's step, named together with the trainer's generation.

    ``generation`` is drawn anew at each trainer start; ``step`` is the trainer's step. Neither is an order: the order
    is the journal's commit sequence.
    """

    generation: Nonce
    step: Step

    def __str__(self) -> str:
        return f"step {self.step} (generation {self.generation})"


class RoundName(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One attempt: the daemon's epoch and a number that grows within the journal."""

    epoch: Count
    number: Count

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}"


Digest = tuple[DigestWord, DigestWord]
"""Two 64-bit sums (one per seed) of the order-sensitive digest; additive over disjoint boxes, modulo 2**64."""

NO_BYTES: Digest = (0, 0)


def add_digests(*digests: Digest) -> Digest:
    """Sum of digests of disjoint boxes, modulo 2**64."""
    mask = (1 << 64) - 1
    return (sum(d[0] for d in digests) & mask, sum(d[1] for d in digests) & mask)


# A LoRA adapter travels as the tensors of peft's adapter_model.safetensors, by their names. Its scaling is no tensor in
# the files, but a line of adapter_config.json; whoever computed with another one would compute with other weights, so
# it travels as one more tensor.
SCALING: Final = "adapter_scaling"
"""Name of that tensor: ``[lora_alpha, use_rslora]`` as float64, use_rslora 0 or 1. Every adapter weight is multiplied
by lora_alpha / rank, or by lora_alpha / √rank where use_rslora is 1."""

SCALING_SHAPE: Final = (2,)
SCALING_DTYPE: Final = "float64"
"""What Python computes with: the quotient must be the one of an engine that read the JSON."""

SAVED_PREFIX: Final = "base_model.model."
"""What peft puts before every module's name in its files."""
