"""Low-rank adapters merged into their weights on the way to the slots: ``W = base + scale · B · A``, in float32."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.errors import AdapterError
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.fitness import refuse_unfit

MERGED_BYTES: Final = 256 * 1024 * 1024
"""Of merged weights that exist at a time while slots are converted; more would be a second model in memory."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One addition to a weight, by the names of its factors: A of shape [rank, in] and B of shape [out, rank].

    ``transposed``: the weight is [in, out] (embeddings, and the linear layers of GPT-2).
    """

    a: str
    b: str
    scale: float
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Merge:
    """A weight of the model: the name of its frozen base in the trainer's state, and what is added to it, in order."""

    base: str
    adapters: tuple[Adapter, ...]


class MergedState(Mapping[str, torch.Tensor]):
    """A state whose merged weights are computed, each time, when they are asked for.

    Making one is collective where adapters are sharded: they are gathered here, all of them on every rank, in the
    order of the names of their weights. What follows needs no other rank: each merges the shard that it holds.

    Args:
        bare: all other tensors, and for each weight of ``merges`` its base under the weight's name.
        merges: by the weight's name.
        factors: the adapters' tensors by their own names.

    Raises:
        UnfitTensor: a base or a factor that can be no weight.
        AdapterError: shapes that do not belong together.
    """

    def __init__(
        self,
        bare: Mapping[str, torch.Tensor],
        merges: Mapping[str, Merge],
        factors: Mapping[str, torch.Tensor],
    ) -> None:
        self.bare = bare
        self._merges = merges
        for name in sorted(merges):
            _check(name, bare.get(name), merges[name], factors)
        # After all checks, so that no rank waits in a collective for one that was refused.
        self._factors = {
            key: _whole(factors[key])
            for name in sorted(merges)
            for adapter in merges[name].adapters
            for key in (adapter.a, adapter.b)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        merge = self._merges.get(name)
        return self.bare[name] if merge is None else self._merged(name, merge)

    def __iter__(self) -> Iterator[str]:
        return iter(self.bare)

    def __len__(self) -> int:
        return len(self.bare)

    def __contains__(self, name: object) -> bool:
        return name in self.bare  # Mapping's own would merge to find out

    def is_merged(self, name: str) -> bool:
        """Whether the tensor is made anew each time."""
        return name in self._merges

    @torch.no_grad()
    def _merged(self, name: str, merge: Merge) -> torch.Tensor:
        base = self.bare[name]
        local = base.to_local() if isinstance(base, DTensor) else base
        merged = local.detach().to(torch.float32, copy=True)
        share = local_share(name, base)
        with torch.autocast(local.device.type, enabled=False):  # a trainer may publish from within its own
            for adapter in merge.adapters:
                a, b = (self._factors[key].to(local.device) for key in (adapter.a, adapter.b))
                for held in share.boxes:
                    rows, columns = held.box.slices
                    delta = (b[columns] @ a[:, rows]).T if adapter.transposed else b[rows] @ a[:, columns]
                    merged[held.local] += delta * adapter.scale
        if not isinstance(base, DTensor):
            return merged
        return DTensor.from_local(
            merged, base.device_mesh, base.placements, run_check=False, shape=base.shape, stride=base.stride()
        )


def together(keys: Sequence[Sequence[str]], state: Mapping[str, torch.Tensor]) -> Iterator[list[int]]:
    """Numbers of the slots that may be converted in one go; ``keys`` are the sources of each slot.

    All that hold no merged weight are one group; the others are groups of at most MERGED_BYTES, or of one slot.
    """
    if not isinstance(state, MergedState):
        yield list(range(len(keys)))
        return
    merged = [any(state.is_merged(key) for key in own) for own in keys]
    yield [number for number, made in enumerate(merged) if not made]
    group, size = list[int](), 0
    for number, own in enumerate(keys):
        if not merged[number]:
            continue
        nbytes = sum(4 * _local_elements(state.bare[key]) for key in own)
        if group and size + nbytes > MERGED_BYTES:
            yield group
            group, size = [], 0
        group.append(number)
        size += nbytes
    yield group


def _local_elements(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def _check(name: str, base: torch.Tensor | None, merge: Merge, factors: Mapping[str, torch.Tensor]) -> None:
    if base is None:
        raise AdapterError(name, f"it has adapters, and the state has no {merge.base}; give merged weights")
    refuse_unfit(merge.base, base)
    for adapter in merge.adapters:
        a, b = factors[adapter.a], factors[adapter.b]
        for key, factor in ((adapter.a, a), (adapter.b, b)):
            refuse_unfit(key, factor)
        expected = tuple(reversed(base.shape)) if adapter.transposed else tuple(base.shape)
        fits = a.dim() == b.dim() == base.dim() == 2 and a.shape[0] == b.shape[1]
        if not fits or (b.shape[0], a.shape[1]) != expected:
            raise AdapterError(
                name,
                f"{adapter.b} {tuple(b.shape)} times {adapter.a} {tuple(a.shape)} is no addition to {merge.base}"
                f" {tuple(base.shape)}; only matrices are merged on the way",
            )


def _whole(factor: torch.Tensor) -> torch.Tensor:
    """All of a factor in float32, on this rank."""
    whole = factor.full_tensor() if isinstance(factor, DTensor) else factor
    return whole.detach().to(torch.float32)
