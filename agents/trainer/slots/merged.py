"""Low-rank adapters merged into their weights on the way to the slots: ``W = base + scale · B · A``, in float32."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.errors import AdapterError
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.fitness import refuse_unfit
from weightsync.agents.trainer.slots.whole import whole_tensors

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
    """A state with adapters: the mapping gives bases; ``local`` computes a merged weight, anew each time.

    Args:
        bare: all other tensors, and for each weight of ``merges`` its base under the weight's name.
        merges: by the weight's name.
        factors: the adapters' tensors by their own names.

    Raises:
        UnfitTensor, UnsupportedPlacement: a base or a factor that can be no weight, or is sharded in another way.
        AdapterError: shapes that do not belong together.
    """

    def __init__(
        self,
        bare: Mapping[str, torch.Tensor],
        merges: Mapping[str, Merge],
        factors: Mapping[str, torch.Tensor],
    ) -> None:
        self._bare = bare
        self._merges = merges
        for name in sorted(merges):
            _check(name, bare.get(name), merges[name], factors)
        self._given = factors
        self._factors: Mapping[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._bare[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bare)

    def __len__(self) -> int:
        return len(self._bare)

    def is_merged(self, name: str) -> bool:
        """Whether the tensor is the base of a weight with adapters."""
        return name in self._merges

    @torch.no_grad()
    def gather(self) -> None:
        """Have all factors on this rank, so that ``local`` needs no other. Collective where they are sharded."""
        if self._factors is None:
            adapters = [adapter for name in sorted(self._merges) for adapter in self._merges[name].adapters]
            keys = [key for adapter in adapters for key in (adapter.a, adapter.b)]
            self._factors = whole_tensors({key: self._given[key] for key in keys}, torch.float32)

    @torch.no_grad()
    def local(self, name: str) -> torch.Tensor:
        """What this rank holds of a merged weight, in float32 and otherwise like its base. After ``gather``."""
        assert self._factors is not None, "gather() comes first"
        base = self._bare[name]
        held = base.to_local() if isinstance(base, DTensor) else base
        merged = like_merged(held).copy_(held)
        share = local_share(name, base)
        with torch.autocast(held.device.type, enabled=False):  # a trainer may publish from within its own
            for adapter in self._merges[name].adapters:
                a, b = (self._factors[key].to(held.device) for key in (adapter.a, adapter.b))
                for part in share.boxes:
                    rows, columns = part.box.slices
                    delta = (b[columns] @ a[:, rows]).T if adapter.transposed else b[rows] @ a[:, columns]
                    merged[part.local] += delta * adapter.scale
        return merged


def like_merged(base: torch.Tensor) -> torch.Tensor:
    """Memory for the merged weight of a local ``base``, with all that a prepared conversion depends on."""
    return torch.empty_like(base, dtype=torch.float32, requires_grad=False)


def together(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of the slots that may be converted in one go.

    All that hold no merged weight are one group; the others are groups of at most MERGED_BYTES, or of one slot.

    Args:
        sizes: bytes of the merged weights that each slot is converted from.
    """
    plain = [number for number, size in enumerate(sizes) if not size]
    if plain:
        yield plain
    group, held = list[int](), 0
    for number, size in enumerate(sizes):
        if not size:
            continue
        if group and held + size > MERGED_BYTES:
            yield group
            group, held = [], 0
        group.append(number)
        held += size
    if group:
        yield group


def _check(name: str, base: torch.Tensor | None, merge: Merge, factors: Mapping[str, torch.Tensor]) -> None:
    if base is None:
        raise AdapterError(name, f"it has adapters, and the state has no {merge.base}; give merged weights")
    refuse_unfit(merge.base, base)
    for adapter in merge.adapters:
        a, b = factors[adapter.a], factors[adapter.b]
        for key, factor in ((adapter.a, a), (adapter.b, b)):
            refuse_unfit(key, factor)
            local_share(key, factor)
        expected = tuple(reversed(base.shape)) if adapter.transposed else tuple(base.shape)
        fits = a.dim() == b.dim() == base.dim() == 2 and a.shape[0] == b.shape[1]
        if not fits or (b.shape[0], a.shape[1]) != expected:
            raise AdapterError(
                name,
                f"{adapter.b} {tuple(b.shape)} times {adapter.a} {tuple(a.shape)} is no addition to {merge.base}"
                f" {tuple(base.shape)}; only matrices are merged on the way",
            )
