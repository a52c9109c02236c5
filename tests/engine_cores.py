"""Fakes with the shape of vLLM's engine core, for what wraps it: the hold, and the commit between two steps."""

import enum
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class PauseState(enum.IntEnum):
    UNPAUSED = 0
    PAUSED_NEW = 1
    PAUSED_ALL = 2


class LoraRequest:
    """What a core decodes its argument to."""


class Scheduler:
    def __init__(self) -> None:
        self.pause_state = PauseState.UNPAUSED

    def set_pause_state(self, state: PauseState) -> None:
        self.pause_state = state


class Worker:
    """One worker process, with the order of calls that vLLM's worker enforces."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        status = SimpleNamespace(torn=False, applied=None, window=None)
        self.unready = self.unfit = ""  # why it cannot switch, beside its last batches and after them
        self.agent = SimpleNamespace(
            may_run=False,
            status=status,
            held_because="",
            incarnation=100 + rank,
            lease=None,
            landing="lands copy",
            ready=lambda order: self.unready,
            switchable=lambda order: self.unfit,
            switch=self.switch,
            around=self.around,
        )
        self.weight_transfer_engine = SimpleNamespace(agent=self.agent)
        self._weight_update_active = False
        self.calls: list[str] = []
        self.failure = ""
        self.weights = [0]

    def start_weight_update(self, is_checkpoint_format: bool = False) -> None:
        self.calls.append("start")
        assert not self._weight_update_active
        self._weight_update_active = True

    def update_weights(self, update_info: Any) -> None:
        self.calls.append("update")
        if self.failure:
            self._weight_update_active = False
            raise RuntimeError(self.failure)

    def finish_weight_update(self) -> str:
        self.calls.append("finish")
        self._weight_update_active = False
        return f"finished {self.rank}"

    def reload_weights(self) -> None:
        self.calls.append("reload")

    def around(self, change: Callable[[], Any]) -> Any:
        """As the real one, where ``weights`` are all that there is to digest."""
        before = list(self.weights)
        answer = change()
        if self.agent.may_run and before != self.weights:
            self.agent.status.torn, self.agent.may_run = True, False
        return answer

    def add_lora(self, request: Any) -> bool:
        self.calls.append(f"add {request}")
        return True

    def remove_lora(self, number: int) -> bool:
        self.calls.append(f"remove {number}")
        self.weights[0] += number
        return True

    def meddle(self) -> None:
        self.weights[0] += 1
        if self.failure:
            raise RuntimeError(self.failure)

    def look(self) -> int:
        return self.weights[0]

    def switch(self, order: Any) -> None:
        self.calls.append("switch")
        if self.failure:
            raise RuntimeError(self.failure)


class Executor:
    """Reads answers rank by rank and stops at the first error, leaving the others queued, as vLLM's does."""

    def __init__(self, ranks: int) -> None:
        self.workers = [Worker(rank) for rank in range(ranks)]
        self.queues: list[list[Any]] = [[] for _ in self.workers]

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        for worker, queue in zip(self.workers, self.queues, strict=True):
            try:
                if isinstance(method, str):
                    queue.append(getattr(worker, method)(*args, **(kwargs or {})))
                else:
                    queue.append(method(worker, *args, **(kwargs or {})))
            except Exception as error:
                queue.append(error)
        answers = []
        for queue in self.queues:
            answer = queue.pop(0)
            if isinstance(answer, Exception):
                raise RuntimeError(f"Worker failed with error '{answer}'")
            answers.append(answer)
        return answers


class EngineCore:
    def __init__(self, vllm_config: Any, ranks: int = 1) -> None:
        self.vllm_config = vllm_config
        self.model_executor = Executor(ranks)
        self._initialize_kv_caches(vllm_config)
        self.scheduler = Scheduler()
        self.slept: list[int] = []
        self.batch_queue: list[Any] = []

    def _initialize_kv_caches(self, vllm_config: Any) -> None: ...

    def pause_scheduler(self, mode: str = "abort", clear_cache: bool = True) -> None:
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW)

    def resume_scheduler(self) -> None:
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    def is_scheduler_paused(self) -> bool:
        return self.scheduler.pause_state != PauseState.UNPAUSED

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.slept.append(level)

    def wake_up(self) -> None:
        self.resume_scheduler()

    def add_lora(self, request: LoraRequest) -> bool:
        return all(self.model_executor.collective_rpc("add_lora", None, (request,)))

    def remove_lora(self, number: int) -> bool:
        return all(self.model_executor.collective_rpc("remove_lora", None, (number,)))

    def reinitialize_distributed(self, request: Any) -> str:
        raise AssertionError("it is refused before")

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        return self.model_executor.collective_rpc(method, timeout, args, kwargs)


class StepGroup:
    """Stands for the process group of data-parallel ranks in step; ``others`` is what the peers contribute."""

    data_parallel_index = 0

    def __init__(self, others: bool) -> None:
        self.others = others
        self.met: list[bool] = []

    def has_unfinished_dp(self, group: Any, own: bool) -> bool:
        assert group is self
        self.met.append(own)
        return own or self.others


class DPEngineCore(EngineCore):
    def __init__(self, vllm_config: Any, ranks: int = 1) -> None:
        self.pending_pause = False
        self.ignore_start_dp_wave = False
        self.engines_running = False
        self.dp_group = vllm_config.parallel_config
        super().__init__(vllm_config, ranks)


def config(backend: str | None = "weightsync", peers_refuse: bool = False) -> Any:
    transfer = None if backend is None else SimpleNamespace(backend=backend)
    return SimpleNamespace(weight_transfer_config=transfer, parallel_config=StepGroup(peers_refuse))


def pretend_vllm(monkeypatch: pytest.MonkeyPatch, core: type[Any]) -> None:
    for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = ModuleType("vllm.v1.core.sched.interface")
    interface.PauseState, interface.SchedulerInterface = PauseState, Scheduler  # type: ignore[attr-defined]
    engine = ModuleType("vllm.v1.engine.core")
    engine.EngineCore = core  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, engine.__name__, engine)


def servable(core: EngineCore, yes: bool = True) -> None:
    for worker in core.model_executor.workers:
        worker.agent.may_run = yes
