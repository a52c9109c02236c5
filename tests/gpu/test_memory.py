"""Arenas on a real GPU, in processes that keep expandable segments on: plain, registrable, and reached by NIXL."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from weightsync.agents.memory import nic
from weightsync.agents.memory.arena import arena, host_arena, region_of
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.memory.reach import check_reachable
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.messages import NixlSettings

pytestmark = pytest.mark.gpu

PATIENCE = 60.0
GPU = torch.device("cuda", 0)
EXPANDABLE = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def run_expandable(code: str) -> str:
    """Run code in a process whose torch uses expandable segments."""
    done = subprocess.run([sys.executable, "-c", code], env=EXPANDABLE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_arenas_are_plain_where_everything_else_is_expandable() -> None:
    code = """
import torch
from weightsync.agents.memory.arena import arena, region_of
from weightsync.agents.memory.cuda import Pointer
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.memory.reach import check_reachable
gpu = torch.device("cuda", 0)
plain = [arena(size, gpu) for size in (1, 1 << 20, 3 << 20, 64 << 20)]
assert all(part.data_ptr() % (2 << 20) == 0 for part in plain)
check_reachable(region_of(part) for part in plain)
ordinary = torch.empty(64 << 20, dtype=torch.uint8, device=gpu)
try:
    check_reachable([region_of(ordinary)])
except MemoryPlacementError as error:
    assert "expandable_segments" in str(error), error
else:
    raise AssertionError("expandable memory was accepted")
after = torch.empty(32 << 20, dtype=torch.uint8, device=gpu)
assert not Pointer(after.data_ptr()).legacy_ipc, "torch's own memory stays expandable"
print(torch.cuda.memory_allocated() == 96 << 20)
"""
    assert run_expandable(code) == "True"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_arena_of_one_gpu_takes_nothing_of_another() -> None:
    """In a thread for which the first GPU is current, as it is in every new one; a context there is half a gigabyte."""
    code = """
import threading
import torch
from weightsync.agents.memory.arena import arena
def use():
    memory = arena(64 << 20, torch.device("cuda", 1))
    memory.fill_(7)
    assert int(memory[-1]) == 7
for _ in range(2):
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""
    assert run_expandable(code) == "False True"


def test_a_freed_arena_is_free_memory_again_to_the_byte() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(GPU)[0]
    first = arena(64 << 20, GPU)
    view = first[5:]
    del first
    assert torch.cuda.mem_get_info(GPU)[0] == before - (64 << 20)
    del view
    assert torch.cuda.mem_get_info(GPU)[0] == before


def test_an_arena_takes_what_torch_has_cached() -> None:
    code = """
import torch
from weightsync.agents.memory.arena import arena
gpu = torch.device("cuda", 0)
most = torch.cuda.mem_get_info()[0] - (512 << 20)
kept = torch.empty(most, dtype=torch.uint8, device=gpu)
del kept
print(arena(most, gpu).numel() == most)
"""
    assert run_expandable(code) == "True"


def test_a_process_with_arenas_ends_in_order() -> None:
    code = "import torch; from weightsync.agents.memory.arena import arena, host_arena;"
    code += "kept = arena(1 << 20, torch.device('cuda', 0)); host = host_arena(1 << 20); print('ended')"
    assert run_expandable(code) == "ended"


def test_no_room_is_an_error_of_ours() -> None:
    with pytest.raises(MemoryPlacementError, match="no room"):
        arena(1 << 50, GPU)
    assert int(torch.ones(8, device=GPU).sum()) == 8, "the next call does not hear of it"


def test_host_arenas_are_pinned_and_copy_at_once() -> None:
    torch.zeros(1, device=GPU)  # torch asks the device what is pinned
    host = host_arena(8 << 20)
    assert host.is_pinned()
    host.fill_(5)
    assert int(host.to(GPU, non_blocking=True).sum(dtype=torch.int64)) == 5 * (8 << 20)
    check_reachable([region_of(host)])


def test_device_memory_of_another_kind_is_refused() -> None:
    memory = arena(4096, GPU)
    beyond = Region(memory.data_ptr(), 1 << 45, "VRAM", 0)
    with pytest.raises(MemoryPlacementError, match="leaves it"):
        check_reachable([beyond])
    host = host_arena(4096)
    with pytest.raises(MemoryPlacementError, match="host or managed"):
        check_reachable([Region(host.data_ptr(), 4096, "VRAM", 0)])


def test_the_machines_gpus_are_those_that_torch_sees() -> None:
    gpus = nic.all_gpus()
    if not gpus:
        pytest.skip("neither NVML's Python package nor the driver's proc files are here")
    assert f"GPU-{torch.cuda.get_device_properties(0).uuid}" in [gpu.uuid for gpu in gpus]


TARGET = """
import hashlib, json, select, sys, torch
from weightsync.agents.memory.arena import arena, region_of
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.messages import NixlSettings
memory = arena(int(sys.argv[1]), torch.device("cuda", 0))
memory.zero_()
torch.cuda.synchronize()
endpoint = NixlEndpoint("target", NixlSettings())
endpoint.register([region_of(memory)])
print(json.dumps([endpoint.name, endpoint.metadata().hex(), memory.data_ptr()]), flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    endpoint.poll()
print(hashlib.sha256(memory.cpu().numpy().tobytes()).hexdigest(), flush=True)
sys.stdin.readline()
endpoint.close()
"""


SIZE = 5_000_003


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[str]]:
    """A target with SIZE bytes of GPU arena."""
    command = [sys.executable, "-c", TARGET, str(SIZE)]
    with subprocess.Popen(command, env=EXPANDABLE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("place", ["VRAM", "DRAM"])
async def test_odd_runs_reach_another_process(place: str, other_process: subprocess.Popen[str]) -> None:
    """From a GPU arena and from a pinned one into a GPU arena that lies beside expandable segments."""
    assert other_process.stdin is not None
    assert other_process.stdout is not None
    pieces = 700
    cuts = np.sort(np.random.default_rng(3).choice(np.arange(1, SIZE), pieces - 1, replace=False))
    begin, end = np.concatenate([[0], cuts]), np.concatenate([cuts, [SIZE]])
    runs = np.stack([begin * 0, begin * 0, begin, begin * 0, SIZE - end, end - begin], axis=1)
    memory = arena(SIZE, GPU) if place == "VRAM" else host_arena(SIZE)
    memory.random_(0, 256)
    torch.cuda.synchronize()
    sent = memory.cpu().numpy()
    expected = np.concatenate([sent[b:e] for b, e in zip(begin[::-1], end[::-1], strict=True)])
    writer = NixlEndpoint("writer", NixlSettings())
    writer.register([region_of(memory)])
    name, card, base = json.loads(other_process.stdout.readline())
    writer.connect(name, bytes.fromhex(card))
    edge = writer.prepare_edge(name, [region_of(memory)], [Region(base, SIZE, "VRAM", 0)], runs, chunk_bytes=1 << 20)
    async with asyncio.timeout(PATIENCE):
        while not writer.warm(name):  # noqa: ASYNC110  (NIXL has no event)
            await asyncio.sleep(0.001)
    [result] = await writer.write([edge], deadline_seconds=PATIENCE)
    assert result.error is None
    other_process.stdin.write("done\n")
    other_process.stdin.flush()
    assert other_process.stdout.readline().strip() == hashlib.sha256(expected.tobytes()).hexdigest()
    writer.close()


def test_importing_the_agents_makes_libcudart_global() -> None:
    code = "import ctypes, weightsync.agents; version = ctypes.c_int();"
    code += "ctypes.CDLL(None).cudaRuntimeGetVersion(ctypes.byref(version)); print(version.value)"
    assert int(run_expandable(code)) >= 12000
