"""The shape of vLLM 0.33's ``WeightSource`` and ``ModuleSource``, for tests that run beside an older vLLM.

Written from ``vllm/distributed/weight_transfer/base.py`` of 0.33.0 (Apache-2.0, Copyright contributors to the vLLM
project): the fields of ParamMeta, the cached property, both ways of iterating, and how DTensors are declared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard


@dataclass(frozen=True)
class Replicate:
    """Every coordinate along this mesh axis holds the whole extent."""


@dataclass(frozen=True)
class Shard:
    """This mesh axis splits ``dim`` as torch.chunk does."""

    dim: int


@dataclass(frozen=True)
class ParamMeta:
    """One parameter of the whole model, the same on every rank."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    owners: tuple[int, ...] | None = None
    mesh_shape: tuple[int, ...] | None = None
    placements: tuple[Replicate | Shard, ...] | None = None


class ModuleSource:
    """``iter_full`` gathers; ``iter_local`` yields what lies here."""

    def __init__(self, module: torch.nn.Module, *, full: bool = True, local: bool = True) -> None:
        self._module, self._full, self._local = module, full, local

    @cached_property
    def metadata(self) -> list[ParamMeta]:
        return [self._meta(name, p) for name, p in self._module.named_parameters()]

    def implements_iter_full(self) -> bool:
        return self._full

    def implements_iter_local(self) -> bool:
        return self._local

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self._module.named_parameters():
            yield name, p.full_tensor() if isinstance(p, DTensor) else p

    def iter_local(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self._module.named_parameters():
            yield name, p.to_local() if isinstance(p, DTensor) else p

    @staticmethod
    def _meta(name: str, p: torch.Tensor) -> ParamMeta:
        if not isinstance(p, DTensor):
            return ParamMeta(name, p.dtype, tuple(p.shape))
        grid = p.device_mesh.mesh
        cuts = tuple(Shard(each.dim) if isinstance(each, TorchShard) else Replicate() for each in p.placements)
        owners, mesh = tuple(grid.flatten().tolist()), tuple(grid.shape)
        return ParamMeta(name, p.dtype, tuple(p.shape), owners, mesh, cuts)
