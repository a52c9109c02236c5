"""The trainer's tensors by name, from whatever a training script has at hand."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from weightsync.agents.trainer.sources.modules import module_tensors
from weightsync.agents.trainer.sources.names import plain_state
from weightsync.agents.trainer.sources.unread import refuse_trained, unread

StateSource = Callable[[], Mapping[str, torch.Tensor]] | Mapping[str, torch.Tensor] | torch.nn.Module

log = logging.getLogger(__name__)


def current_state(source: StateSource) -> dict[str, torch.Tensor]:
    """All tensors of ``source`` now, by the model's own names without those of wrappers. Nothing is copied.

    Of a module: what its ``state_dict`` gives, tied tensors under each of their names.

    Raises:
        UnfitTensor: a module that is sharded by FSDP1.
        AmbiguousName: two tensors would have one name without their wrappers'.
    """
    if isinstance(source, torch.nn.Module):
        return plain_state(module_tensors(source))
    return plain_state(source if isinstance(source, Mapping) else source())


class TrainerSource:
    """What a training script gave to publish from, read anew at each publish.

    Args:
        source: the model, a mapping, or a callable that returns the current state.
        ignore: patterns (``fnmatch``) of names that no engine is to get although they are trained: value heads,
            prediction layers.
    """

    def __init__(self, source: StateSource, *, ignore: Sequence[str] = ()) -> None:
        self._source = source
        self._ignore = tuple(ignore)
        self._told: tuple[str, ...] = ()

    def state(self) -> dict[str, torch.Tensor]:
        """See ``current_state``."""
        return current_state(self._source)

    def account_for(self, state: Mapping[str, torch.Tensor], read: Collection[str]) -> None:
        """That all that is trained is among ``read``; whatever else nobody reads is logged when it changes.

        Raises:
            UnreadTensors: trained tensors that no engine would get.
        """
        left = unread(state, read, self._ignore)
        refuse_trained(state, left, read)
        if left != self._told:
            self._told = left
            log.info("%d tensors of the trainer are read by nobody: %s", len(left), ", ".join(left))
