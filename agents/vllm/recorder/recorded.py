"""The layout of an inference rank, recorded from vLLM's own loader.

``load_hook`` calls ``record`` when a model has been loaded and before it is processed, and lets the recording finish
afterwards. ``recorded_layout`` turns it into what the agent announces, registers and refreshes.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from weightsync.agents.vllm.recorder.experts import expert_map_fingerprint, relocated
from weightsync.agents.vllm.recorder.facts import VllmFacts
from weightsync.orchestrator.protocol.layout import Layout

__all__ = [
    "RecordError",
    "Recorded",
    "Recording",
    "Unrecorded",
    "expert_map_fingerprint",
    "keep",
    "keep_draft",
    "record",
    "recorded_layout",
    "targets_of",
]

MAX_NAMES: Final = 8
"""Names in one line of the log: every layer of a model has the same ones."""

_ATTRIBUTE: Final = "_weightsync_recording"
_drafts: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of speculative decoding that this process has loaded."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What an inference rank needs to be written to.

    ``tensors`` are uint8 views of the regions' memory, in the order of ``layout.regions``. ``refresh`` brings kernel
    layouts and derived tensors up to date after a write and must run before the engine computes again. ``load`` fills
    everything from full logical tensors (any order, more than needed) and refreshes. ``unrecorded`` are bytes that stay
    as the engine's start left them, with the reason; ``unused`` are checkpoint tensors of which this rank needs nothing
    (other ranks' experts and layers, and what the model does not have, such as MTP layers). ``shadows`` are parameters
    whose target is a copy in the checkpoint's layout.
    """

    layout: Layout
    tensors: list[torch.Tensor]
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


def keep(recording: Recording) -> None:
    """Leave a finished recording with its model, for ``recorded_layout``; log what of the model is not written."""
    setattr(recording.model, _ATTRIBUTE, recording)
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


def keep_draft(model: nn.Module) -> None:
    """Remember that ``model``, of speculative decoding, was loaded too: no layout covers its weights."""
    _drafts.add(model)


def targets_of(model: nn.Module) -> Sequence[Target]:
    """The memory that a round writes in ``model``; its layout was recorded."""
    recording = getattr(model, _ATTRIBUTE)
    assert recording.finished is not None, "recorded_layout has refused it"
    targets: list[Target] = recording.finished.targets
    return targets


def recorded_layout(model: nn.Module, vllm_config: Any) -> Recorded:
    """The layout of ``model``, with everything needed to keep it current.

    Call it again when ``expert_map_fingerprint(model)`` is no longer that of the layout: experts have moved.

    Raises:
        RecordError: the model was not loaded under the hook, or speculation brings weights that no round would update.
    """
    recording = getattr(model, _ATTRIBUTE, None)
    if not isinstance(recording, Recording) or recording.finished is None:
        loader = getattr(getattr(vllm_config, "load_config", None), "load_format", "?")
        raise RecordError(
            f"{type(model).__name__} was loaded without the recorder: either weightsync's plugin was not active "
            f"then, or load format {loader!r} does not go through vLLM's BaseModelLoader"
        )
    if _drafts:
        names = ", ".join(sorted({type(draft).__name__ for draft in _drafts}))
        raise RecordError(f"speculative decoding with {names}: no layout covers weights of MTP layers or drafts")
    finished = recording.finished
    rows = build_rows(relocated(finished.targets, recording.model))
    layout = Layout(
        tensors=rows.tensors,
        regions=rows.regions,
        rows=rows.matrix().tobytes(),
        derived=tuple(finished.derived),
        expert_map=expert_map_fingerprint(recording.model),
    )

    def refresh() -> None:
        with torch.no_grad():
            for step in finished.refreshes:
                step()
            stale = finished.stale()
        if stale:
            raise RecordError(
                f"{bounded(stale)}: the engine's memory is not what was written: it has replaced or changed it since "
                "it loaded; restart the engine"
            )

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        fill(rows, weights)
        refresh()

    return Recorded(
        layout=layout,
        tensors=list(rows.memory),
        refresh=refresh,
        load=load,
        unrecorded=tuple(recording.unrecorded),
        unused=tuple(recording.unused),
        shadows=tuple(finished.shadows),
    )
