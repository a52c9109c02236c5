"""The trainer's tensors by name, from whatever a training script has at hand."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import torch
from weightsync.agents.trainer.errors import AmbiguousName
from weightsync.agents.trainer.slots.merged import Merge, MergedState
from weightsync.agents.trainer.slots.reading import State
from weightsync.agents.trainer.sources.lora import LoraMerge, Merges, declared_merges, peft_merges
from weightsync.agents.trainer.sources.modules import module_tensors
from weightsync.agents.trainer.sources.names import plain_names, plain_state
from weightsync.agents.trainer.sources.unread import refuse_trained, unread

StateSource = Callable[[], Mapping[str, torch.Tensor]] | Mapping[str, torch.Tensor] | torch.nn.Module

WANTED: Final = "give the model, a mapping from names to tensors, or a callable that returns such a mapping"

log = logging.getLogger(__name__)


def current_state(source: StateSource) -> dict[str, torch.Tensor]:
    """All tensors of ``source`` now, by the model's own names without those of wrappers. Nothing is copied.

    Of a module: what its ``state_dict`` gives, tied tensors under each of their names.

    Raises:
        TypeError: it is none of these, or has names that are no text.
        UnfitTensor: a module that is sharded by FSDP1.
        AmbiguousName: two tensors would have one name without their wrappers'.
    """
    if isinstance(source, torch.nn.Module):
        return plain_state(module_tensors(source))
    if not isinstance(source, Mapping) and not callable(source):
        raise TypeError(f"source is a {type(source).__name__}; {WANTED}")
    state = source if isinstance(source, Mapping) else source()
    if isinstance(state, torch.nn.Module):
        raise TypeError(f"source returned the module {type(state).__name__}; give it itself")
    if not isinstance(state, Mapping):
        raise TypeError(f"source returned a {type(state).__name__}; {WANTED}")
    wrong = next((name for name in state if not isinstance(name, str)), None)
    if wrong is not None:
        raise TypeError(f"source has the name {wrong!r}, which is a {type(wrong).__name__}; {WANTED}")
    return plain_state(state)


class TrainerSource:
    """What a training script gave to publish from, read anew at each publish.

    Args:
        source: the model, a mapping, or a callable that returns the current state. The adapters of a peft model are
            merged without further words.
        lora: how adapters of other names, or of a mapping, are merged; the first rule that fits a module counts.
        ignore: patterns (``fnmatch``) of names that no engine is to get although they are trained: value heads,
            prediction layers.
    """

    def __init__(self, source: StateSource, *, lora: Sequence[LoraMerge] = (), ignore: Sequence[str] = ()) -> None:
        self._source = source
        self._lora = tuple(lora)
        self._ignore = tuple(ignore)
        self._told: tuple[str, ...] = ()

    def state(self) -> State:
        """The tensors by the model's own names; of weights with adapters their bases, in a ``MergedState``.

        No rank waits for another.

        Raises:
            UnfitTensor, AmbiguousName: see ``current_state``.
            AdapterError: adapters that cannot be merged.
        """
        merges: dict[str, Merge] = {}
        if isinstance(self._source, torch.nn.Module):
            given = module_tensors(self._source)
            everything = plain_state(given)
            own = peft_merges(self._source, plain_names(given), everything)
            state = _without(everything, own)
            merges |= own.merges
        else:
            state = everything = current_state(self._source)
        if self._lora:
            declared = declared_merges(state, self._lora)
            state = _without(state, declared)
            merges |= declared.merges
        return MergedState(state, merges, everything) if merges else state

    def account_for(self, state: State, read: Collection[str]) -> None:
        """That all that is trained is among ``read``; whatever else nobody reads is logged when it changes.

        Raises:
            UnreadTensors: trained tensors that no engine would get.
        """
        left = unread(state, read, self._ignore)
        refuse_trained(state, left, read)
        if left != self._told:
            self._told = left
            log.info("%d tensors of the trainer are read by nobody: %s", len(left), ", ".join(left))


def _without(state: dict[str, torch.Tensor], found: Merges) -> dict[str, torch.Tensor]:
    """The state by the names that the model has without its adapters.

    Raises:
        AmbiguousName: the state has that name already.
    """
    if not found.renamed and not found.consumed:
        return state
    left: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        short = found.renamed.get(name, name)
        if name in found.consumed:
            continue
        if left.setdefault(short, tensor) is not tensor:
            raise AmbiguousName(name, short, short)
    return left
