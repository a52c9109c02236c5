"""Chooses the adapter to the vLLM at hand by the shape of its base class, not by its version number."""

import importlib
import inspect
from typing import Any, Final

from weightsync.agents.errors import AgentError
from weightsync.agents.vllm.plugin import ADAPTER_CLASS

SHAPES: Final = {
    ("config", "vllm_config", "device", "model"): ("weightsync.agents.vllm.adapter.lifecycle", "LifecycleEngine"),
    ("config", "parallel_config", "model"): ("weightsync.agents.vllm.adapter.callback", "CallbackEngine"),
}
"""Parameters of ``WeightTransferEngine.__init__``, and who speaks that."""


class UnsupportedVllm(AgentError):
    """This vLLM's weight-transfer interface has a shape that no adapter knows. Nothing to retry."""


def choose(base: type[Any]) -> tuple[str, str]:
    """Module and class of the adapter to the ``WeightTransferEngine`` called ``base``.

    Raises:
        UnsupportedVllm: none fits.
    """
    shape = tuple(inspect.signature(base).parameters)
    if shape not in SHAPES:
        raise UnsupportedVllm(
            f"{base.__module__}.{base.__name__} is made from {shape}; weightsync knows {list(SHAPES)}: use a vLLM "
            "that weightsync supports, or a newer weightsync"
        )
    return SHAPES[shape]


def __getattr__(name: str) -> Any:
    """The adapter, under the name that the factory was told; imported once an engine is made."""
    if name != ADAPTER_CLASS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    module, adapter = choose(WeightTransferEngine)
    return getattr(importlib.import_module(module), adapter)
