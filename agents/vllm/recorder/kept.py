"""What is kept of a recording for as long as the model lives: no more, because it holds on to memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import nn
from weightsync.agents.recorder.recording import Finished, Recording
from weightsync.agents.recorder.rows import Target
from weightsync.agents.recorder.settled import Unrecorded
from weightsync.agents.recorder.trace import RecordError

_ATTRIBUTE: Final = "_weightsync_recording"


@dataclass(slots=True)
class Kept:
    """A finished recording of ``model``. ``names`` are all tensors of its checkpoint.

    ``prefix``: what the names of its tensors begin with on the wire.
    """

    model: nn.Module
    finished: Finished
    unrecorded: list[Unrecorded]
    names: tuple[str, ...]
    prefix: str = ""

    def named(self, targets: Iterable[Target]) -> list[Target]:
        """``targets`` with the names of their tensors as they are on the wire."""
        if not self.prefix:
            return list(targets)
        return [
            replace(
                target,
                landings=tuple(
                    replace(landing, source=replace(landing.source, name=self.prefix + landing.source.name))
                    for landing in target.landings
                ),
            )
            for target in targets
        ]


def attach(recording: Recording, prefix: str) -> None:
    """Leave what a finished recording came to with its model."""
    assert recording.finished is not None, "it is kept when it is finished"
    landed = {landing.source.name for target in recording.finished.targets for landing in target.landings}
    names = (*recording.unused, *sorted(landed))
    kept = Kept(recording.model, recording.finished, list(recording.unrecorded), names, prefix)
    setattr(recording.model, _ATTRIBUTE, kept)


def kept_of(model: nn.Module, vllm_config: Any = None) -> Kept:
    """What ``attach`` has left.

    Raises:
        RecordError: nothing: the model was not loaded under the hook.
    """
    kept = getattr(model, _ATTRIBUTE, None)
    if not isinstance(kept, Kept):
        loader = getattr(getattr(vllm_config, "load_config", None), "load_format", "?")
        raise RecordError(
            f"{type(model).__name__} was loaded without the recorder: either weightsync's plugin was not active "
            f"then, or load format {loader!r} does not go through vLLM's BaseModelLoader"
        )
    return kept
