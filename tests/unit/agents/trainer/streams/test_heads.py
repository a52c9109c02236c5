"""Heads in streams to engines that are configured as tied: the embedding under another name passes, another one not."""

import pytest
import torch
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.streams.stream import StreamSlots
from weightsync.agents.trainer.streams.streamed import StreamedTensor, StreamError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CAST = QuantizationSpec(torch.bfloat16)


def passed(head, treatments, metadata=None):
    embed = torch.linspace(0, 1, 24).view(6, 4)
    pairs = {EMBED: embed, HEAD: embed.clone() if head is None else head, "model.norm.weight": torch.ones(4)}
    slots = StreamSlots(metadata, treatments=treatments)
    slots.fill(pairs.items())
    slots.fill(reversed(pairs.items()))
    return slots


ROUNDED = torch.linspace(0, 1, 24).view(6, 4) * (1 + 1e-6)


@pytest.mark.parametrize("head", [None, ROUNDED], ids=["tied", "same when rounded"])
def test_the_embedding_under_another_name_passes(head):
    assert passed(head, {EMBED: CAST, "model.norm.weight": CAST}).complete


@pytest.mark.parametrize("head", [torch.zeros(6, 4), torch.ones(5, 4)], ids=["other values", "another shape"])
def test_a_head_of_its_own_is_lost_on_engines_that_tie(head):
    with pytest.raises(
        StreamError, match=r"'lm_head\.weight' is needed by no engine .*tie_word_embeddings.*leave it out"
    ):
        passed(head, {EMBED: CAST, "model.norm.weight": CAST})
    assert passed(head, {EMBED: CAST, HEAD: CAST}).complete, "engines have it"
    assert passed(head, {}).complete, "nothing is known of engines"


def test_each_rank_compares_its_own_pieces():
    shapes = {EMBED: (12, 4), HEAD: (12, 4), "model.norm.weight": (8,)}
    metadata = [StreamedTensor(n, torch.float32, s, owners=(0, 1), placements=(0,)) for n, s in shapes.items()]
    assert passed(None, {EMBED: CAST}, metadata).complete
    with pytest.raises(StreamError, match="is needed by no engine"):
        passed(torch.zeros(6, 4), {EMBED: CAST}, metadata)
