"""vLLM's attributes by the facts that the recorder asks for, on objects shaped like its configurations."""

from types import SimpleNamespace

import pytest
from weightsync.agents.vllm.recorder import vllm_names


@pytest.mark.parametrize(
    ("attribute", "is_expert_weight"),
    [("w13_weight", True), ("w2_weight_scale_inv", True), ("weight", False), ("w2", False), ("w1_weight", False)],
)
def test_expert_weights_are_told_by_their_names(attribute: str, is_expert_weight: bool) -> None:
    assert vllm_names.is_expert_weight(attribute) is is_expert_weight


def test_sizes_are_the_checkpoint_s_where_the_configuration_knows_them() -> None:
    parallel = SimpleNamespace(tp_size=4, ep_rank=2)
    sharded = SimpleNamespace(
        hidden_dim=64, intermediate_size_per_partition=24, num_experts=8, num_local_experts=2,
        moe_parallel_config=parallel,
    )  # fmt: skip
    assert vllm_names.hidden_size(sharded) == 64
    assert vllm_names.local_intermediate_size(sharded) == 24
    assert vllm_names.intermediate_size(sharded) == 96
    assert vllm_names.logical_experts(sharded) == 8
    assert vllm_names.local_slots(sharded) == range(4, 6)
    padded = SimpleNamespace(**vars(sharded), hidden_dim_unpadded=60, intermediate_size=90, num_logical_experts=6)
    assert vllm_names.hidden_size(padded) == 60
    assert vllm_names.intermediate_size(padded) == 90
    assert vllm_names.logical_experts(padded) == 6


@pytest.mark.parametrize(
    ("more", "padded"),
    [
        ({}, False),
        ({"hidden_dim_unpadded": 64, "intermediate_size_per_partition_unpadded": None}, False),
        ({"hidden_dim_unpadded": 60}, True),
        ({"intermediate_size_per_partition_unpadded": 20}, True),
        ({"tp_shard_with_padding": True}, True),
    ],
)
def test_padding_is_a_size_that_differs_from_the_unpadded_one(more: dict[str, object], padded: bool) -> None:
    config = SimpleNamespace(hidden_dim=64, intermediate_size_per_partition=24, **more)
    assert vllm_names.is_padded(config) is padded


def test_layers_without_experts_or_vocabulary_have_neither() -> None:
    config = SimpleNamespace()
    assert vllm_names.moe_config_of(SimpleNamespace()) is None
    assert vllm_names.moe_config_of(SimpleNamespace(moe_config=None, moe=config)) is config
    assert vllm_names.moe_config_of(SimpleNamespace(moe_config=config)) is config
    assert vllm_names.quant_method_of(SimpleNamespace()) is None
    assert vllm_names.vocabulary_rows(SimpleNamespace()) is None
    assert vllm_names.vocabulary_rows(SimpleNamespace(org_vocab_size=151_936)) == 151_936
