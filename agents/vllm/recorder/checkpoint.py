"""Which tensors a checkpoint has, when the engine did not read one (``load_format: dummy``).

They are taken from the files beside the config, if there are any, else derived from the layers.

A safetensors file begins with an eight-byte little-endian length and a JSON header with every tensor's dtype and
shape; nothing else of it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.vllm.recorder.vllm_names import (
    CACHE_SCALES,
    GATE_UP,
    hidden_size,
    intermediate_size,
    is_expert_weight,
    logical_experts,
    moe_config_of,
    quant_method_of,
    vocabulary_rows,
)

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit for the JSON header."""

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Safetensors' names of the dtypes that may travel."""

_KNOWN_FUSIONS: Final = {
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "wk_weights_proj": ["wk", "weights_proj"],
}
"""Fusions that vLLM's models make without naming them in ``packed_modules_mapping``."""


def checkpoint_of(model: nn.Module, model_config: Any) -> list[Checkpoint]:
    """The tensors of the checkpoint that ``model`` would load: from files in the model's directory, else derived.

    Raises:
        RecordError: there are no files, and the model's names cannot be derived.
    """
    return files_of(model_config) or expected_checkpoint(model)


def files_of(model_config: Any) -> list[Checkpoint]:
    """The tensors of the safetensors files in the model's directory, or in Hugging Face's cache; none without any.

    Raises:
        RecordError: see :func:`read_header`.
    """
    directory = Path(str(model_config.model))
    if not directory.is_dir():
        directory = _cached(str(model_config.model), getattr(model_config, "revision", None)) or directory
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    return [entry for file in files for entry in read_header(file)]


def _cached(repository: str, revision: str | None) -> Path | None:
    """Where the files of a model that was downloaded before lie; None if it was not."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):  # no such library, no such files, no name of a repository
        return None


def read_header(file: Path) -> list[Checkpoint]:
    """Names, shapes and dtypes in one safetensors file.

    Raises:
        RecordError: the file is no safetensors file, or has a dtype that cannot travel.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= MAX_HEADER_BYTES:
            raise RecordError(f"{file} is no safetensors file: its header would be {size} bytes long")
        try:
            header = json.loads(stream.read(size))
        except ValueError as error:
            raise RecordError(f"{file} is no safetensors file: its header is no JSON") from error
    return [_entry(file, name, about) for name, about in header.items() if name != "__metadata__"]


def _entry(file: Path, name: str, about: dict[str, Any]) -> Checkpoint:
    dtype = DTYPES.get(about["dtype"])
    if dtype is None:
        raise RecordError(f"{file}: {name} has dtype {about['dtype']}, which cannot travel")
    return Checkpoint(name, tuple(int(n) for n in about["shape"]), dtype)


# ------------------------------------------------------------------------------------------ derived from the layers
def expected_checkpoint(model: nn.Module) -> list[Checkpoint]:
    """Names, full shapes and dtypes of the checkpoint tensors that fill ``model``'s parameters.

    vLLM's layers know their unsharded sizes and the names that were fused into them. What is derived here is only a
    proposal: the recorder runs vLLM's loader over it and refuses every parameter that stays unreached, and the plan
    compares names, shapes and dtypes with what the trainer has. A wrong proposal fails; it never becomes a wrong
    layout.
    """
    packed: dict[str, list[str]] = dict(getattr(model, "packed_modules_mapping", None) or {})
    found: dict[str, Checkpoint] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen or _is_computed(module, attribute, tensor):
                continue
            seen.add(id(tensor))
            for entry in _entries(path, module, attribute, tensor, packed):
                found[entry.name] = entry
    return list(found.values())


def _is_computed(module: nn.Module, attribute: str, tensor: torch.Tensor) -> bool:
    """Rotary tables, expert maps, scales of the KV cache: what a model fills itself."""
    private = attribute.startswith("_") or attribute in module._non_persistent_buffers_set
    is_table = private or not tensor.is_floating_point()
    return (attribute in module._buffers and is_table) or attribute in CACHE_SCALES


def _entries(
    path: str, module: nn.Module, attribute: str, tensor: torch.Tensor, packed: dict[str, list[str]]
) -> Iterator[Checkpoint]:
    kind = {cls.__name__ for cls in type(module).__mro__}
    parent, _, leaf = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    shape = tuple(tensor.shape)
    layer: Any = module
    if is_expert_weight(attribute):
        yield from _experts(path, layer, attribute, tensor)
    elif "VocabParallelEmbedding" in kind and (rows := vocabulary_rows(layer)) is not None:
        yield Checkpoint(f"{path}.{attribute}", (rows, *shape[1:]) if attribute == "weight" else (rows,), tensor.dtype)
    elif "QKVParallelLinear" in kind:
        sizes = [layer.total_num_heads * layer.head_size]
        sizes += [layer.total_num_kv_heads * layer.head_size, layer.total_num_kv_heads * layer.v_head_size]
        names = packed.get(leaf, ["q_proj", "k_proj", "v_proj"])
        yield from _fused(prefix, names, sizes, attribute, tensor, layer)
    elif "MergedColumnParallelLinear" in kind:
        names = packed.get(leaf) or _KNOWN_FUSIONS.get(leaf, [])
        yield from _fused(prefix, names, list(layer.output_sizes), attribute, tensor, layer)
    elif "LinearBase" in kind and attribute != "e_score_correction_bias":
        full = _linear_shape(attribute, tensor, int(layer.output_size), int(layer.input_size), layer)
        yield Checkpoint(f"{path}.{attribute}", full, tensor.dtype)
    else:
        yield Checkpoint(f"{path}.{attribute}" if path else attribute, shape, tensor.dtype)


def _fused(
    prefix: str, names: list[str], rows: list[int], attribute: str, tensor: torch.Tensor, layer: Any
) -> Iterator[Checkpoint]:
    for name, count in zip(names, rows, strict=False):
        full = _linear_shape(attribute, tensor, int(count), int(layer.input_size), layer)
        yield Checkpoint(f"{prefix}{name}.{attribute}", full, tensor.dtype)


def _linear_shape(attribute: str, tensor: torch.Tensor, rows: int, columns: int, layer: Any) -> tuple[int, ...]:
    if attribute == "bias":
        return (rows,)
    if attribute.endswith("_scale_inv"):
        block_rows, block_columns = _block(layer)
        return (-(-rows // block_rows), -(-columns // block_columns))
    return (rows, columns) if tensor.dim() == 2 else tuple(tensor.shape)


def _block(layer: Any) -> tuple[int, int]:
    quantization = getattr(quant_method_of(layer), "quant_config", None)
    size = getattr(layer, "weight_block_size", None) or getattr(quantization, "weight_block_size", None) or (128, 128)
    return int(size[0]), int(size[1])


def _experts(path: str, layer: Any, attribute: str, tensor: torch.Tensor) -> Iterator[Checkpoint]:
    """One tensor per expert and projection, as Hugging Face checkpoints of these models have them."""
    owner = path.removesuffix(".routed_experts")
    config = moe_config_of(layer)
    hidden, size = hidden_size(config), intermediate_size(config)
    is_gate_up = attribute.startswith(GATE_UP)
    rest = attribute.partition("_")[2]
    names = ("gate_proj", "up_proj") if is_gate_up else ("down_proj",)
    rows, columns = (size, hidden) if is_gate_up else (hidden, size)
    shape = _linear_shape(rest, tensor[0], rows, columns, layer)
    for expert in range(logical_experts(config)):
        for name in names:
            yield Checkpoint(f"{owner}.{expert}.{name}.{rest}", shape, tensor.dtype)
