"""Which adapter rounds write, as the server's environment declares it: ``WEIGHTSYNC_ADAPTER=NAME=DIRECTORY``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weightsync.agents.errors import AgentError
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.vllm.backend import ADAPTER_VARIABLE
from weightsync.agents.vllm.recorder.checkpoint import read_header
from weightsync.orchestrator.protocol.messages import Fault

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
FACTOR: Final = re.compile(r".+\.(lora_[AB]\.weight|lora_embedding_[AB])")
EMBEDDINGS: Final = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""Ends of names as in vLLM's ``is_base_embedding_weights``."""
MAX_CONFIG_BYTES: Final = 1024 * 1024
"""Of ``adapter_config.json``; peft's have a few kilobytes."""


class AdapterRefused(AgentError):
    """An adapter that rounds cannot write, or not as it was declared. The configuration's fault."""

    fault: Fault = "config"
    retry = False


@dataclass(frozen=True, slots=True)
class Declared:
    """The adapter ``name`` in peft's form in ``directory``: its ``config``, and the tensors of its file."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    tensors: tuple[Checkpoint, ...]

    def is_in(self, path: str) -> bool:
        """Whether ``path`` is its directory."""
        return Path(path).resolve() == self.directory.resolve()


def declared() -> Declared | None:
    """The declared adapter; None where rounds write the model.

    Raises:
        AdapterRefused: what is declared is no adapter in peft's form.
        RecordError: its safetensors file is none.
    """
    value = os.environ.get(ADAPTER_VARIABLE)
    if not value:
        return None
    name, equals, path = value.partition("=")
    if not name or not equals or not path:
        raise AdapterRefused(f"{ADAPTER_VARIABLE}={value}: give NAME=DIRECTORY, as in --lora-modules")
    directory = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise AdapterRefused(
                f"{ADAPTER_VARIABLE}={value}: {directory} has no {file}; save the adapter by save_pretrained"
            )
    return Declared(name, directory, _config(directory / CONFIG, value), _factors(directory / WEIGHTS, value))


def _factors(file: Path, value: str) -> tuple[Checkpoint, ...]:
    entries = read_header(file)
    factors = tuple(entry for entry in entries if FACTOR.fullmatch(entry.name))
    # Beside an adapted embedding peft saves the embedding itself, which vLLM does not read.
    others = [e.name for e in entries if not FACTOR.fullmatch(e.name) and not e.name.endswith(EMBEDDINGS)]
    if others or not factors:
        what = f"{', '.join(others[:4])}, no factors of LoRA" if others else "no factors of LoRA"
        raise AdapterRefused(f"{ADAPTER_VARIABLE}={value}: {file} holds {what}; a round carries plain LoRA alone")
    return factors


def _config(file: Path, value: str) -> Mapping[str, Any]:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterRefused(f"{ADAPTER_VARIABLE}={value}: {file} exceeds {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise AdapterRefused(f"{ADAPTER_VARIABLE}={value}: {file} is no JSON: {error}") from error
    alpha = config.get("lora_alpha") if isinstance(config, dict) else None
    if not isinstance(alpha, int | float):
        raise AdapterRefused(f"{ADAPTER_VARIABLE}={value}: {file} has lora_alpha {alpha!r}, where a number belongs")
    for key in ("alpha_pattern", "rank_pattern"):
        if config.get(key):
            raise AdapterRefused(
                f"{ADAPTER_VARIABLE}={value}: {file} has {key} {config[key]!r}; a round carries one scaling for all"
                " modules"
            )
    found: Mapping[str, Any] = config
    return found
