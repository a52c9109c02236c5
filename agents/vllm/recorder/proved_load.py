"""One load of vLLM's, traced and proved: every landing holds what came for it, or the engine does not start.

The headers of the checkpoint's files tell beforehand what the loader will be fed, so that it can be traced first and
what passes can be digested. Without files (``load_format: dummy``) the values are made here, and vLLM's own loader puts
them into the real parameters, before it fills these in its own way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.ledger import Ledger, made_values
from weightsync.agents.recorder.recording import Recording
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.recorder.traced import Traced, trace_loader
from weightsync.agents.vllm.backend import logger
from weightsync.agents.vllm.recorder.checkpoint import checkpoint_of, files_of
from weightsync.agents.vllm.recorder.facts import VllmFacts


def proved_load(model: nn.Module, model_config: Any, load: Callable[[], None], *, drafter: bool = False) -> Recording:
    """A recording of ``model`` after ``load`` has filled it, which may run twice.

    Raises:
        RecordError: see :class:`weightsync.agents.recorder.recording.Recording`.
    """
    engine = VllmFacts(model_config.dtype, drafter)
    traced = _foretold(model, files_of(model_config), engine)
    if traced is not None:
        _prove_translated(traced)
    ledger = traced.ledger(_as_they_are(traced)) if traced else Ledger((), torch.device("cpu"))
    _load_through(model, ledger, load)
    if traced is None or not _covered(traced, ledger):
        checkpoint = list(ledger.seen.values()) or (traced and traced.checkpoint) or checkpoint_of(model, model_config)
        traced = trace_loader(model, checkpoint, engine)
        ledger = _load_again(traced, load, fed=bool(ledger.seen))
        _must_be_proved(ledger)
    began = time.monotonic()
    recording = Recording(traced, ledger)
    logger.info("weightsync: %d landings proved, %.2f s after loading", len(traced.landings), time.monotonic() - began)
    return recording


def _foretold(model: nn.Module, checkpoint: Sequence[Checkpoint], engine: VllmFacts) -> Traced | None:
    """A trace of what the files promise; None without any, or if the loader cannot be traced with all that is there."""
    if not checkpoint:
        return None
    try:
        return trace_loader(model, checkpoint, engine)
    except RecordError as error:
        # vLLM may read fewer files than there are; what it was fed is traced once it is known.
        logger.debug("weightsync: traced by the files' headers: %s", error)
        return None


def _load_again(traced: Traced, load: Callable[[], None], *, fed: bool) -> Ledger:
    """``load`` once more, now that it is known which boxes to digest; with made values if it reads none."""
    names = _as_they_are(traced) if fed else [entry.name for entry in traced.fed]
    ledger = traced.ledger(names)
    if fed:
        logger.info("weightsync: the loader is fed other tensors than its files promise; loads once more to prove them")
        _prove_translated(traced)
        _load_through(traced.model, ledger, load)
    else:
        logger.info("weightsync: no checkpoint is read; the loader is proved with made values")
        _load_made(traced, ledger, traced.fed)
        load()
    return ledger if fed else traced.ledger(())


def _prove_translated(traced: Traced) -> None:
    """What travels in another form than the checkpoint's is proved with made values in that form."""
    if traced.translated:
        _load_made(traced, traced.ledger([entry.name for entry in traced.translated]), traced.translated)


def _load_made(traced: Traced, ledger: Ledger, entries: Sequence[Checkpoint]) -> None:
    with torch.no_grad():
        cast(Any, traced.model).load_weights(ledger.watch(made_values(entries, ledger.device)))
    _must_be_proved(ledger)
    traced.compare(ledger)


def _load_through(model: nn.Module, ledger: Ledger, load: Callable[[], None]) -> None:
    """``load``, whose tensors pass through ``ledger`` on their way to the model."""
    original: Any = model.load_weights

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        return original(ledger.watch(weights), *args, **kwargs)

    cast(Any, model).load_weights = load_weights
    try:
        load()
    finally:
        del cast(Any, model).load_weights


def _as_they_are(traced: Traced) -> list[str]:
    translated = {entry.name for entry in traced.translated}
    return [entry.name for entry in traced.fed if entry.name not in translated]


def _covered(traced: Traced, ledger: Ledger) -> bool:
    """Whether all that landed came, and nothing came that was not traced."""
    known = {entry.name: entry for entry in traced.checkpoint}
    return (
        bool(ledger.seen)
        and not ledger.unproved()
        and all(known.get(name) == entry for name, entry in ledger.seen.items())
    )


def _must_be_proved(ledger: Ledger) -> None:
    if ledger.unproved():
        raise RecordError(f"the loader did not take {', '.join(ledger.unproved()[:8])} when it was fed once more")
