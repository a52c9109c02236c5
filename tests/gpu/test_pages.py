"""Weights in pages on a real GPU: moved, accounted for to the byte, flipped under a captured graph, refused by name.

Each test has a process of its own, because pages stay for as long as their process.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

BEGIN = """
import gc, json, torch
from weightsync.agents.memory.errors import FlipFailed, PagesTorn, PagesUnavailable, StandbyLost, StandbyMissing
from weightsync.agents.memory.pages import paged
from weightsync.agents.memory.pages.driver import CudaMemory, DriverError
from weightsync.agents.memory.pages.paged import into_pages
GPU, MIB = torch.device("cuda", 0), 1 << 20
torch.manual_seed(3)
SHAPES = [(2048, 4096), (6144, 4096), (777, 3001), (4096,), (1 << 20, ), ((1 << 20) + 5,), *[(1024, 3072)] * 20, *[(128,)] * 50]
weights = [torch.randn(shape, device=GPU).to(torch.bfloat16) for shape in SHAPES]

def whole(tensor):
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))

def free():
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(GPU)[0]

def totals(tensors):
    return [float(tensor.view(torch.uint8).sum(dtype=torch.float64)) for tensor in tensors]
"""  # noqa: E501


def run(code: str, **environment: str) -> Any:
    """What the last line that ``code`` prints says, as JSON."""
    command = [sys.executable, "-X", "faulthandler", "-c", BEGIN + code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


MOVED = """
views, parameter = [w.reshape(-1)[3:] for w in weights], torch.nn.Parameter(weights[0], requires_grad=False)
nothing = torch.zeros(1, device=GPU)
memory, values, before = CudaMemory(GPU), totals(weights), free()
reserved = torch.cuda.memory_reserved(GPU)
pages = into_pages([whole(w) for w in weights])
served = [whole(w) for w in weights]
told = dict(
    inside=all(pages.covers(t) for t in served), values=totals(weights) == values,
    views=all(v.data_ptr() == w.data_ptr() + 6 for v, w in zip(views, weights)) and parameter.data_ptr() == weights[0].data_ptr(),
    standby=totals(pages.standby_of(served)) == values, weights=sum(t.numel() for t in served), bytes=pages.bytes,
    taken=before - free(), torch=torch.cuda.memory_reserved(GPU) - reserved, aligned=all(t.data_ptr() % 512 == 0 for t in served),
)
print(json.dumps(told))
"""  # noqa: E501


@pytest.mark.parametrize("allocator", ["", "expandable_segments:True"])
def test_every_storage_moves_with_all_of_its_views_and_each_byte_is_accounted_for(allocator: str) -> None:
    told = run(MOVED, PYTORCH_CUDA_ALLOC_CONF=allocator)
    facts = {name: told[name] for name in ("inside", "values", "views", "standby", "aligned")}
    assert all(facts.values()), facts
    one_set = told["bytes"] // 2
    assert told["weights"] <= one_set <= told["weights"] + (8 << 20), "what torch's allocator rounds up"
    # Torch's statistics know the set that is served; the other one is known to the driver alone.
    assert told["taken"] == one_set + told["torch"]
    assert told["torch"] <= one_set - told["weights"], "what the weights had until then went back"


def test_an_allocator_that_cuts_nothing_is_refused_by_its_option() -> None:
    code = """
addresses = [w.data_ptr() for w in weights]
try:
    into_pages([whole(w) for w in weights])
except PagesUnavailable as error:
    print(json.dumps([str(error), [w.data_ptr() for w in weights] == addresses]))
"""
    text, unmoved = run(code, PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")
    assert "max_split_size_mb" in text
    assert unmoved


FLIPPED = """
pages = into_pages([whole(w) for w in weights], chunk_bytes=int(CHUNK) * MIB)
served = [whole(w) for w in weights]
standby, x = pages.standby_of(served), torch.randn(8, 4096, device=GPU, dtype=torch.bfloat16)
out = torch.empty(8, 6144, device=GPU, dtype=torch.bfloat16)
compute = lambda: torch.mm(x, weights[1].t(), out=out)
aside = torch.cuda.Stream()
with torch.cuda.stream(aside):
    compute()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    compute()

def answer():
    graph.replay()
    torch.cuda.synchronize()
    return out.clone()

old, fresh = answer(), weights[1] + 1.0
standby[1].view(torch.bfloat16).view(6144, 4096).copy_(fresh)
torch.cuda.synchronize()
unmoved = torch.equal(answer(), old)
pages.flip()
compute()  # an engine serves on while standby gets its pages
pages.settle()
new = answer()
expected = torch.mm(x, fresh.t())
said = dict(unmoved=unmoved, changed=not torch.equal(old, new), new=torch.equal(new, expected), others=torch.equal(served[0], standby[0]))
for _ in range(6):
    pages.flip()
said |= dict(even=torch.equal(answer(), new))
pages.flip()
said |= dict(back=torch.equal(answer(), old))
# A kernel that is still running when the flip begins ends with the memory that it began with.
for _ in range(40):
    compute()
pages.flip()
torch.cuda.synchronize()
said |= dict(waited=torch.equal(out, old))
print(json.dumps(said))
"""  # noqa: E501


@pytest.mark.parametrize("chunk_mib", [2, 64, 4096])
def test_a_captured_graph_sees_the_other_set_and_after_another_flip_the_first(chunk_mib: int) -> None:
    assert set(run(f"CHUNK = {chunk_mib}" + FLIPPED).values()) == {True}


FULL = """
needed, room = sum(w.numel() * 2 for w in weights), torch.cuda.mem_get_info(GPU)[0]
filler = torch.empty(room - needed // 2, dtype=torch.uint8, device=GPU)
addresses = [w.data_ptr() for w in weights]
try:
    into_pages([whole(w) for w in weights])
except PagesUnavailable as error:
    print(json.dumps([str(error), [w.data_ptr() for w in weights] == addresses]))
"""


def test_no_room_for_a_second_set_is_known_before_anything_moves() -> None:
    text, unmoved = run(FULL)
    assert "needs as much memory again" in text
    assert unmoved


REFUSED = """
class Refusing(CudaMemory):
    calls = 0
    refused = range(0)
    def _call(self, name, *arguments):
        if name in ("cuMemCreate", "cuMemMap", "cuMemUnmap", "cuMemSetAccess"):
            self.calls += 1
            if self.calls - 1 in self.refused:
                raise DriverError(name, "CUDA_ERROR_UNKNOWN")
        return super()._call(name, *arguments)

totals(weights)
memory, before, reserved = Refusing(GPU), free(), torch.cuda.memory_reserved(GPU)
memory.refused = range(1, 2)
try:
    into_pages([whole(w) for w in weights], memory, chunk_bytes=64 * MIB)
except PagesUnavailable as error:
    first = str(error)
left = dict(memory=before - free(), reserved=torch.cuda.memory_reserved(GPU) - reserved)
memory.refused, values = range(0), totals(weights)
pages = into_pages([whole(w) for w in weights], memory, chunk_bytes=64 * MIB)
served = [whole(w) for w in weights]
standby = pages.standby_of(served)
for tensor in standby:
    tensor.fill_(1)
ones = totals(standby)
memory.calls = 0
pages.flip()
calls = memory.calls
flipped = totals(weights) == ones
memory.calls, memory.refused = 0, range(1, 2)
try:
    pages.settle()
except StandbyLost as error:
    lost = str(error)
lost = dict(text=lost, served=totals(weights) == ones)
memory.refused = range(0)
pages.settle()
lost |= dict(again=totals(standby) == values)
pages.flip()
pages.settle()
kept = []
for number in range(calls):
    memory.calls, memory.refused = 0, range(number, number + 1)
    try:
        pages.flip()
    except FlipFailed:
        kept.append(totals(weights) == values and totals(standby) == ones)
memory.calls, memory.refused = 0, range(calls // 2 + 1, calls * 10)
try:
    pages.flip()
except PagesTorn as error:
    torn = str(error)
print(json.dumps(dict(first=first, left=left, flipped=flipped, calls=calls, kept=kept, torn=torn, lost=lost)))
"""


def test_whatever_call_the_driver_refuses_one_set_stays_mapped_whole_or_the_error_says_torn() -> None:
    told = run(REFUSED)
    assert "cuMemCreate: CUDA_ERROR_UNKNOWN" in told["first"]
    assert told["left"] == {"memory": 0, "reserved": 0}, "what was begun is undone"
    assert told["flipped"]
    assert told["kept"] == [True] * told["calls"]
    assert "restart the engine" in told["torn"]
    assert "what is served is whole" in told["lost"].pop("text")
    assert told["lost"] == {"served": True, "again": True}


def test_weights_on_the_host_or_on_two_devices_are_refused() -> None:
    code = """
said = []
for tensors in ([torch.zeros(8)], [torch.zeros(8), torch.zeros(8, device=GPU)]):
    try:
        into_pages([whole(t) for t in tensors])
    except PagesUnavailable as error:
        said.append(str(error))
print(json.dumps(said))
"""
    host, both = run(code)
    assert "weights on cpu cannot lie in pages" in host
    assert "lie on cpu, cuda:0" in both
