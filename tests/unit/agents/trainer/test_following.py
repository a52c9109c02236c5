"""The slots' table from a frame of the protocol, and what ranks compare of needs."""

import pytest
import torch
from weightsync.agents.trainer.errors import UnroutableTensors
from weightsync.agents.trainer.following import FollowedNeeds, dist_rank, fingerprint_number
from weightsync.agents.trainer.slots.slots import ExpertParallel, SlotOptions
from weightsync.orchestrator.protocol.codec import encode
from weightsync.orchestrator.protocol.layout import Tensor
from weightsync.orchestrator.protocol.messages import Needs

STATE = {"w": torch.empty(2, 3), "unused": torch.empty(1)}


def needs(*names: str, fingerprint: str = "ab" * 32) -> Needs:
    tensors = tuple(Tensor(name, "bfloat16", (2, 3)) for name in names)
    return Needs(tensors=tensors, quantized=(), fingerprint=fingerprint)


def followed(options: SlotOptions, forward_dtype: torch.dtype | None = None) -> FollowedNeeds:
    return FollowedNeeds(lambda: STATE, None, forward_dtype, options)


@pytest.mark.parametrize(("given", "through"), [(None, torch.bfloat16), (torch.float16, torch.float16)])
def test_the_table_has_a_route_for_each_needed_tensor(given: torch.dtype | None, through: torch.dtype) -> None:
    (spec,) = followed(SlotOptions(), given).table(encode(needs("w")), STATE).non_layer_specs()
    assert (spec.dst, spec.sources[0].key) == ("w", "w")
    assert (spec.quantization.dtype, spec.quantization.forward_dtype) == (torch.bfloat16, through)


@pytest.mark.parametrize("options", [SlotOptions(pipeline=True), SlotOptions(expert_parallel=ExpertParallel(2, 0))])
def test_only_ranks_that_share_a_model_may_lack_tensors(options: SlotOptions) -> None:
    assert len(tuple(followed(options).table(encode(needs("w", "elsewhere")), STATE).non_layer_specs())) == 1
    with pytest.raises(UnroutableTensors, match="'elsewhere'"):
        followed(SlotOptions()).table(encode(needs("w", "elsewhere")), STATE)


def test_fingerprints_as_numbers_of_a_collective() -> None:
    assert fingerprint_number(None) == 0
    assert fingerprint_number(needs(fingerprint="0" * 64)) == 1
    assert fingerprint_number(needs(fingerprint="f" * 64)) == 16**15 < 2**63
    assert followed(SlotOptions()).made_for == 0


def test_a_process_alone_is_rank_0() -> None:
    assert dist_rank(None) == 0
