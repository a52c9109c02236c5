"""What the ranks of a publish conclude, each for itself, from what all of them have said."""

from typing import Final

from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.publication import PublishError

COMMITTED: Final = "committed "
FAILED: Final = "failed "
"""How a rank tells the others what it has heard of a version."""


def agreed_start(said: tuple[str, ...]) -> int:
    """The generation, as the first rank has drawn it, of ranks that say the same hub and run behind theirs.

    Raises:
        ReplicaFailed: a rank belongs elsewhere.
    """
    generation, _, first = said[0].partition(" ")
    for rank, text in enumerate(said):
        where = text.partition(" ")[2]
        if where != first:
            raise ReplicaFailed(rank, f"its hub_url and run_id are {where!r}, those of rank 0 are {first!r}")
    return int(generation)


def agreed_staging(said: tuple[str, ...]) -> tuple[int, str]:
    """How often the one step that all ranks give was staged before, and what still reads the first slots in use.

    A rank says the step, how often it was staged, of which ranks without an agent know nothing, and what reads its
    slots, if anything does.

    Raises:
        PublishError: the ranks give different steps.
    """
    words = [text.split(" ", 2) for text in said]
    for rank, (step, *_) in enumerate(words):
        if step != words[0][0]:
            raise PublishError(f"rank {rank} publishes step {step}, rank 0 step {words[0][0]}: give all ranks one step")
    return max(int(times) for _, times, _ in words), next((in_use for *_, in_use in words if in_use), "")


def agreed_end(heard: tuple[str, ...]) -> int:
    """The commit sequence number, if any rank has heard of it: the daemon says so only of what all engines serve.

    Raises:
        PublishError: no rank has, with the first reason.
    """
    numbers = [int(text.removeprefix(COMMITTED)) for text in heard if text.startswith(COMMITTED)]
    if numbers:
        return max(numbers)
    raise PublishError(next((text.removeprefix(FAILED) for text in heard if text), "no rank has an agent"))
