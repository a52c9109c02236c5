"""Puts the recorder into vLLM's model loading: at the one moment when the layout can be recorded.

``install()`` wraps ``BaseModelLoader.load_model``. For the duration of one load, the loader's ``load_weights`` and the
model's ``load_weights`` are wrapped on their instances: the first marks the end of loading and the beginning of
post-load processing, the second lets the recorder see which tensors the checkpoint has. Engines whose
weight-transfer backend is another one are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.recorder.trace import Checkpoint
from weightsync.agents.vllm.backend import chosen
from weightsync.agents.vllm.holders import settings
from weightsync.agents.vllm.recorder.checkpoint import checkpoint_of
from weightsync.agents.vllm.recorder.recorded import Recording, keep, keep_draft, record

_INSTALLED: Final = "_weightsync_recorder"


def install() -> None:
    """Wrap vLLM's loader. May be called any number of times, in any process, before the model is loaded."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original = BaseModelLoader.load_model
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if not chosen(vllm_config):
            model: nn.Module = original(self, vllm_config, model_config, *args, **kwargs)
            return model
        settings.require(vllm_config)  # before hours of loading, not after
        load = functools.partial(original, self, vllm_config, model_config, *args, **kwargs)
        # A draft model of speculative decoding is loaded with a configuration of its own.
        if model_config is vllm_config.model_config:
            return _recorded_load(load, self)
        draft: nn.Module = load()
        keep_draft(draft)
        return draft

    setattr(load_model, _INSTALLED, True)
    BaseModelLoader.load_model = load_model


def _recorded_load(load: Callable[[], nn.Module], loader: Any) -> nn.Module:
    recordings: list[Recording] = []

    def load_weights(model: nn.Module, config: Any) -> None:
        seen: dict[str, Checkpoint] = {}
        with _observed(model, seen):
            original(model, config)
        # Dummy weights are filled in without a checkpoint: then nothing was seen.
        checkpoint = list(seen.values()) or checkpoint_of(model, config)
        recordings.append(record(model, config, checkpoint))

    original = loader.load_weights
    loader.load_weights = load_weights
    try:
        model = load()
    finally:
        del loader.load_weights  # the instance's own attribute; the method of its class is there again
    for recording in recordings:
        recording.finish()
        keep(recording)
    return model


class _observed:
    """Lets ``seen`` collect the names, shapes and dtypes that ``model.load_weights`` is given."""

    def __init__(self, model: nn.Module, seen: dict[str, Checkpoint]) -> None:
        self._model, self._seen = model, seen

    def __enter__(self) -> None:
        original: Any = self._model.load_weights

        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            return original(self._watch(weights), *args, **kwargs)

        self._model.load_weights = load_weights  # type: ignore[assignment]

    def __exit__(self, *exc: object) -> None:
        del self._model.load_weights

    def _watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._seen[name] = Checkpoint(name, tuple(tensor.shape), tensor.dtype)
            yield name, tensor
