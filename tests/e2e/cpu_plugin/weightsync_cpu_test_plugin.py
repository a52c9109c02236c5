"""A vLLM plugin of the test suite: on the CPU build, weights stay where a transfer can write them.

The CPU build packs linear weights at load and empties their parameters, so that nothing is left to write to; a GPU
build does nothing of the kind. The directory of this file goes on ``PYTHONPATH`` (see ``serving.environment``).
"""

import os
from pathlib import Path
from typing import Any

SERVABLE_FLAG = "WEIGHTSYNC_TEST_SERVABLE"
"""Environment variable naming a file. While the variable is set, every worker says that its weights may be served when
that file exists and not otherwise, whatever its agent says: a double for tests of the hold and the gate alone."""


def register() -> None:
    """Entry point of ``vllm.general_plugins``; runs in every vLLM process."""
    _keep_linear_weights_live()
    flag = os.environ.get(SERVABLE_FLAG)
    if flag:
        _follow(Path(flag))


def _keep_linear_weights_live() -> None:
    import torch
    from vllm.model_executor.layers import utils

    packing = utils.dispatch_cpu_unquantized_gemm
    if getattr(packing, "keeps_weights_live", False):
        return
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # bf16 products in a process that never asked for AMX end in SIGILL

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim != 2:
            packing(layer, remove_weight)
        else:
            layer.cpu_linear = torch.nn.functional.linear

    dispatch.keeps_weights_live = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch


def _follow(flag: Path) -> None:
    from weightsync.agents.vllm import gate

    def reason(worker: Any) -> str:
        return "" if flag.exists() else f"the test has not made {flag.name}"

    gate.reason_not_servable = reason
