"""How the shards of gathered tensors reach their owners: one exchange for each dimension of the mesh that cuts them.

A shard lies at a coordinate of the mesh and is wanted at its owner's. It goes there one mesh dimension after the other,
the last one first, so that the groups that the mesh has anyway are enough and only owners receive. All of it is known
beforehand on every rank, from global shapes and the mesh alone. Pure: no tensor and no process group is touched here.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Coordinate = tuple[int, ...]
"""Of a rank in the mesh."""

Blob = tuple[int, Coordinate]
"""What one coordinate has of one journey: the journey's number, and the coordinate at which it begins."""


@dataclass(frozen=True, slots=True)
class Journey:
    """One tensor on its way to ``owner``.

    ``dims``: mesh dimensions that cut it; along the others all ranks have the same, and only the owner's take part.
    ``sizes``: bytes at each coordinate, 0 in the dimensions that do not cut it.
    """

    owner: Coordinate
    dims: frozenset[int]
    sizes: Mapping[Coordinate, int]

    def size(self, at: Coordinate) -> int:
        """Bytes of the shard at ``at``."""
        return self.sizes[tuple(index if dim in self.dims else 0 for dim, index in enumerate(at))]

    def begins_at(self, here: Coordinate) -> bool:
        """Whether the owner is sent what lies ``here``."""
        return all(here[dim] == self.owner[dim] for dim in range(len(here)) if dim not in self.dims) and bool(
            self.size(here)
        )

    def passes(self, here: Coordinate, dim: int) -> bool:
        """Whether shards of this tensor can be ``here`` when they are about to move along ``dim``."""
        return all(here[e] == self.owner[e] for e in range(len(here)) if e > dim or e not in self.dims)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective along mesh dimension ``dim``: what goes to each position of it, and what comes from each."""

    dim: int
    send: tuple[tuple[Blob, ...], ...]
    receive: tuple[tuple[Blob, ...], ...]


def exchanges(journeys: Sequence[Journey], shape: Sequence[int], here: Coordinate) -> Iterator[Exchange]:
    """All exchanges of ``journeys`` over a mesh of ``shape``, as the rank at ``here`` sees them.

    Their number and dimensions are the same on all ranks, also on those that have nothing to send.
    """
    for dim in reversed(range(len(shape))):
        if not any(dim in journey.dims for journey in journeys):
            continue
        send: list[list[Blob]] = [[] for _ in range(shape[dim])]
        receive: list[list[Blob]] = [[] for _ in range(shape[dim])]
        for number, journey in enumerate(journeys):
            if dim not in journey.dims or not journey.passes(here, dim):
                continue
            if journey.owner[dim] != here[dim]:
                send[journey.owner[dim]] += _blobs(number, journey, shape, here, dim)
                continue
            for position in range(shape[dim]):
                if position != here[dim]:
                    there = (*here[:dim], position, *here[dim + 1 :])
                    receive[position] += _blobs(number, journey, shape, there, dim)
        yield Exchange(dim, tuple(map(tuple, send)), tuple(map(tuple, receive)))


def _blobs(number: int, journey: Journey, shape: Sequence[int], there: Coordinate, dim: int) -> Iterator[Blob]:
    """What has gathered at ``there`` before it moves along ``dim``: of all positions of the later dimensions."""
    ranges = [range(extent) if e > dim and e in journey.dims else (there[e],) for e, extent in enumerate(shape)]
    yield from ((number, at) for at in itertools.product(*ranges) if journey.size(at))
