"""The layout of an inference rank, recorded from vLLM's own loader.

``load_hook`` calls ``record`` when a model has been loaded and before it is processed, and lets the recording finish
afterwards. ``recorded_layout`` turns it into what the agent announces, registers and refreshes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.recording import Recording
from weightsync.agents.recorder.rows import Target, build_rows, fill
from weightsync.agents.recorder.settled import Unrecorded
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.recorder.traced import trace_loader
from weightsync.agents.vllm.backend import logger
from weightsync.agents.vllm.recorder import drafts
from weightsync.agents.vllm.recorder.experts import expert_map_fingerprint, relocated
from weightsync.agents.vllm.recorder.facts import VllmFacts
from weightsync.agents.vllm.recorder.kept import attach, kept_of
from weightsync.agents.vllm.recorder.quantized import quantization_name, quantized_of
from weightsync.orchestrator.protocol.layout import Derived, Layout

__all__ = [
    "RecordError",
    "Recorded",
    "Recording",
    "Unrecorded",
    "expert_map",
    "keep",
    "models_of",
    "record",
    "recorded_layout",
    "targets_of",
]

MAX_NAMES: Final = 8
"""Names in one line of the log: every layer of a model has the same ones."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What an inference rank needs to be written to.

    ``tensors`` are uint8 views of the regions' memory, in the order of ``layout.regions``. ``check`` raises if the
    engine has given parameters other memory since. ``refresh`` brings kernel layouts and derived tensors up to date
    after a write and must run before the engine computes again. ``load`` fills everything from full logical tensors
    (any order, more than needed) and refreshes. ``unrecorded`` are bytes that stay as the engine's start left them,
    with the reason; ``unused`` are checkpoint tensors of which this rank needs nothing (other ranks' experts and
    layers, and what the model does not have, such as MTP layers). ``shadows`` are parameters whose target is a copy in
    the checkpoint's layout.
    """

    layout: Layout
    tensors: list[torch.Tensor]
    check: Callable[[], None]
    refresh: Callable[[], None]
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], None]
    unrecorded: tuple[Unrecorded, ...]
    unused: tuple[str, ...]
    shadows: tuple[str, ...]


def record(model: nn.Module, model_config: Any, checkpoint: Sequence[Checkpoint]) -> Recording:
    """A recording of ``model``, just loaded by vLLM from the tensors of ``checkpoint`` and not yet processed.

    Args:
        model_config: vLLM's, whose ``dtype`` is that of the unquantised weights.

    Raises:
        RecordError: see :func:`weightsync.agents.recorder.traced.trace_loader`.
    """
    return Recording(trace_loader(model, checkpoint, VllmFacts(model_config.dtype)))


def keep(recording: Recording, draft_prefix: str | None = None) -> None:
    """Leave a finished recording with its model, for ``recorded_layout``; log what of the model is not written.

    ``draft_prefix``: what the names of a drafter's tensors begin with; None for the model itself.
    """
    attach(recording, draft_prefix or "")
    if draft_prefix is not None:
        drafts.remember(recording.model)
    by_reason: dict[str, list[str]] = defaultdict(list)
    for entry in recording.unrecorded:
        by_reason[entry.reason].append(entry.name)
    for reason, names in by_reason.items():
        logger.info("weightsync: stay as the engine started (%s): %s", reason, bounded(names))
    if recording.unused:
        logger.info("weightsync: checkpoint tensors that this rank needs nothing of: %s", bounded(recording.unused))
    if recording.finished is not None and recording.finished.shadows:
        logger.info("weightsync: written beside and made anew: %s", bounded(recording.finished.shadows))
    if recording.processing.looked:
        names = sorted(recording.processing.looked)
        logger.warning("weightsync: the engine looked at values of weights while it processed them: %s", bounded(names))


def bounded(names: Sequence[str]) -> str:
    """``names`` for people: how many, and the first of them."""
    more = ", …" if len(names) > MAX_NAMES else ""
    return f"{len(names)} ({', '.join(names[:MAX_NAMES])}{more})"


def models_of(model: nn.Module) -> list[nn.Module]:
    """``model`` and its drafters, whose layout is one."""
    return [model, *drafts.drafters()]


def targets_of(model: nn.Module) -> Sequence[Target]:
    """The memory that a round writes in ``model``, an engine's own or a drafter; its layout was recorded."""
    return kept_of(model).finished.targets


def expert_map(model: nn.Module) -> str:
    """Where the experts of ``model`` and of its drafters are now; see ``expert_map_fingerprint``."""
    return expert_map_fingerprint(*models_of(model))


def recorded_layout(model: nn.Module, vllm_config: Any) -> Recorded:
    """The layout of ``model`` and its drafters, with everything needed to keep it current.

    Call it again when ``expert_map(model)`` is no longer that of the layout: experts have moved.

    Raises:
        RecordError: a model was not loaded under the hook.
    """
    main = kept_of(model, vllm_config)
    drafts.require_loaded(vllm_config)
    parts = [main]
    for drafter in drafts.drafters():
        kept = kept_of(drafter, vllm_config)
        drafts.let_go_of_shared(kept, model)
        parts.append(kept)
    rows = build_rows([target for part in parts for target in part.named(relocated(part.finished.targets, part.model))])
    layout = Layout(
        tensors=rows.tensors,
        regions=rows.regions,
        rows=rows.matrix().tobytes(),
        derived=tuple(Derived(p.prefix + entry.name, entry.refresh) for p in parts for entry in p.finished.derived),
        expert_map=expert_map(model),
        quantized=quantized_of(rows.tensors, vllm_config),
        quantization=quantization_name(vllm_config),
    )

    def refresh() -> None:
        with torch.no_grad():
            for part in parts:
                for step in part.finished.refreshes:
                    step()
            stale = [part.prefix + name for part in parts for name in part.finished.stale()]
        if stale:
            raise RecordError(
                f"{bounded(stale)}: the engine's memory is not what its refresh makes of what was written: it has"
                " changed since the engine loaded; restart the engine"
            )

    def check() -> None:
        replaced = [part.prefix + name for part in parts for name in part.finished.replaced()]
        if replaced:
            raise RecordError(
                f"{bounded(replaced)}: the engine has given these parameters other memory since it loaded, which no"
                " version reaches; restart the engine"
            )

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        check()
        fill(rows, weights)
        refresh()

    needed = {tensor.name for tensor in rows.tensors}
    names = dict.fromkeys(part.prefix + name for part in parts for name in part.names)
    return Recorded(
        layout=layout,
        tensors=list(rows.memory),
        check=check,
        refresh=refresh,
        load=load,
        unrecorded=(
            *(replace(entry, name=part.prefix + entry.name) for part in parts for entry in part.unrecorded),
            *drafts.left_as_started(model),
        ),
        unused=tuple(name for name in names if name not in needed),
        shadows=tuple(part.prefix + name for part in parts for name in part.finished.shadows),
    )
