"""Drafters of speculative decoding: recorded like the model that they draft for, and written with it in one round.

A drafter's tensors are named as in its checkpoint. MTP layers lie in the checkpoint of the model itself; a drafter with
a checkpoint of its own has its names below ``draft.``.

vLLM loads a drafter after the model, and then lets it share the model's embedding and head where it has none of its own
(or the same ones). What it shares is the model's to write.

Who does not train a drafter may leave it as the engine has loaded it: its guesses get worse, and every one is checked
by the model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from torch import nn
from weightsync.agents.recorder.settled import Unrecorded
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.vllm.holders.settings import DRAFTS_WITHOUT_WEIGHTS
from weightsync.agents.vllm.recorder.facts import SHARED
from weightsync.agents.vllm.recorder.kept import Kept

PREFIX: Final = "draft."

VARIABLE: Final = "WEIGHTSYNC_DRAFTER"
KEEP: Final = "keep"
"""Value of that variable by which drafters are not written."""

T = TypeVar("T")
_drafters: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""That this process has loaded, and that rounds write."""
_left: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Those that rounds leave as they are."""


def prefix_of(vllm_config: Any, model_config: Any) -> str | None:
    """What the names of a drafter's tensors begin with; None for a model that is no drafter."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None or speculative.method in DRAFTS_WITHOUT_WEIGHTS:
        return None
    if model_config is not speculative.draft_model_config:
        return None
    return "" if model_config.model == speculative.target_model_config.model else PREFIX


def are_left() -> bool:
    """Whether the server's environment leaves drafters as they are.

    Raises:
        RecordError: it says something else.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", KEEP):
        raise RecordError(f"{VARIABLE} is {value!r}; unset it, or set it to {KEEP!r} to leave drafters as they start")
    return value == KEEP


def leave(drafter: nn.Module) -> None:
    """``drafter`` was loaded in this process, and rounds do not write it."""
    _left.add(drafter)


def left_as_started(model: nn.Module) -> list[Unrecorded]:
    """Parameters of drafters that rounds leave as they are, but those that they share with ``model``."""
    theirs = set(map(id, model.parameters()))
    reason = f"a drafter, which {VARIABLE}={KEEP} leaves as the engine loaded it"
    return [
        Unrecorded(f"{PREFIX}{name}", parameter.numel() * parameter.element_size(), reason)
        for drafter in _left
        for name, parameter in drafter.named_parameters()
        if id(parameter) not in theirs
    ]


def remember(drafter: nn.Module) -> None:
    """``drafter`` was loaded in this process, and rounds write it."""
    _drafters.add(drafter)


def drafters() -> list[nn.Module]:
    """Those of this process that rounds write."""
    return list(_drafters)


def require_loaded(vllm_config: Any) -> None:
    """That the drafter of this configuration was loaded where the recorder saw it.

    Raises:
        RecordError: it was not.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None or speculative.method in DRAFTS_WITHOUT_WEIGHTS or _drafters or _left:
        return
    from vllm.distributed.parallel_state import get_pp_group

    if get_pp_group().is_last_rank:  # the others have no drafter
        raise RecordError(
            f"speculative_config.method is {speculative.method!r}, and no drafter was loaded through vLLM's"
            " BaseModelLoader, so that no layout covers its weights; start without --speculative-config"
        )


def let_go_of_shared(drafter: Kept, model: nn.Module) -> None:
    """Forget what ``drafter`` shares with ``model`` by now: it is written there, and the memory that it had is free.

    Raises:
        RecordError: a parameter has no tensor in the drafter's checkpoint, and it is not shared either.
    """
    theirs = {id(module) for module in model.modules()}
    mine = {
        name: module for name, module in drafter.model.named_modules(remove_duplicate=False) if id(module) not in theirs
    }
    owners = set(map(id, mine.values()))
    drafter.unrecorded = [entry for entry in drafter.unrecorded if _owner(entry.name) in mine]
    unfilled = [entry.name for entry in drafter.unrecorded if entry.reason == SHARED]
    if unfilled:
        raise RecordError(
            f"no tensor of the drafter's checkpoint reaches {', '.join(unfilled)}, and the drafter does not share it"
        )
    drafter.finished.targets = [target for target in drafter.finished.targets if id(target.owner) in owners]
    drafter.finished.places = _of(mine, drafter.finished.places)
    drafter.finished.contents = _of(mine, drafter.finished.contents)


def _of(modules: Mapping[str, nn.Module], by_parameter: Mapping[str, T]) -> dict[str, T]:
    return {name: value for name, value in by_parameter.items() if _owner(name) in modules}


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
