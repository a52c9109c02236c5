"""What the recorder must be told about an engine: facts that tracing its loader cannot show.

Each engine implements :class:`LayerFacts` once (vLLM: ``weightsync.agents.vllm.recorder.facts``). A recording asks it
for ``as_fed`` before it traces the loader, for ``reason_to_stay`` about parameters that the loader did not fill, for
``may_be_dropped``, ``kernel_layouts`` and ``derivations`` before the engine processes the loaded weights, and for
everything else afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.orchestrator.protocol.layout import Derived


@dataclass(frozen=True, slots=True)
class KernelLayout:
    """A layout that only a kernel reads, and how to make it from what the loader left.

    ``forward(parameter, loaded)`` gives the live tensor: ``loaded`` has the shape and dtype of the parameter before
    processing. It may raise LookupError where the layer has no such kernel after all. ``may_apply`` decides before
    processing whether a copy of the loaded parameter is kept.
    """

    name: str
    may_apply: Callable[[ParameterPlace], bool]
    forward: Callable[[ParameterPlace, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shadow:
    """A copy of a loaded parameter that receives the writes in place of one that the engine dropped or repacked."""

    parameter: ParameterPlace
    tensor: torch.Tensor


class Derivations(Protocol):
    """What the engine computes from its weights and keeps. Made before post-load processing, asked after it."""

    def refreshes(self, shadows: Sequence[Shadow]) -> list[Callable[[], None]]:
        """Functions that compute all of it anew, in place, from the weights (or ``shadows`` of those dropped)."""

    def appeared(self, accounted: set[int]) -> tuple[list[Derived], list[str]]:
        """Tensors that processing made: those that ``refreshes`` covers, and descriptions of those of unknown origin.

        ``accounted`` are data pointers of storages that hold targets and parameters; views of them are not new.
        """

    def refreshed(self) -> set[int]:
        """Keys (``contents.storage_key``) of the storages that ``refreshes`` bring up to date, or that stay right."""


class LayerFacts(Protocol):
    """One engine's knowledge of its own layers."""

    @property
    def kernel_layouts(self) -> tuple[KernelLayout, ...]:
        """Every kernel layout that can be made again after a write."""

    def as_fed(self, checkpoint: Sequence[Checkpoint], dtypes: Mapping[str, torch.dtype]) -> list[Checkpoint]:
        """The tensors to feed the loader with, for a model whose parameters have ``dtypes`` by name."""

    def reason_to_stay(self, parameter: ParameterPlace, whole: bool) -> str:
        """Why bytes that no checkpoint tensor fills are right as they are (all of the parameter if ``whole``).

        Empty if they are not, in which case the layout is refused.
        """

    def may_exchange_halves(self, parameter: ParameterPlace) -> bool:
        """Whether a kernel may want the two halves along dimension 1 in the other order."""

    def may_be_dropped(self, model: nn.Module) -> set[int]:
        """ids of the modules whose parameters processing may take away, so that copies must be kept."""

    def derivations(self, model: nn.Module) -> Derivations:
        """What this engine derives from the weights of ``model``, which is loaded and not yet processed."""
