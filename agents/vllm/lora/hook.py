"""Puts the served adapter into vLLM's loading of adapters: asked for it, vLLM loads what rounds have written.

``install()`` wraps two methods in every process of vLLM; they do what they always did until ``serve`` was called, in a
worker whose rounds write an adapter.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec
from weightsync.agents.vllm.backend import logger, writes_adapter
from weightsync.agents.vllm.lora.declared import AdapterRefused
from weightsync.agents.vllm.lora.served import LoadAsked, ServedAdapter

_INSTALLED: Final = "_weightsync_adapter"
_served: list[ServedAdapter] = []
"""Of this process; none or one."""


class HookUnavailable(RuntimeError):
    """This vLLM loads adapters in a way that is not known here. Another vLLM is needed."""


def serve(adapter: ServedAdapter) -> None:
    """From now on ``adapter`` is what vLLM gets when it loads the adapter of this name."""
    require()
    _served[:] = [adapter]


def require() -> None:
    """Raises HookUnavailable where vLLM would load the adapter from the files that it started with."""
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    for owner, name in ((WorkerLoRAManager, "_load_adapter"), (LoRAModelRunnerMixin, "reset_lora_state")):
        if not hasattr(getattr(owner, name, None), _INSTALLED):
            raise HookUnavailable(
                f"this vLLM has no {owner.__name__}.{name}, by which an adapter is loaded; use one that weightsync"
                " supports, or push merged weights"
            )


def install() -> None:
    """Wrap vLLM's methods, in a server that declares an adapter. May be called any number of times."""
    if not writes_adapter():
        return  # nothing of vLLM's adapters is touched, and nothing is imported
    try:
        from vllm.lora.worker_manager import WorkerLoRAManager
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    except ImportError as error:
        logger.debug("weightsync: no adapters in this vLLM: %s", error)
        return
    _wrap(WorkerLoRAManager, "_load_adapter", _load_adapter)
    _wrap(LoRAModelRunnerMixin, "reset_lora_state", _reset_lora_state)


def _wrap(owner: Any, name: str, instead: Any) -> None:
    original = getattr(owner, name, None)
    if original is None or hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any) -> Any:
        return instead(original, self, *args)

    setattr(method, _INSTALLED, True)
    setattr(owner, name, method)


def _load_adapter(original: Any, manager: Any, request: Any) -> Any:
    """In place of ``WorkerLoRAManager._load_adapter``.

    Raises:
        AdapterRefused: other files are to be loaded under the served adapter's name, or vLLM loads something else.
    """
    adapter = next((each for each in _served if each.declared.name == request.lora_name), None)
    if adapter is None:
        return original(manager, request)
    if not adapter.declared.is_in(request.lora_path):
        raise AdapterRefused(
            f"adapter {request.lora_name!r} is written by rounds, and {request.lora_path} is not where it began; load"
            " those files under another name"
        )
    with adapter.files() as directory:
        loaded = original(manager, msgspec.structs.replace(request, lora_path=str(directory)))
    adapter.require_loaded(loaded)
    adapter.asked = LoadAsked(manager, request)
    return loaded


def _reset_lora_state(original: Any, runner: Any) -> None:
    """In place of ``LoRAModelRunnerMixin.reset_lora_state``, which drops all adapters when an update has finished: the
    base has not changed, and the adapter that was just loaded is to be served."""
    if not _served:
        original(runner)
