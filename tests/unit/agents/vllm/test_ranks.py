"""Ranks from the parallel configuration, as vLLM orders them."""

from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm.ranks import RanksError, engine_ranks


def parallel(rank: int = 0, tp: int = 1, pp: int = 1, pcp: int = 1, dp: int = 1, index: int = 0, **more: Any) -> Any:
    return SimpleNamespace(
        rank=rank,
        world_size=tp * pp * pcp,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        prefill_context_parallel_size=pcp,
        data_parallel_size=dp,
        data_parallel_index=index,
        **more,
    )


def test_alone() -> None:
    ranks = engine_ranks(parallel())
    assert (ranks.rank, ranks.world, ranks.tp_size, ranks.pp_size, ranks.dp_size, ranks.ep_size) == (0, 1, 1, 1, 1, 1)


def test_tensor_parallel_changes_fastest() -> None:
    found = [engine_ranks(parallel(rank, tp=2, pp=2)) for rank in range(4)]
    assert [(ranks.pp_rank, ranks.tp_rank) for ranks in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [ranks.rank for ranks in found] == [0, 1, 2, 3]
    assert {ranks.world for ranks in found} == {4}


def test_prefill_context_lies_between_pipeline_and_tensor() -> None:
    found = [engine_ranks(parallel(rank, tp=2, pp=2, pcp=2)) for rank in range(8)]
    assert [(r.pp_rank, r.pcp_rank, r.tp_rank) for r in found] == [
        (pp, pcp, tp) for pp in (0, 1) for pcp in (0, 1) for tp in (0, 1)
    ]


def test_replicas_of_a_dense_model_differ_although_each_says_that_it_is_alone() -> None:
    found = [engine_ranks(parallel(rank, tp=2, index=index)).with_world(6) for index in range(3) for rank in (0, 1)]
    assert [ranks.rank for ranks in found] == [0, 1, 2, 3, 4, 5]
    assert {(ranks.world, ranks.dp_size) for ranks in found} == {(6, 3)}


def test_replicas_of_a_dense_model_spread_experts_over_themselves_alone() -> None:
    ranks = engine_ranks(parallel(1, tp=2, index=1, enable_expert_parallel=True))
    assert (ranks.ep_rank, ranks.ep_size) == (1, 2)


def test_experts_are_spread_over_data_and_tensor_parallelism() -> None:
    found = [
        engine_ranks(parallel(rank, tp=2, dp=2, index=index, enable_expert_parallel=True))
        for index in (0, 1)
        for rank in (0, 1)
    ]
    assert [(ranks.rank, ranks.ep_rank, ranks.ep_size, ranks.world) for ranks in found] == [
        (i, i, 4, 4) for i in range(4)
    ]


def test_pipeline_stages_have_expert_groups_of_their_own() -> None:
    found = [engine_ranks(parallel(rank, tp=2, pp=2, enable_expert_parallel=True)) for rank in range(4)]
    assert [(ranks.ep_rank, ranks.ep_size) for ranks in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]


def test_without_expert_parallelism_each_rank_has_all_experts() -> None:
    ranks = engine_ranks(parallel(1, tp=2, dp=2, index=1, enable_expert_parallel=False))
    assert (ranks.ep_rank, ranks.ep_size) == (0, 1)


def test_the_device_is_not_asked() -> None:
    assert engine_ranks(parallel(1, tp=2, device=SimpleNamespace(index=0))).rank == 1


@pytest.mark.parametrize(
    "config", [parallel(2, tp=2), parallel(-1), SimpleNamespace(**{**vars(parallel()), "world_size": 3})]
)
def test_contradictions_are_errors(config: Any) -> None:
    with pytest.raises(RanksError):
        engine_ranks(config)


@pytest.mark.parametrize("world", [0, 3, 2])
def test_a_world_that_cannot_be_is_an_error(world: int) -> None:
    with pytest.raises(RanksError):
        engine_ranks(parallel(0, tp=2, index=1)).with_world(world)
