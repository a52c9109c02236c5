"""What tracing a model's loader says: where each checkpoint tensor lands, and what no tensor reaches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from weightsync.agents.recorder.blueprint import Blueprint, ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.interface import LayerFacts
from weightsync.agents.recorder.ledger import Ledger, stored_dtype
from weightsync.agents.recorder.settled import Settled, Unrecorded, judge_unreached, opaque_names, settle
from weightsync.agents.recorder.trace import Landing, RecordError


@dataclass(frozen=True, slots=True)
class Traced:
    """The landings of one model's loader. ``fed`` is the checkpoint as the loader was given it."""

    model: nn.Module
    engine: LayerFacts
    blueprint: Blueprint
    checkpoint: tuple[Checkpoint, ...]
    fed: tuple[Checkpoint, ...]
    settled: dict[int, Settled]
    unrecorded: tuple[Unrecorded, ...]

    @property
    def landings(self) -> list[Landing]:
        """All of them."""
        return [landing for state in self.settled.values() for landing in state.landings]

    @property
    def unused(self) -> list[str]:
        """Checkpoint tensors of which nothing lands in this model."""
        landed = {landing.source.name for landing in self.landings}
        return [entry.name for entry in self.checkpoint if entry.name not in landed]

    @property
    def translated(self) -> list[Checkpoint]:
        """Tensors that travel in another form than that which the checkpoint has them in."""
        return [entry for entry in self.fed if entry not in self.checkpoint]

    def ledger(self, names: Collection[str]) -> Ledger:
        """A ledger for the landings of the checkpoint tensors of these names."""
        wanted = set(names)
        landings = [landing for landing in self.landings if landing.source.name in wanted]
        tensors = [tensor for parameter in self.blueprint.parameters if (tensor := parameter.current()) is not None]
        return Ledger(landings, tensors[0].device if tensors else torch.device("cpu"))

    def compare(self, ledger: Ledger) -> None:
        """The model's memory, loaded and not yet processed, with what came.

        Raises:
            RecordError: they differ; names checkpoint tensors and parameters.
        """
        faults = ledger.differences(self._place)
        if faults:
            raise RecordError(
                "the model's loader does something with the values that its trace does not show; such weights cannot "
                f"be written: {'; '.join(faults)}"
            )

    def _place(self, landing: Landing) -> tuple[str, torch.Tensor | None]:
        parameter = self.by_storage[landing.storage]
        tensor = parameter.current()
        if tensor is None or tensor.untyped_storage().nbytes() != self._bytes(landing.storage):
            return parameter.name, None
        return parameter.name, landed(_whole(tensor), 0, landing)

    def _bytes(self, storage: int) -> int:
        return self.blueprint.storages[storage].untyped_storage().nbytes()

    @property
    def by_storage(self) -> dict[int, ParameterPlace]:
        """The first parameter in each storage."""
        first: dict[int, ParameterPlace] = {}
        for parameter in self.blueprint.parameters:
            first.setdefault(parameter.storage, parameter)
        return first


def trace_loader(model: nn.Module, checkpoint: Sequence[Checkpoint], engine: LayerFacts) -> Traced:
    """Where the loader of ``model`` puts the tensors of ``checkpoint``.

    Args:
        model: has a ``load_weights`` that takes pairs of name and tensor; loaded or not, but not yet processed. Its
            weights are not read.
        checkpoint: every tensor that the engine's own load is fed with, more if it skips some.
        engine: what is to be known about the engine that the model belongs to.

    Raises:
        RecordError: the loader does what bytes cannot follow, or leaves a parameter unfilled.
    """
    blueprint = Blueprint(model)
    fed = engine.as_fed(checkpoint, {parameter.name: parameter.dtype for parameter in blueprint.parameters})
    settled = settle(blueprint.trace(fed, cast(Any, model).load_weights))
    opaque = opaque_names(settled, blueprint.names)
    if opaque:
        raise RecordError(f"weights that are computed while they load cannot be written: {'; '.join(opaque)}")
    unrecorded = judge_unreached(blueprint.parameters, settled, engine.reason_to_stay)
    return Traced(model, engine, blueprint, tuple(checkpoint), tuple(fed), settled, tuple(unrecorded))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``'s storage from its beginning: landings count from there, whatever part the parameter is."""
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    with torch.no_grad():
        return view.set_(tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes(),), (1,))


def landed(tensor: torch.Tensor, start: int, landing: Landing) -> torch.Tensor:
    """The place of ``landing`` as a tensor of its box's shape; ``tensor`` lies at ``start`` bytes of its storage."""
    dtype = stored_dtype(landing)
    offset = landing.place.offset - start + tensor.storage_offset() * tensor.element_size()
    strides = tuple(stride // dtype.itemsize for stride in landing.place.strides)
    view = torch.empty(0, dtype=dtype, device=tensor.device)
    with torch.no_grad():
        return view.set_(tensor.untyped_storage(), offset // dtype.itemsize, landing.place.sizes, strides)
