"""Where the experts are on this rank: part of the layout's identity, because rebalancing moves them."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import torch
from torch import nn

MAPS: Final = (
    "_expert_map",
    "expert_map",
    "expert_global_to_physical",
    "expert_physical_to_global",
    "expert_local_to_global",
    "logical_to_physical_map",
    "logical_replica_count",
)
"""Attributes of vLLM's expert layers, and of the load balancer's state in them, that say who has which expert."""


def expert_map_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every expert map of ``model``; empty for a model whose experts are all on this rank in order."""
    digest = hashlib.sha256()
    found = False
    for path, module in model.named_modules():
        for holder in (module, getattr(module, "eplb_state", None)):
            for attribute in MAPS if holder is not None else ():
                value = _attribute(holder, attribute)
                if isinstance(value, torch.Tensor) and value.numel():
                    found = True
                    digest.update(f"{path}.{attribute}:{tuple(value.shape)}:".encode())
                    digest.update(value.detach().to("cpu", torch.int64).numpy().tobytes())
    return digest.hexdigest() if found else ""


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except (AttributeError, AssertionError, RuntimeError):
        # Properties of vLLM's layers that assert on a placement which this layer does not have.
        return None
