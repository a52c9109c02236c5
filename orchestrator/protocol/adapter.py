"""A LoRA adapter as it travels: the tensors of peft's ``adapter_model.safetensors`` by their names, and its scaling.

The scaling is no tensor in the files, but a line of ``adapter_config.json``. Whoever computed with another one would
compute with other weights, so it travels as one more tensor.
"""

from typing import Final

SCALING: Final = "adapter_scaling"
"""Name of that tensor: ``[lora_alpha, use_rslora]`` as float64, use_rslora 0 or 1. Every adapter weight is multiplied
by lora_alpha / rank, or by lora_alpha / √rank where use_rslora is 1."""

SCALING_SHAPE: Final = (2,)
SCALING_DTYPE: Final = "float64"
"""What Python computes with: the quotient must be the one of an engine that read the JSON."""

SAVED_PREFIX: Final = "base_model.model."
"""What peft puts before every module's name in its files."""
