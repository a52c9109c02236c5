"""Ranks as threads of this process, reference weights, and a reader of layouts that shares nothing with the slots."""

import logging
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg
from weightsync.agents import turns
from weightsync.agents.trainer.slots import TrainerSlots
from weightsync.orchestrator.protocol.layout import ROW_BOX
from weightsync.orchestrator.protocol.limits import MAX_RANK

T = TypeVar("T")
InRanks = Callable[[int, Callable[[int], T]], list[T]]


@pytest.fixture(autouse=True)
def one_thread_per_operator() -> Iterator[None]:
    """Ranks are threads already, and tiny tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_turns() -> Iterator[None]:
    """Threads take turns as Python has it: what tests before have left behind on other threads is over."""
    ends = time.monotonic() + 20.0
    while turns._short_turns._users:
        assert time.monotonic() < ends, "a thread of another test still takes quick turns"
        time.sleep(0.001)
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def in_ranks() -> Iterator[InRanks[Any]]:
    """``in_ranks(world, body)``: ``body(rank)`` in ``world`` threads that form a torch.distributed world."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()

    def run(world: int, body: Callable[[int], T]) -> list[T]:
        store, results, errors = dist.HashStore(), {}, {}

        def rank_main(rank: int) -> None:
            try:
                dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
                results[rank] = body(rank)
            except BaseException as error:
                errors[rank] = error

        threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if errors:
            raise errors[min(errors)]
        assert len(results) == world, "a rank did not return"
        return [results[rank] for rank in range(world)]

    yield run
    _uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)


class Weights:
    """Reference values: a function of a tensor's name and shape, the same in every rank. Not to be written to."""

    @lru_cache(maxsize=200)  # noqa: B019  (one object, for the session)
    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator)

    def state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Full float32 masters."""
        return {name: self(name, *shape) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def weights() -> Weights:
    return Weights()


Assemble = Callable[[Sequence[TrainerSlots]], dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def assemble() -> Assemble:
    """Full logical tensors from the layouts and arenas of some ranks; every byte must be there, replicas equal."""

    def read(ranks: Sequence[TrainerSlots]) -> dict[str, torch.Tensor]:
        whole: dict[str, torch.Tensor] = {}
        seen: dict[str, torch.Tensor] = {}
        for slots in ranks:
            for line in np.asarray(slots.layout.matrix()).tolist():
                tensor = slots.layout.tensors[line[0]]
                dtype = getattr(torch, tensor.dtype)
                rank = len(tensor.shape)
                dims = [line[ROW_BOX + 3 * d : ROW_BOX + 3 * d + 3] for d in range(MAX_RANK)][MAX_RANK - rank :]
                region = slots.arenas[line[1]][line[2] :]
                region = region[: region.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
                box = torch.as_strided(region, [d[1] for d in dims], [d[2] // dtype.itemsize for d in dims])
                place = tuple(slice(d[0], d[0] + d[1]) for d in dims)
                full = whole.setdefault(tensor.name, torch.zeros(tensor.shape, dtype=dtype))
                known = seen.setdefault(tensor.name, torch.zeros(tensor.shape, dtype=torch.bool))
                mine, theirs = (part.flatten().view(torch.uint8) for part in (box, full[place]))
                old = known[place].flatten().repeat_interleave(dtype.itemsize)
                assert torch.equal(mine[old], theirs[old]), f"replicas of {tensor.name} differ"
                full[place] = box
                known[place] = True
        gaps = [name for name, mask in seen.items() if not mask.all()]
        assert not gaps, f"not covered: {gaps}"
        return whole

    return read


@pytest.fixture(scope="session")
def fp8_reference() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Values and scales of a float32 matrix whose forward is bfloat16, block by block in plain loops."""

    def quantise(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        forward = master.to(torch.bfloat16).float()
        rows, columns = forward.shape
        values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // 128), -(-columns // 128))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
                scale = (forward[block].abs().max() / 448).clamp(min=1e-12)
                scales[i, j] = scale
                values[block] = (forward[block] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return values, scales

    return quantise
