"""Puts the recorder into vLLM's model loading: at the one moment when the layout can be recorded.

``install()`` wraps ``BaseModelLoader.load_model``. For the duration of one load, the loader's ``load_weights`` and the
model's ``load_weights`` are wrapped on their instances: the first marks the end of loading and the beginning of
post-load processing, the second lets the recorder see and digest what the loader is fed. Engines whose weight-transfer
backend is another one are left alone.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, Final

from torch import nn
from weightsync.agents.recorder.recording import Recording
from weightsync.agents.vllm.backend import chosen, writes_adapter
from weightsync.agents.vllm.holders import settings
from weightsync.agents.vllm.recorder import drafts
from weightsync.agents.vllm.recorder.proved_load import proved_load
from weightsync.agents.vllm.recorder.recorded import keep

_INSTALLED: Final = "_weightsync_recorder"

_loaded_with: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def config_of(model: nn.Module) -> Any:
    """vLLM's configuration that ``model`` was loaded with, which not every vLLM gives its weight-transfer engine; None
    for a model that was not loaded under the hook, and for drafters."""
    return _loaded_with.get(model)


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
        if writes_adapter():
            base: nn.Module = load()
            _loaded_with[base] = vllm_config
            return base
        prefix = drafts.prefix_of(vllm_config, model_config)
        if prefix is not None and drafts.are_left():
            drafter: nn.Module = load()
            drafts.leave(drafter)
            return drafter
        recorded = _recorded_load(load, self, prefix)
        if prefix is None:
            _loaded_with[recorded] = vllm_config
        return recorded

    setattr(load_model, _INSTALLED, True)
    BaseModelLoader.load_model = load_model


def _recorded_load(load: Callable[[], nn.Module], loader: Any, draft_prefix: str | None) -> nn.Module:
    recordings: list[Recording] = []
    original = loader.load_weights
    with contextlib.ExitStack() as watched:

        def load_weights(model: nn.Module, config: Any) -> None:
            recording = proved_load(model, config, lambda: original(model, config), drafter=draft_prefix is not None)
            recordings.append(recording)
            # From here on vLLM processes what it has loaded; there is no other sign of where that begins.
            watched.enter_context(recording.processing)

        loader.load_weights = load_weights
        try:
            model = load()
        finally:
            del loader.load_weights  # the instance's own attribute; the method of its class is there again
    for recording in recordings:
        recording.finish()
        keep(recording, draft_prefix)
    return model
