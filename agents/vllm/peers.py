"""What the ranks that step together decide together while vLLM starts: each of its workers makes its agent then."""

from typing import Any, Self

import torch


class CoreRanks:
    """See ``inference.landing.Peers``. Replicas of a dense model are engine cores of their own and not among them.

    Args:
        group: vLLM's group of all these ranks (``vllm.distributed.parallel_state``); None: there is only this one.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.count: int = 1 if group is None else group.world_size

    @classmethod
    def here(cls) -> Self:
        """Those of this worker."""
        from vllm.distributed.parallel_state import get_world_group

        try:
            return cls(get_world_group())
        except AssertionError:  # no group was made in this process
            return cls()

    def least(self, value: int) -> int:
        """The least that one of them says; over the host's network, so that no device is touched."""
        if self.count == 1:
            return value
        told = torch.tensor([value])
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MIN, self._group.cpu_group)
        return int(told)
