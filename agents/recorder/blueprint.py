"""Meta-device copies of the model's parameters and buffers, to run its weight loader on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.contents import Checkpoint, in_bytes, storage_key, view_of
from weightsync.agents.recorder.operations import Watching
from weightsync.agents.recorder.trace import LoadTracer, RecordError, Write


@dataclass(frozen=True, slots=True)
class ParameterPlace:
    """An attribute of a module that holds a parameter or buffer, and what it held before post-load processing.

    ``storage`` is an index into ``Blueprint.storages``, ``place`` its geometry there, in bytes.
    """

    name: str
    module: nn.Module
    attribute: str
    buffer: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    place: StridedView

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def current(self) -> torch.Tensor | None:
        """What the attribute holds now; None if it has been removed."""
        value = getattr(self.module, self.attribute, None)
        return value if isinstance(value, torch.Tensor) else None


class Blueprint:
    """Meta-device stand-ins for every parameter and buffer of a model: same classes, attributes and aliasing."""

    def __init__(self, model: nn.Module) -> None:
        """Takes the model as it is now, which must be before its post-load processing.

        Raises:
            RecordError: a parameter has no memory yet (online quantisation, lazy parameters).
        """
        self._model = model
        self.parameters: list[ParameterPlace] = []
        self.storages: list[torch.Tensor] = []
        # Parallel to ``parameters``. Tied weights are one stand-in, because loaders compare parameters by identity.
        self._stand_ins: list[torch.Tensor] = []
        indices: dict[int, int] = {}
        made: dict[int, torch.Tensor] = {}
        for path, module in model.named_modules():
            for table, buffer in ((module._parameters, False), (module._buffers, True)):
                for attribute, tensor in table.items():
                    if tensor is None:
                        continue
                    name = f"{path}.{attribute}" if path else attribute
                    _must_have_memory(name, tensor)
                    real = buffer and _steers_loading(module, attribute, tensor)
                    index = indices.setdefault(storage_key(tensor), len(self.storages))
                    if index == len(self.storages):
                        self.storages.append(tensor if real else _meta_storage(tensor))
                    place = in_bytes(view_of(tensor), tensor.element_size())
                    shape = tuple(tensor.shape)
                    self.parameters.append(
                        ParameterPlace(name, module, attribute, buffer, shape, tensor.dtype, index, place)
                    )
                    if id(tensor) not in made:
                        made[id(tensor)] = tensor if real else _stand_in(tensor, self.storages[index])
                    self._stand_ins.append(made[id(tensor)])

    def trace(
        self, checkpoint: Sequence[Checkpoint], load: Callable[[Iterator[tuple[str, torch.Tensor]]], Any]
    ) -> list[Write]:
        """Run ``load`` (the model's ``load_weights``) over stand-ins only and return what it would have written.

        Raises:
            RecordError: the loader failed on them, or looked at a value.
        """
        tracer = LoadTracer(self.storages, [self.names[index] for index in range(len(self.storages))])
        with self._swapped(), torch.no_grad(), Watching(tracer):
            try:
                load(tracer.feed(checkpoint))
            except RecordError:
                raise
            except Exception as error:
                where = f" at {tracer.current}" if tracer.current else ""
                where += f", after {tracer.computed}" if tracer.computed else ""
                # A loader is foreign code and may raise anything; mostly torch says that meta tensors have no values.
                raise RecordError(f"the model's loader cannot run without the values{where}: {error}") from error
            self._adopt(tracer)
        for parameter, stand_in in zip(self.parameters, self._stand_ins, strict=True):
            if storage_key(stand_in) != storage_key(self.storages[parameter.storage]):
                raise RecordError(f"{parameter.name}: the loader replaces its memory instead of filling it")
        return tracer.writes

    def _adopt(self, tracer: LoadTracer) -> None:
        """What the loader put into parameters that it registered itself lands in those that the model has.

        Raises:
            RecordError: the model has no such parameter, or another attribute keeps something of the checkpoint.
        """
        own = {(id(p.module), p.attribute): t for p, t in zip(self.parameters, self._stand_ins, strict=True)}
        for path, module in self._model.named_modules():
            for table in (module._parameters, module._buffers, vars(module)):
                for attribute, tensor in table.items():
                    stand_in = own.get((id(module), attribute))
                    if not isinstance(tensor, torch.Tensor) or tensor is stand_in or not tracer.loaded(tensor):
                        continue
                    name = f"{path}.{attribute}" if path else attribute
                    if stand_in is None or (stand_in.shape, stand_in.dtype) != (tensor.shape, tensor.dtype):
                        raise RecordError(
                            f"{name}: the loader makes it of {tracer.describe([tensor])}, and the model has no such "
                            "parameter to write to"
                        )
                    tracer.copied(stand_in, tensor)

    @property
    def names(self) -> dict[int, str]:
        """A parameter's name for each storage: its first."""
        first: dict[int, str] = {}
        for parameter in self.parameters:
            first.setdefault(parameter.storage, parameter.name)
        return first

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """Put the stand-ins into the module tree; afterwards everything is as before, whatever the loader did."""
        modules = {id(parameter.module): parameter.module for parameter in self.parameters}.values()
        saved = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
        try:
            for parameter, stand_in in zip(self.parameters, self._stand_ins, strict=True):
                table: dict[str, Any] = parameter.module._buffers if parameter.buffer else parameter.module._parameters
                table[parameter.attribute] = stand_in
            yield
        finally:
            # The tables are filled anew, not replaced: a loader may have added, removed or reordered entries, and
            # other objects may hold the dictionaries themselves.
            for module, parameter_table, buffer_table in saved:
                module._parameters.clear()
                module._parameters.update(parameter_table)
                module._buffers.clear()
                module._buffers.update(buffer_table)


def _steers_loading(module: nn.Module, attribute: str, tensor: torch.Tensor) -> bool:
    """Expert maps and other index tables, which a loader reads: they stay real, and a copy into one is still seen."""
    return attribute in module._non_persistent_buffers_set and not tensor.is_floating_point()


def _must_have_memory(name: str, tensor: torch.Tensor) -> None:
    if isinstance(tensor, UninitializedTensorMixin) or tensor.is_meta:
        raise RecordError(
            f"{name} has no memory before loading: weights that are quantised or shaped while they load have no "
            "recordable layout; serve a checkpoint that is already in the serving format"
        )


def _meta_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device="meta")


def _stand_in(tensor: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    """A meta tensor over ``storage`` that passes for ``tensor``: same class, geometry and attributes."""
    with torch.no_grad():
        stand_in = torch.empty(0, dtype=tensor.dtype, device="meta")
        stand_in.set_(storage.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if isinstance(tensor, nn.Parameter):
        stand_in = nn.Parameter(stand_in, requires_grad=False)
        if type(tensor) is not nn.Parameter:
            # Engines subclass Parameter to carry weight loaders; their constructors would ask for more than a tensor.
            stand_in.__class__ = type(tensor)
    stand_in.__dict__.update(tensor.__dict__)
    return stand_in
