"""Which tensors a checkpoint has, when the engine did not read one: from the files beside the config, if there are any.

A safetensors file begins with an eight-byte little-endian length and a JSON header with every tensor's dtype and
shape; nothing else of it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.recorder.trace import Checkpoint, RecordError
from weightsync.agents.vllm.recorder.expected import expected_checkpoint

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit for the JSON header."""

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Safetensors' names of the dtypes that may travel."""


def checkpoint_of(model: nn.Module, model_config: Any) -> list[Checkpoint]:
    """The tensors of the checkpoint that ``model`` would load: from files in the model's directory, else derived.

    Raises:
        RecordError: there are no files, and the model's names cannot be derived.
    """
    directory = Path(str(model_config.model))
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if files:
        return [entry for file in files for entry in read_header(file)]
    return expected_checkpoint(model)


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
