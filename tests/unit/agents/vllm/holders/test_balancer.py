"""vLLM's own asynchronous load balancer, on the CPU: a round in the middle of its work, with and without a drain.

The balancer's state, its background thread, its copies and its drain are vLLM's. Replaced are device events, which
torch does not have on a CPU, and the parallel groups: one rank, over a process group of torch's own.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from weightsync.agents.vllm.holders import balancer

eplb_state = pytest.importorskip("vllm.distributed.eplb.eplb_state")
async_worker = pytest.importorskip("vllm.distributed.eplb.async_worker")
eplb_utils = pytest.importorskip("vllm.distributed.eplb.eplb_utils")

EXPERTS, LAYERS = 4, 3
SWAPPED = torch.tensor([[1, 0, 2, 3]] * LAYERS)
WAIT = 10.0


class Event:
    """torch.Event of a CPU: everything queued before has run."""

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


class Policy:
    """Swaps the experts in the first two slots of each layer."""

    @staticmethod
    def rebalance_experts(*_: Any) -> torch.Tensor:
        return SWAPPED


class Communicator:
    """Between ranks nothing moves: there is one."""

    def set_stream(self, stream: Any) -> None: ...

    def set_transfer_context(self, old: Any, layer: int) -> None: ...

    def execute(self) -> None: ...


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield SimpleNamespace(device_group=dist.group.WORLD, cpu_group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def state(group: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A balancer of one model with three layers of four experts, its thread waiting for work."""
    original = eplb_state.EplbState.__init__
    monkeypatch.setattr(eplb_state.EplbState, "__init__", original)  # undone afterwards, whoever replaces it
    monkeypatch.setattr(balancer, "_balancers", [])
    monkeypatch.setattr(torch, "Event", Event)
    for module in (eplb_state, async_worker):
        monkeypatch.setattr(module, "get_eplb_group", lambda: group)
    monkeypatch.setattr(eplb_state, "get_ep_group", lambda: group)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_ep_group", lambda: group)
    balancer.install()
    balancer.install()
    parallel = SimpleNamespace(eplb_config=SimpleNamespace(migration_batching_enabled=False, use_async=True))
    state = eplb_state.EplbState(parallel, torch.device("cpu"))
    state.is_async, state.policy = True, Policy
    state.model_states["tiny"] = model_state()
    yield state
    if state.async_worker is not None and state.async_worker.is_alive():
        balancer.drain(WAIT)  # its thread then waits for work, and no longer for a group that ends here


def model_state() -> Any:
    identity = torch.arange(EXPERTS).repeat(LAYERS, 1)
    weights = [[version_of(1, layer)] for layer in range(LAYERS)]
    return eplb_state.EplbModelState(
        physical_to_logical_map=identity.clone(),
        physical_to_logical_map_buffer=identity.clone(),
        logical_to_physical_map=identity.clone().unsqueeze(-1),
        logical_replica_count=torch.ones(LAYERS, EXPERTS, dtype=torch.int64),
        expert_load_pass=torch.zeros(LAYERS, EXPERTS),
        expert_load_pass_buffer=torch.zeros(LAYERS, EXPERTS),
        expert_load_window=torch.zeros(1, LAYERS, EXPERTS),
        last_expert_load=torch.ones(LAYERS, EXPERTS),
        model_name="tiny",
        model=SimpleNamespace(num_moe_layers=LAYERS, expert_weights=weights),
        expert_buffer=[torch.empty(EXPERTS, 2)],
        rebalanced=False,
        eplb_stats=None,
        device_index=None,
        communicator=Communicator(),
    )


def version_of(version: int, layer: int) -> torch.Tensor:
    """(experts, 2) float32: expert e of the layer is 100·version + 10·layer + e."""
    return (100 * version + 10 * layer + torch.arange(EXPERTS, dtype=torch.float32)).repeat(2, 1).T.contiguous()


def write_version(state: Any, version: int) -> None:
    """What a round does: each slot gets the new weights of the expert that the map says it holds."""
    model = state.model_states["tiny"]
    for layer in range(LAYERS):
        model.model.expert_weights[layer][0].copy_(version_of(version, layer)[model.physical_to_logical_map[layer]])


def begin_rearrangement(state: Any) -> None:
    """As ``EplbState.rearrange`` does at the end of a step; the thread is vLLM's loop on a CPU stream."""
    model = state.model_states["tiny"]
    model.eplb_stats = SimpleNamespace(
        global_expert_load_window=torch.zeros(LAYERS, EXPERTS), num_replicas=4, num_groups=1, num_nodes=1, num_gpus=1
    )
    model.rebalanced = True
    if state.async_worker is None:
        stream = SimpleNamespace(synchronize=lambda: None)
        loop = lambda: async_worker.transfer_run_periodically(state, stream)  # noqa: E731
        state.async_worker = threading.Thread(target=loop, daemon=True)
        state.async_worker.start()
    state.rearrange_event.record()


@pytest.fixture(autouse=True)
def _no_device_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("async_worker", "rebalance_execute"):
        monkeypatch.setattr(f"vllm.distributed.eplb.{module}.device_stream", lambda stream: _Nothing(), raising=False)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def until_pending(state: Any) -> None:
    ready = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        if state.model_states["tiny"].pending_result is not None:
            return
        ready.wait(0.01)
    raise AssertionError("the thread has copied nothing")


def step(state: Any) -> None:
    """The part of ``EplbState.step`` that moves what the thread has copied."""
    model = state.model_states["tiny"]
    if model.rebalanced and state._all_ranks_result_ready(model):
        eplb_state._move_to_workspace(model_state=model, ep_rank=0)


def stale(state: Any, version: int) -> list[tuple[int, int]]:
    """(layer, slot) of every expert that does not hold the version that the map promises."""
    model = state.model_states["tiny"]
    return [
        (layer, slot)
        for layer in range(LAYERS)
        for slot in range(EXPERTS)
        if not torch.equal(
            model.model.expert_weights[layer][0][slot],
            version_of(version, layer)[model.physical_to_logical_map[layer][slot]],
        )
    ]


def test_without_a_drain_old_experts_come_back_after_a_commit(state: Any) -> None:
    """The fault itself, so that the next test is known to be able to fail."""
    begin_rearrangement(state)
    until_pending(state)
    write_version(state, 2)
    assert stale(state, 2) == []
    step(state)
    assert stale(state, 2) == [(0, 0), (0, 1)]


def test_after_a_drain_nothing_old_comes_back(state: Any) -> None:
    begin_rearrangement(state)
    until_pending(state)
    balancer.drain(WAIT)
    model = state.model_states["tiny"]
    assert (model.pending_result, model.rebalanced) == (None, False)
    write_version(state, 2)
    for _ in range(LAYERS):
        step(state)
    assert stale(state, 2) == []
    assert "_all_ranks_result_ready" not in vars(state), "vLLM's own method is back"


def test_a_layer_that_was_moved_before_the_drain_keeps_its_new_places(state: Any) -> None:
    begin_rearrangement(state)
    until_pending(state)
    step(state)
    until_pending(state)
    balancer.drain(WAIT)
    model = state.model_states["tiny"]
    assert model.physical_to_logical_map.tolist() == [[1, 0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert stale(state, 1) == []
    write_version(state, 2)
    assert stale(state, 2) == []


def test_balancing_goes_on_after_a_drain(state: Any) -> None:
    begin_rearrangement(state)
    balancer.drain(WAIT)
    write_version(state, 2)
    begin_rearrangement(state)
    for _ in range(LAYERS):
        until_pending(state)
        step(state)
    assert state.model_states["tiny"].physical_to_logical_map.tolist() == SWAPPED.tolist()
    assert stale(state, 2) == []
    balancer.drain(0.0)  # at rest already: no wait is needed


def test_a_balancer_that_does_not_come_to_rest_is_an_error_in_time(state: Any) -> None:
    state.model_states["tiny"].rebalanced = True  # and no thread that would ever answer
    now = iter(range(100))
    with pytest.raises(balancer.BalancerBusy, match="tiny does not come to rest: no result in time"):
        balancer.drain(5.0, lambda: float(next(now)))
    assert "_all_ranks_result_ready" not in vars(state)


def test_a_thread_that_has_died_is_not_waited_for(state: Any) -> None:
    state.model_states["tiny"].rebalanced = True
    state.async_worker = threading.Thread(target=lambda: None)
    state.async_worker.start()
    state.async_worker.join()
    with pytest.raises(balancer.BalancerBusy, match="its thread has ended with an error"):
        balancer.drain(WAIT)


def test_a_drain_that_leaves_copies_behind_is_no_drain(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eplb_state.EplbState, "drain_async", lambda self: None)
    state.model_states["tiny"].pending_result = object()
    with pytest.raises(balancer.BalancerBusy, match="still holds copies"):
        balancer.drain(WAIT)


def test_a_balancer_in_step_is_left_alone(state: Any) -> None:
    state.is_async = False
    state.model_states["tiny"].rebalanced = True
    balancer.drain(WAIT)


def parallel(*, eplb: bool, asynchronous: bool) -> Any:
    return SimpleNamespace(enable_eplb=eplb, eplb_config=SimpleNamespace(use_async=asynchronous))


def test_experts_move_where_they_are_balanced_or_nobody_knows() -> None:
    configured = [SimpleNamespace(parallel_config=parallel(eplb=eplb, asynchronous=True)) for eplb in (True, False)]
    assert [balancer.may_move(config) for config in configured] == [True, False]
    assert balancer.may_move(None)
    assert balancer.may_move(SimpleNamespace(parallel_config=SimpleNamespace()))


def test_a_vllm_without_a_drain_is_refused_by_name(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer.require(parallel(eplb=True, asynchronous=True))
    monkeypatch.delattr(eplb_state.EplbState, "drain_async")
    for harmless in (parallel(eplb=True, asynchronous=False), parallel(eplb=False, asynchronous=True)):
        balancer.require(harmless)
    balancer.require(SimpleNamespace())
    with pytest.raises(balancer.BalancerUnknown, match=r"--eplb-config '\{\"use_async\": false\}'"):
        balancer.require(parallel(eplb=True, asynchronous=True))


def test_a_balancer_that_nobody_watches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eplb_state.EplbState, "__init__", lambda self: None)
    with pytest.raises(balancer.BalancerUnknown):
        balancer.require(parallel(eplb=True, asynchronous=True))
