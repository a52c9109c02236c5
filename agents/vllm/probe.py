"""A look at behaviour, once per start: does each kind of layer compute with the memory that a round writes?

Bytes that arrive where the layout says may still be bytes that nobody reads: a kernel may have packed a copy of the
weight when the model was loaded (vLLM's oneDNN path for linear layers on a CPU does). So for each distinct kind of
layer and parameter a layer is run, the parameter is changed where a round would write it, everything derived is
refreshed as after a round, and the layer is run again: its output bits must move. Then the bytes are put back.

One layer of each kind is run alone, by the method that its forward uses: a forward of the whole model would need the
KV cache, would start compilation, and without attention metadata its output does not depend on what attention reads.
It runs on the main thread before memory is profiled and graphs are captured. The cost grows with the number of kinds,
not with the number of layers.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.errors import AgentError
from weightsync.agents.recorder.rows import Target
from weightsync.agents.vllm.backend import logger
from weightsync.orchestrator.protocol.messages import Fault

PROBE_VARIABLE: Final = "WEIGHTSYNC_PROBE"
"""0 leaves the probe out, for a kernel that cannot run before an engine is ready."""

TOKENS: Final = 8
SEED: Final = 20260101
CHANGED_BYTES: Final = 64 * 1024 * 1024
"""Of one parameter, from its start: enough for every tile of a kernel, and little enough to keep on the host."""

OWN: Final = re.compile(r"(w13_|w2_)?bias|(?!.*input_scale).*(weight|scale|zero).*")
"""Names of what a layer itself computes with. Others are kept in it for somebody else (a gate's ``expert_bias`` and
``e_score_correction_bias`` are read by the experts' router), or not used by every kernel (``input_scale``)."""

Run = Callable[[], torch.Tensor]


class UnreadWeights(AgentError):
    """Layers of this engine do not compute with the memory that a round writes. Another vLLM or kernel is needed."""

    fault: Fault = "engine"


@dataclass(slots=True)
class Probe:
    """One kind of layer and one of its parameters: how to run the layer, and the memory that a round would write.

    ``together``: running it is collective over the tensor-parallel ranks.
    """

    name: str
    attribute: str
    run: Run
    memory: torch.Tensor
    together: bool = False
    before: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe of a model came to: names of parameters, one for each kind.

    ``unread``: the output does not depend on them. ``unknown``: with the reason why nobody can say.
    """

    read: tuple[str, ...]
    unread: tuple[str, ...]
    unknown: dict[str, str]


@torch.no_grad()
def probe(model: nn.Module, targets: Sequence[Target], refresh: Callable[[], None], vllm_config: Any = None) -> Probed:
    """Run one layer of each kind before and after a change of what a round would write. Leaves all bytes as they were.

    Args:
        model: loaded and processed.
        targets: the memory of the recorded layout.
        refresh: brings everything derived up to date, as after a round.
        vllm_config: for layers that need vLLM's forward context; without it experts are not probed.

    Raises:
        UnreadWeights: a layer's answer after the bytes were put back is not what it was before.
    """
    unknown: dict[str, str] = {}
    probes = [p for p in _kinds(model, targets, vllm_config) if _settles(p, unknown)]
    unread = []
    for attribute in sorted({p.attribute for p in probes}):
        chosen = [p for p in probes if p.attribute == attribute]
        undo = _change({p.memory.data_ptr(): p.memory for p in chosen}.values())
        try:
            refresh()
            still = [p for p in chosen if _same(p.run(), p.before)]
        finally:
            undo()
            refresh()
        if OWN.fullmatch(attribute):
            unread += [p.name for p in still]
        else:
            unknown |= {p.name: "its layer alone does not depend on it" for p in still}
    if torn := [p.name for p in probes if not _same(p.run(), p.before)]:
        raise UnreadWeights(f"{', '.join(torn)}: the layer answers otherwise after its bytes were put back")
    read = tuple(p.name for p in probes if p.name not in unread and p.name not in unknown)
    return Probed(read, tuple(unread), unknown)


def require(
    model: nn.Module, targets: Sequence[Target], refresh: Callable[[], None], vllm_config: Any = None
) -> dict[str, str]:
    """``probe``, and a refusal to start. Returns what could not be looked at, with the reason.

    Raises:
        UnreadWeights: naming the parameters.
    """
    if os.environ.get(PROBE_VARIABLE) == "0":
        logger.warning("weightsync: %s=0, so nobody has looked whether layers read what rounds write", PROBE_VARIABLE)
        return {"all parameters": f"{PROBE_VARIABLE} is 0"}
    found = probe(model, targets, refresh, vllm_config)
    if found.unread:
        raise UnreadWeights(
            f"{', '.join(found.unread)}: the layer computes with a copy that a round does not reach (its output does "
            "not change with the parameter); use a build or kernel of vLLM that reads the parameter itself"
        )
    logger.info("weightsync: one layer of each of %d kinds reads the memory that rounds write", len(found.read))
    for name, reason in found.unknown.items():
        logger.info("weightsync: %s was not probed: %s", name, reason)
    return found.unknown


# ------------------------------------------------------------------------------------------------------------- layers
def _kinds(model: nn.Module, targets: Sequence[Target], vllm_config: Any) -> Iterator[Probe]:
    """The first layer of each kind, for each of its parameters that a round writes."""
    by_owner = {(id(target.owner), target.attribute): target.tensor for target in targets}
    by_address = {target.tensor.data_ptr(): target.tensor for target in targets if target.tensor.numel()}
    runners = {id(module.routed_experts): module for module in model.modules() if hasattr(module, "routed_experts")}
    seen = set()
    for path, module in model.named_modules():
        own = {name for (owner, name) in by_owner if owner == id(module)}
        # A tied head is no owner of a target, but it may have packed the weight for itself.
        for attribute in sorted(own | {name for name, value in module._parameters.items() if value is not None}):
            parameter = module._parameters.get(attribute)
            memory = by_owner.get((id(module), attribute))
            if memory is None and parameter is not None:
                memory = by_address.get(parameter.data_ptr())
            if memory is None or not memory.numel():
                continue
            # Layers of one class may differ by what they are for (MLA's kv_b_proj is dropped after packing).
            leaf = path.rpartition(".")[2]
            kind = (leaf, type(module), type(getattr(module, "quant_method", None)), attribute, memory.dtype)
            if kind not in seen:
                seen.add(kind)
                name = f"{path}.{attribute}" if path else attribute
                experts = runners.get(id(module))
                run = _runner(module, memory, experts, vllm_config)
                yield Probe(name, attribute, run, memory, together=experts is not None)


def _runner(module: nn.Module, memory: torch.Tensor, experts: nn.Module | None, vllm_config: Any) -> Run:
    """How to run ``module`` alone, without collectives where that is possible. The result raises if nobody knows."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    layer: Any = module
    if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        ids = torch.arange(TOKENS, device=memory.device)
        return lambda: layer.quant_method.embedding(layer, ids)
    if isinstance(module, LinearBase | ParallelLMHead):
        width = getattr(layer, "input_size_per_partition", getattr(layer, "embedding_dim", None))
        inputs = _inputs(getattr(layer, "input_size", 0) if width is None else width, layer, memory)
        return lambda: layer.quant_method.apply(layer, inputs, getattr(layer, "bias", None))
    if experts is not None and vllm_config is not None:
        return _expert_runner(experts, memory, vllm_config)
    if "Norm" in type(module).__name__ and memory.ndim == 1:
        inputs = _inputs(memory.numel(), layer, memory)
        return lambda: layer(inputs)
    return lambda: _nobody_knows(module)


def _expert_runner(layer: Any, memory: torch.Tensor, vllm_config: Any) -> Run:
    from vllm.forward_context import set_forward_context

    if vllm_config.parallel_config.data_parallel_size > 1:
        return lambda: _nobody_knows(layer)  # its ranks exchange tokens, and they need not stand here together
    config = layer.routed_experts.moe_config
    hidden = _normal((TOKENS, config.hidden_dim), config.in_dtype, memory.device)
    logits = _normal((TOKENS, config.num_logical_experts), config.in_dtype, memory.device)

    def run() -> torch.Tensor:
        with set_forward_context(None, vllm_config, num_tokens=TOKENS):
            # Its own each time: vLLM declares that the layer may write into what it is given.
            output: torch.Tensor = layer(hidden.clone(), logits.clone())
        return output

    return run


def _inputs(width: int, layer: Any, memory: torch.Tensor) -> torch.Tensor:
    dtype = getattr(layer, "params_dtype", None) or getattr(layer, "orig_dtype", None) or memory.dtype
    return _normal((TOKENS, width), dtype, memory.device)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same numbers on every rank and device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _nobody_knows(module: nn.Module) -> torch.Tensor:
    raise NotImplementedError(f"no way is known to run a {type(module).__name__} alone")


def _settles(probe: Probe, unknown: dict[str, str]) -> bool:
    """Whether the layer runs here and answers the same twice; else nothing can be said about it."""
    reason = ""
    try:
        probe.before = _tensor(probe.run()).clone()
        if not _same(probe.run(), probe.before):
            reason = "the layer does not answer the same twice"
    except Exception as error:  # a layer that cannot run without a batch says nothing about what it reads
        reason = f"{type(error).__name__}: {error}"
    if probe.together and not _on_every_rank(not reason):
        reason = reason or "it does not run on every rank"
    if reason:
        unknown[probe.name] = reason
    return not reason


def _on_every_rank(says: bool) -> bool:
    """Whether all tensor-parallel ranks say so: they must run the layer equally often."""
    from torch.distributed import ReduceOp, all_reduce
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return says
    flag = torch.tensor([int(says)], dtype=torch.int32)
    all_reduce(flag, op=ReduceOp.MIN, group=group.cpu_group)
    return bool(flag.item())


# -------------------------------------------------------------------------------------------------------------- bytes
def _change(memories: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Change the beginning of every memory; the result puts the bytes back."""
    saved = []
    for memory in memories:
        part = _beginning(memory)
        saved.append((part, part.to("cpu", copy=True)))
        # Every second one, because a change that all experts have in common moves no router.
        some = part[..., ::2] if part.ndim else part
        if not memory.dtype.is_floating_point:
            some.bitwise_xor_(0x10)
        elif memory.element_size() > 1:
            some.mul_(0.5).add_(1.0)
        else:
            # One bit that changes zeros noticeably, too (to 2^-5 in float8_e4m3fn).
            some.view(torch.uint8).bitwise_xor_(0x10)

    def undo() -> None:
        for part, bytes_before in saved:
            part.copy_(bytes_before)

    return undo


def _beginning(memory: torch.Tensor) -> torch.Tensor:
    """The leading rows of ``memory``, a view; at least one."""
    if not memory.ndim:
        return memory
    row = max(1, memory.numel() // memory.shape[0]) * memory.element_size()
    # A router sends the probe's tokens to any expert, so all of them are changed.
    rows = memory.shape[0] if memory.ndim > 2 else max(1, CHANGED_BYTES // row)
    return memory[:rows]


def _same(output: Any, before: torch.Tensor) -> bool:
    """Equal bits; NaN is what it is."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (_tensor(output), before)]
    return torch.equal(*bits)


def _tensor(output: Any) -> torch.Tensor:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"a layer that returns {type(first).__name__}")
    return first
