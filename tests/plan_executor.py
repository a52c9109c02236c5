"""An executor of plans that moves bytes as the tables say, and the check that they are where they belong.

It shares no code with the planner: it works on one byte address per element and byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.planner import Party, Plan
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_COLUMNS,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    ITEMSIZE,
    ROW_BOX,
    Tensor,
    as_matrix,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK
from weightsync.orchestrator.protocol.names import Member

Bytes = npt.NDArray[np.uint8]


def addresses(offset: int, extent: Sequence[int], stride: Sequence[int], item: int) -> npt.NDArray[np.int64]:
    """Byte addresses ``[elements, item]`` of a box in row-major order."""
    place = np.array([offset], np.int64)
    for n, step in zip(extent, stride, strict=True):
        place = (place[:, None] + np.arange(n) * step).reshape(-1)
    return place[:, None] + np.arange(item)


def slice_of(full: Bytes, low: Sequence[int], extent: Sequence[int]) -> Bytes:
    """The bytes ``[elements, item]`` of a box of a tensor ``[*padded shape, item]``."""
    index = tuple(slice(a, a + n) for a, n in zip(low, extent, strict=True))
    return full[index].reshape(-1, full.shape[-1])


@dataclass
class Memory:
    """The regions of every member."""

    regions: dict[Member, list[Bytes]]
    written: dict[Member, list[npt.NDArray[np.int64]]]


def full_tensors(parties: Sequence[Party], seed: int) -> dict[str, Bytes]:
    rng = np.random.default_rng(seed)
    full = {}
    for tensor in dict.fromkeys(t for p in parties for t in p.layout.tensors):
        shape = (1,) * (MAX_RANK - len(tensor.shape)) + tensor.shape
        full[tensor.name] = rng.integers(0, 256, (*shape, ITEMSIZE[tensor.dtype]), np.uint8)
    return full


def row_bytes(party: Party, index: int) -> tuple[Tensor, int, npt.NDArray[np.int64], list[int], list[int]]:
    """Of one row: tensor, region, byte addresses, box offset and extent."""
    values = party.layout.matrix()[index].tolist()
    tensor = party.layout.tensors[values[0]]
    low, extent, stride = values[ROW_BOX::3], values[ROW_BOX + 1 :: 3], values[ROW_BOX + 2 :: 3]
    return tensor, values[1], addresses(values[2], extent, stride, ITEMSIZE[tensor.dtype]), low, extent


def execute(plan: Plan, sources: Sequence[Party], targets: Sequence[Party], full: Mapping[str, Bytes]) -> Memory:
    """Fill the sources from ``full``, do every copy of every table, scatter what arrived packed."""
    parties = {p.member: p for p in (*sources, *targets)}
    memory = Memory(
        {m: [np.zeros(r.length, np.uint8) for r in p.layout.regions] for m, p in parties.items()},
        {m: [np.zeros(r.length, np.int64) for r in p.layout.regions] for m, p in parties.items()},
    )
    for source in sources:
        for index in range(len(source.layout.matrix())):
            tensor, region, place, low, extent = row_bytes(source, index)
            memory.regions[source.member][region][place] = slice_of(full[tensor.name], low, extent)
    for source in sources:
        send(plan, source, parties, memory)
    for target in targets:
        scatter(plan, target, memory)
    return memory


def send(plan: Plan, source: Party, parties: Mapping[Member, Party], memory: Memory) -> None:
    part = plan.part(source.member)
    table = as_matrix(part.copies, COPY_COLUMNS)
    own = memory.regions[source.member]
    rows = source.layout.matrix().tolist()
    packed: dict[Member, list[tuple[int, int, int, int]]] = {}
    for copy in table.tolist():
        peer = part.peers[copy[COPY_PEER]]
        low, extent = copy[COPY_BOX:COPY_REMOTE:2], copy[COPY_BOX + 1 : COPY_REMOTE : 2]
        values = rows[copy[COPY_ROW]]
        strides = values[ROW_BOX + 2 :: 3]
        item = ITEMSIZE[source.layout.tensors[values[0]].dtype]
        corner = values[2] + sum((a - b) * s for a, b, s in zip(low, values[ROW_BOX::3], strides, strict=True))
        data = own[values[1]][addresses(corner, extent, strides, item)]
        region, offset = copy[COPY_REMOTE], copy[COPY_REMOTE + 1]
        if copy[COPY_STAGED] < 0:
            place = addresses(offset, extent, copy[COPY_REMOTE + 2 :], item)
            memory.regions[peer][region][place] = data
            np.add.at(memory.written[peer][region], place.reshape(-1), 1)
        else:
            at = copy[COPY_STAGED]
            own[source.layout.staging][at : at + data.size] = data.reshape(-1)
            assert region == parties[peer].layout.staging
            packed.setdefault(peer, []).append((at, offset, data.size, region))
    for peer, pieces in packed.items():
        pieces.sort()
        assert all(a + size == b for (a, _, size, _), (b, *_) in pairwise(pieces)), "an edge's packed bytes are one run"
        assert len({a - b for a, b, _, _ in pieces}) == 1
        start, remote, region = pieces[0][0], pieces[0][1], pieces[0][3]
        length = sum(size for _, _, size, _ in pieces)
        memory.regions[peer][region][remote : remote + length] = own[source.layout.staging][start : start + length]
        memory.written[peer][region][remote : remote + length] += 1


def scatter(plan: Plan, target: Party, memory: Memory) -> None:
    part = plan.part(target.member)
    own = memory.regions[target.member]
    rows = target.layout.matrix().tolist()
    for copy in as_matrix(part.copies, COPY_COLUMNS).tolist():
        assert 0 <= copy[COPY_PEER] < len(part.peers)
        low, extent = copy[COPY_BOX:COPY_REMOTE:2], copy[COPY_BOX + 1 : COPY_REMOTE : 2]
        values = rows[copy[COPY_ROW]]
        strides = values[ROW_BOX + 2 :: 3]
        item = ITEMSIZE[target.layout.tensors[values[0]].dtype]
        corner = values[2] + sum((a - b) * s for a, b, s in zip(low, values[ROW_BOX::3], strides, strict=True))
        place = addresses(corner, extent, strides, item)
        at = copy[COPY_STAGED]
        own[values[1]][place] = own[target.layout.staging][at : at + place.size].reshape(place.shape)
        np.add.at(memory.written[target.member][values[1]], place.reshape(-1), 1)


def assert_delivered(targets: Sequence[Party], full: Mapping[str, Bytes], memory: Memory) -> None:
    """Every row holds its slice of the full tensor, and each of its bytes was written once, and no other byte."""
    for target in targets:
        due = [np.zeros(r.length, np.int64) for r in target.layout.regions]
        for index in range(len(target.layout.matrix())):
            tensor, region, place, low, extent = row_bytes(target, index)
            np.testing.assert_array_equal(
                memory.regions[target.member][region][place], slice_of(full[tensor.name], low, extent)
            )
            due[region][place] += 1
        for region, expected in enumerate(due):
            if region != target.layout.staging:
                np.testing.assert_array_equal(memory.written[target.member][region], expected)
        if target.layout.staging >= 0:
            assert memory.written[target.member][target.layout.staging].max(initial=0) <= 1
