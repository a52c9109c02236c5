"""Which calls to workers an engine of ours takes from whoever reaches it: a list of those that are allowed.

vLLM hands any method name, and with insecure serialization any function, from ``/collective_rpc`` to its workers. A
round's digest was taken before such a call, so one that changed weights would be served unseen.
"""

import os
from collections.abc import Callable
from typing import Any, Final

ALLOW_VARIABLE: Final = "WEIGHTSYNC_ALLOW_CALLS"
"""Further names, separated by commas, that the operator of the server answers for: of methods of a worker extension,
or of functions as ``module.name``."""

OF_A_ROUND: Final = frozenset(
    {"init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"}
)
READING: Final = frozenset(
    {
        "check_health",
        "compute_weight_checksums",
        "execute_dummy_batch",
        "get_cache_block_size_bytes",
        "get_compilation_match_table",
        "get_encoder_timing_stats",
        "get_kv_cache_spec",
        "get_kv_connector_handshake_metadata",
        "get_model_inspection",
        "get_supported_kv_cache_layouts",
        "get_supported_tasks",
        "list_loras",
        "profile",
        "release_late_interaction_query_cache",
        "reset_encoder_cache",
        "reset_mm_cache",
        "save_sharded_state",
        "save_tensorized_model",
        "set_kv_cache_layout",
        "supports_draft_weight_updates",
        "synchronize_device",
        "update_max_model_len",
    }
)
"""Methods of vLLM's workers that leave every weight alone; the last is called while an engine starts."""
ADAPTERS: Final = frozenset({"add_lora", "remove_lora", "pin_lora"})
"""vLLM keeps adapters in memory of their own and never merges them into the weights."""
ALLOWED: Final = OF_A_ROUND | READING | ADAPTERS

_MOVES: Final = "it takes the weights from under memory that writers reach"
_CHANGES: Final = "it changes the weights outside of a round, unverified; use a round"
_EXPERTS: Final = "it makes the process groups and the experts' places anew; start another engine instead"
REFUSED: Final = {
    "apply_model": _CHANGES,
    "checkpoint_prepare": _MOVES,
    "checkpoint_restore": _MOVES,
    "discard": _MOVES,
    "elastic_ep_execute": _EXPERTS,
    "initialize_from_config": _MOVES,
    "load_model": _CHANGES,
    "reinitialize_distributed": _EXPERTS,
    "reload_weights": _CHANGES,
    "reset_weights": _CHANGES,
    "shutdown": "it ends the worker; stop the server instead",
    "shutdown_weight_transfer_engine": "the daemon needs the agent for as long as the server lives; stop the daemon or"
    " drain the engine there",
    "sleep": f"{_MOVES}; pause the engine instead",
    "start_draft_weight_update": "a round writes drafters together with their model",
    "update_config": "what was recorded and planned holds for the configuration that the engine started with",
    "wake_up": _MOVES,
}
"""Known methods that no operator can allow, and why."""


def refusal(method: str | Callable[..., Any]) -> str:
    """Why a call of ``method`` in the workers is refused; empty when it is allowed."""
    if isinstance(method, str):
        name, known = method, method in ALLOWED
    else:
        name = f"{getattr(method, '__module__', '?')}.{getattr(method, '__qualname__', repr(method))}"
        known = name.startswith("vllm.")
    if reason := REFUSED.get(name):
        return f"{name} is refused: {reason}"
    if known or name in _allowed_by_the_operator():
        return ""
    return (
        f"{name} is refused: nobody knows whether it changes weights after their digest was taken; if it does not, "
        f"start the server with {ALLOW_VARIABLE}={name}"
    )


def is_vouched_for(method: str | Callable[..., Any]) -> bool:
    """Whether ``method`` is allowed by the operator's word alone, or touches adapters: weights are looked at then."""
    if not isinstance(method, str):
        return not f"{getattr(method, '__module__', '')}.".startswith("vllm.")
    return method in ADAPTERS or method not in ALLOWED


def _allowed_by_the_operator() -> frozenset[str]:
    return frozenset(name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(","))
