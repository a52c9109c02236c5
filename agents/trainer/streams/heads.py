"""An output head that passes in a stream and that no engine needs: it must be the embedding, or it is lost."""

from collections.abc import Collection, Mapping

import torch
from weightsync.agents.trainer.slots.slot import Slot
from weightsync.agents.trainer.sources.unread import HEAD
from weightsync.agents.trainer.streams.streamed import StreamError


def refuse_lost_head(slots: Mapping[str, Slot], needed: Collection[str]) -> None:
    """That a head beside ``needed`` holds what some needed tensor does. Waits for the device if there is such a head.

    Args:
        slots: filled, by name.
        needed: names; if empty, nothing is known of what engines need.

    Raises:
        StreamError: a head that differs from all, which engines that are configured as tied would not have.
    """
    lost = [name for name in slots if needed and name not in needed and HEAD.search(name)]
    for name in lost:
        head = slots[name]
        if head.moves and not any(_same(head, slots[other]) for other in needed if other in slots):
            raise StreamError(
                f"tensor {name!r} is needed by no engine and differs from every tensor that is: a model that is"
                " configured as tied (tie_word_embeddings) has an untied head; leave it out if that is meant so"
            )


def _same(head: Slot, other: Slot) -> bool:
    """Whether this rank's pieces of both are the same boxes and values, as the other one travels."""
    if (
        head.route.shape != other.route.shape
        or head.route.pieces != other.route.pieces
        or other.moves[0].scale_out is not None
    ):
        return False
    pairs = zip(head.moves, other.moves, strict=True)
    return all(torch.equal(own.out.to(theirs.out.dtype), theirs.out) for own, theirs in pairs)
