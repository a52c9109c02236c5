"""Which rank of its engine a worker is, from vLLM's parallel configuration and nothing else.

Not from ``device.index`` (each process may see its devices as 0), nor from the data-parallel rank (independent
replicas of a dense model all say 0 of 1): only ``data_parallel_index`` tells those apart.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

from weightsync.agents.errors import AgentError


class RanksError(AgentError):
    """The parallel configuration contradicts itself or what the server says. The configuration's fault; no retry."""


@dataclass(frozen=True, slots=True)
class EngineRanks:
    """A worker's place in its engine: ``rank`` of ``world``, and its coordinates, all counted from 0.

    Independent data-parallel replicas are not told how many they are: their ``world`` and ``dp_size`` are the least
    possible until ``with_world``. ``ep_size`` is 1 unless experts are spread over the ranks.
    """

    rank: int
    world: int
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    pcp_rank: int = 0
    pcp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1

    def with_world(self, world: int) -> Self:
        """These ranks in an engine of ``world`` ranks, as ``GET /get_world_size`` tells it.

        Raises:
            RanksError: ``world`` is no whole number of replicas, or too few for this rank.
        """
        replica = self.tp_size * self.pp_size * self.pcp_size
        if world % replica or world < self.world:
            raise RanksError(f"rank {self.rank} in replicas of {replica} ranks cannot be one of {world} ranks")
        return replace(self, world=world, dp_size=world // replica)


def engine_ranks(parallel_config: Any) -> EngineRanks:
    """The ranks of the worker that owns ``parallel_config`` (vLLM's ``ParallelConfig``, its ``rank`` set).

    Within a replica vLLM orders ranks as pipeline × prefill context × tensor, the last changing fastest; experts are
    spread over data × prefill context × tensor (``vllm.distributed.parallel_state.initialize_model_parallel``).

    Raises:
        RanksError: the sizes and the rank contradict each other.
    """
    tp_size, pp_size = parallel_config.tensor_parallel_size, parallel_config.pipeline_parallel_size
    pcp_size = getattr(parallel_config, "prefill_context_parallel_size", 1)
    replica, local = parallel_config.world_size, parallel_config.rank
    if replica != tp_size * pp_size * pcp_size or not 0 <= local < replica:
        raise RanksError(
            f"rank {local} of a replica of {replica} ranks = {tp_size} tensor × {pp_size} pipeline × {pcp_size} "
            "prefill context parallel"
        )
    dp_rank, dp_size = parallel_config.data_parallel_index, parallel_config.data_parallel_size
    stage = tp_size * pcp_size  # ranks of one pipeline stage
    ep_rank, ep_size = 0, 1
    if getattr(parallel_config, "enable_expert_parallel", False):
        in_step = dp_size > 1  # independent replicas spread their experts over themselves alone
        ep_rank, ep_size = (dp_rank if in_step else 0) * stage + local % stage, dp_size * stage
    return EngineRanks(
        rank=dp_rank * replica + local,
        world=max(dp_size, dp_rank + 1) * replica,
        tp_rank=local % tp_size,
        tp_size=tp_size,
        pp_rank=local // stage,
        pp_size=pp_size,
        pcp_rank=local // tp_size % pcp_size,
        pcp_size=pcp_size,
        dp_rank=dp_rank,
        dp_size=max(dp_size, dp_rank + 1),
        ep_rank=ep_rank,
        ep_size=ep_size,
    )
