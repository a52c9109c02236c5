"""Adapters in peft's form on disk, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

A = "base_model.model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.q_proj.lora_B.weight"


def adapter(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A directory with an adapter of rank 2 of one module, 3 to 5."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {A: torch.randn(2, 3), B: torch.randn(5, 2)} if tensors is None else tensors
    save_file(values, directory / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(whole))
    return directory
