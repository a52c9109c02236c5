"""What the ranks of an engine core agree on. Two real ranks over gloo."""

import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from weightsync.agents.vllm.peers import CoreRanks


def test_one_rank_decides_alone() -> None:
    assert (CoreRanks().count, CoreRanks().least(3)) == (1, 3)
    assert CoreRanks.here().count == 1, "no group was made in this process"


def test_ranks_agree_on_the_least(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    said: dict[int, list[int]] = {}

    def rank(number: int) -> None:
        group = torch.distributed.ProcessGroupGloo(store, number, 2)
        ranks = CoreRanks(SimpleNamespace(world_size=2, cpu_group=group))
        assert ranks.count == 2
        said[number] = [
            ranks.least(value) for value in ((1, 1), (1, 0), (0, 1)) for value in value[number : number + 1]
        ]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert said == {0: [1, 0, 0], 1: [1, 0, 0]}
