"""Settings of vLLM by which something beside the parameters holds weights, or moves them: refused before the load.

What can be drained or is followed is not here: the load balancer (``balancer``), derived tensors and kernel layouts
(``agents.vllm.recorder``). docs/engines.md lists all of them.
"""

from dataclasses import dataclass
from typing import Any, Final

from weightsync.agents.errors import AgentError
from weightsync.agents.vllm.holders import balancer


class HoldsWeights(AgentError):
    """A setting of this engine keeps copies of weights that no round would update. The configuration's fault."""


@dataclass(frozen=True, slots=True)
class Holder:
    """``setting``: the path of a field below ``VllmConfig``, refused when it is set and not 0 or false.

    ``why`` and ``fix`` are halves of the error's sentence.
    """

    setting: str
    why: str
    fix: str


_SLEEP_FIX: Final = "start without --enable-sleep-mode; a paused engine is what a round needs"
_OFFLOAD_FIX: Final = "start without offloading, with more ranks or a smaller KV cache"

HOLDERS: Final = (
    Holder(
        "model_config.enable_sleep_mode",
        "sleep mode allocates weights as virtual memory, which neither another process nor a NIC can map, and saves "
        "copies of them",
        _SLEEP_FIX,
    ),
    Holder(
        "model_config.enable_cumem_allocator",
        "vLLM then keeps weights in virtual memory of its own, which neither another process nor a NIC can map",
        "start without --enable-cumem-allocator",
    ),
    Holder(
        "offload_config.uva.cpu_offload_gb",
        "offloaded weights lie in host memory behind device addresses, which no writer can reach",
        _OFFLOAD_FIX,
    ),
    Holder("cache_config.cpu_offload_gb", "offloaded weights are copied to the device in each forward", _OFFLOAD_FIX),
    Holder(
        "offload_config.prefetch.offload_group_size",
        "layers are prefetched into buffers that hold the old weights across a round",
        _OFFLOAD_FIX,
    ),
    Holder(
        "engram_config.dp_shared_memory",
        "several ranks would write the same shared embedding tables",
        "start with dp_shared_memory false",
    ),
    Holder(
        "parallel_config.enable_elastic_ep",
        "ranks and experts' places change while the engine runs",
        "start without --enable-elastic-ep and add engines instead",
    ),
    Holder(
        "compilation_config.inductor_compile_config.freezing",
        "inductor's freezing makes constants of the weights in the compiled code",
        "take freezing out of inductor_compile_config",
    ),
)

DRAFTS_WITHOUT_WEIGHTS: Final = frozenset({"ngram", "ngram_gpu", "suffix"})
"""Methods of speculative decoding that guess from the text alone."""

RECORDED_DRAFTS: Final = frozenset({"draft_model", "eagle", "eagle3", "mtp"})
"""Methods whose drafter is one model, loaded as the engine's own is (``recorder.drafts``)."""

COPYING_DRAFTERS: Final = frozenset({"gemma4_mtp"})
"""Model types of drafters that keep gathered copies of weights (``Gemma4MTP._stable_full_lm_head_weight``)."""


def require(vllm_config: Any) -> None:
    """Refuse an engine in which something would keep old weights across a round.

    Args:
        vllm_config: vLLM's; fields that this vLLM does not have count as not set.

    Raises:
        HoldsWeights: with the setting, its value and what to do.
        BalancerUnknown: see ``balancer.require``.
    """
    for holder in HOLDERS:
        value = _value(vllm_config, holder.setting)
        if value:
            raise HoldsWeights(f"{holder.setting} is {value!r}: {holder.why}; {holder.fix}")
    _require_known_drafter(vllm_config)
    _require_no_frozen_constants(vllm_config)
    balancer.require(getattr(vllm_config, "parallel_config", None))


def _require_known_drafter(vllm_config: Any) -> None:
    """Other drafters are loaded by loaders that nobody watches, or keep copies of their weights."""
    method = _value(vllm_config, "speculative_config.method")
    if method is None or method in DRAFTS_WITHOUT_WEIGHTS:
        return
    known = ", ".join(sorted(DRAFTS_WITHOUT_WEIGHTS | RECORDED_DRAFTS))
    fix = f"use one of {known}, or start without --speculative-config"
    if method not in RECORDED_DRAFTS:
        raise HoldsWeights(
            f"speculative_config.method is {method!r}: no layout covers the weights of its drafter, so they would stay"
            f" those of the start; {fix}"
        )
    if _value(vllm_config, "speculative_config.parallel_drafting"):
        raise HoldsWeights(
            "speculative_config.parallel_drafting is True: its proposer keeps what it has computed from the drafter's"
            " weights; start without it"
        )
    kind = _value(vllm_config, "speculative_config.draft_model_config.hf_config.model_type")
    if kind in COPYING_DRAFTERS:
        raise HoldsWeights(
            f"speculative_config.draft_model_config.hf_config.model_type is {kind!r}: this drafter keeps a copy of the"
            f" whole head; {fix} with another drafter"
        )


def _require_no_frozen_constants(vllm_config: Any) -> None:
    """Freezing may also be switched on for the process, or by vLLM's CPU build while it compiles."""
    compilation = _value(vllm_config, "compilation_config")
    if compilation is None or not getattr(compilation, "mode", 0):  # CompilationMode.NONE: nothing is compiled
        return
    import torch._inductor.config as inductor

    if getattr(inductor, "freezing", False):
        raise HoldsWeights(
            "torch._inductor.config.freezing is True: it makes constants of the weights in the compiled code; unset "
            "TORCHINDUCTOR_FREEZING"
        )
    on_cpu = getattr(_value(vllm_config, "device_config"), "device_type", "") == "cpu"
    if on_cpu and _value(vllm_config, "compilation_config.inductor_compile_config.max_autotune"):
        raise HoldsWeights(
            "compilation_config.inductor_compile_config.max_autotune is True: vLLM's CPU build then compiles with "
            "freezing, which makes constants of the weights; start with --enforce-eager or without max_autotune"
        )


def _value(holder: Any, path: str) -> Any:
    """What ``path`` leads to, through attributes and the keys of dictionaries; None where it ends before."""
    for name in path.split("."):
        holder = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
        if holder is None:
            return None
    return holder
