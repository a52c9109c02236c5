"""A vLLM plugin of the test suite: on the CPU build, weights stay where a transfer can write them.

The CPU build packs linear weights at load and empties their parameters, so that nothing is left to write to; a GPU
build does nothing of the kind. The directory of this file goes on ``PYTHONPATH`` (see ``serving.environment``).
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SERVABLE_FLAG = "WEIGHTSYNC_TEST_SERVABLE"
"""Environment variable naming a file. If it is set, workers get a ``FlagAgent`` that follows this file in place of
their real agent: for tests of the hold, the gate and the calls, without a daemon."""

PIPELINE_FLAG = "WEIGHTSYNC_TEST_PIPELINE"
"""Environment variable of a server with pipeline stages; see ``_let_stages_hand_on``."""

CROWDED_FLAG = "WEIGHTSYNC_TEST_CROWDED"
"""Environment variable of servers that share few cores with others; see ``_sleep_between_looks``."""

LOOK_SECONDS = 0.0005


def register() -> None:
    """Entry point of ``vllm.general_plugins``; runs in every vLLM process."""
    _keep_linear_weights_live()
    _attend_to_latent_keys_without_amx()
    if os.environ.get(CROWDED_FLAG):
        _sleep_between_looks()
    flag = os.environ.get(SERVABLE_FLAG)
    if flag:
        _follow(Path(flag))
    if os.environ.get(PIPELINE_FLAG):
        _let_stages_hand_on()


def _keep_linear_weights_live() -> None:
    import torch
    from vllm.model_executor.layers import utils

    packing = utils.dispatch_cpu_unquantized_gemm
    if getattr(packing, "keeps_weights_live", False):
        return
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # bf16 products in a process that never asked for AMX end in SIGILL

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.is_meta:
            packing(layer, remove_weight)
        elif layer.weight.ndim != 2:
            pass  # experts are packed elsewhere; convolutions stay as a GPU build has them, and cannot run
        else:
            layer.cpu_linear = torch.nn.functional.linear

    dispatch.keeps_weights_live = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch


def _attend_to_latent_keys_without_amx() -> None:
    """On a CPU with AMX vLLM 0.32 takes a backend that it cannot make: it gives it an argument too many."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    update = CpuPlatform.check_and_update_config.__func__
    reference = getattr(AttentionBackendEnum, "CPU_MLA", None)
    if reference is None or getattr(update, "without_amx", False):
        return

    def updated(cls: Any, vllm_config: Any) -> None:
        if getattr(vllm_config.model_config, "use_mla", False):
            vllm_config.attention_config.backend = reference
        update(cls, vllm_config)

    updated.without_amx = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(updated)


def _sleep_between_looks() -> None:
    """Cores and workers that wait for each other's messages look for them without a pause for up to a second."""
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(LOOK_SECONDS)


def _let_stages_hand_on() -> None:
    """A later stage's buffer is made in the warm-up, which an eager CPU build leaves out."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather = GPUModelRunner.sync_and_gather_intermediate_tensors
    if getattr(gather, "makes_its_buffer", False):
        return

    def gather_with_buffer(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return gather(self, *args, **kwargs)

    gather_with_buffer.makes_its_buffer = True  # type: ignore[attr-defined]
    GPUModelRunner.sync_and_gather_intermediate_tensors = gather_with_buffer


def _follow(flag: Path) -> None:
    from weightsync.agents.vllm.adapter import common as engine

    def make_agent(ranks: Any, model: Any, *others: Any, **named: Any) -> FlagAgent:
        flag.with_suffix(f".rank{ranks.rank}").write_text(json.dumps(asdict(ranks)))
        return FlagAgent(flag, ranks.rank, model)

    engine.make_agent = make_agent


@dataclass(frozen=True, slots=True)
class FlagStatus:
    """Where ``FlagAgent`` stands, in the words of the real agent's status."""

    torn: bool
    applied: None = None
    window: None = None


class FlagAgent:
    """The double: servable while ``flag`` exists, torn while ``flag`` with the suffix ``.torn`` does.

    ``flag`` with the suffix ``.refuse<rank>`` makes one rank not servable, with ``.abandoned`` its lease runs out. Its
    incarnation is 100 + its rank. What waits in its standby are weights that say token 0 whatever they are asked, and
    any mixture of which with others says something else; with the suffix ``.empty<rank>`` nothing waits.

    Each one leaves its ranks in ``flag`` with the suffix ``.rank<rank>``.
    """

    def __init__(self, flag: Path, rank: int, model: Any) -> None:
        self._flag, self._refusal = flag, flag.with_suffix(f".refuse{rank}")
        self._empty, self._broken = flag.with_suffix(f".empty{rank}"), flag.with_suffix(f".broken{rank}")
        self._model = model
        self.incarnation, self.held_because = 100 + rank, ""

    @property
    def may_run(self) -> bool:
        return self._flag.exists() and not self._refusal.exists()

    @property
    def status(self) -> FlagStatus:
        return FlagStatus(torn=self._flag.with_suffix(".torn").exists())

    @property
    def lease(self) -> tuple[float, float] | None:
        return (1.0, 99.0) if self._flag.with_suffix(".abandoned").exists() else None

    def begin(self, init_info: Any) -> None: ...

    def update(self, update_info: Any) -> None:
        if self.status.torn:
            raise RuntimeError(f"round {update_info.round_number} tore the weights")

    def ready(self, order: Any) -> str:
        return ""

    def switchable(self, order: Any) -> str:
        return "nothing waits in standby" if self._empty.exists() else ""

    def switch(self, order: Any) -> None:
        import torch

        if self._broken.exists():
            raise RuntimeError("the device is lost")
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                weight.copy_(torch.zeros_like(weight) if name == "model.norm.weight" else weight.flip(0))

    def around(self, change: Any) -> Any:
        return change()

    def close(self) -> None: ...


class Meddler:
    """A worker extension (``--worker-extension-cls``): one method that looks at the weights, one that changes them."""

    model_runner: Any

    def look_at_weights(self) -> float:
        return float(next(self.model_runner.model.parameters()).float().abs().sum())

    def change_weights(self) -> None:
        import torch

        with torch.no_grad():
            for weight in self.model_runner.model.parameters():
                weight.copy_(weight.flip(0))
