"""An executor of plans that moves bytes as the tables say, and the check that they are where they belong.

It shares no code with the planner: it works on one byte address per element and byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    """The regions of every member; of every edge its cargo, and how often each byte of it was sent ``[2, bytes]``."""

    regions: dict[Member, list[Bytes]]
    written: dict[Member, list[npt.NDArray[np.int64]]]
    cargo: dict[tuple[Member, Member], Bytes] = field(default_factory=dict)


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
    """Fill the sources from ``full``, do every copy of every table, scatter what has landed."""
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
    for copy in table.tolist():
        peer, berth = part.peers[copy[COPY_PEER]], part.berths[copy[COPY_PEER]]
        low, extent = copy[COPY_BOX:COPY_REMOTE:2], copy[COPY_BOX + 1 : COPY_REMOTE : 2]
        values = rows[copy[COPY_ROW]]
        strides = values[ROW_BOX + 2 :: 3]
        item = ITEMSIZE[source.layout.tensors[values[0]].dtype]
        corner = values[2] + sum((a - b) * s for a, b, s in zip(low, values[ROW_BOX::3], strides, strict=True))
        data = own[values[1]][addresses(corner, extent, strides, item)]
        region, offset = copy[COPY_REMOTE], copy[COPY_REMOTE + 1]
        place = addresses(offset, extent, copy[COPY_REMOTE + 2 :], item)
        layout = parties[peer].layout
        if region != layout.staging:
            assert copy[COPY_STAGED] == -1
            assert layout.lands == "live"
            memory.regions[peer][region][place] = data
            np.add.at(memory.written[peer][region], place.reshape(-1), 1)
            continue
        assert berth is not None
        assert copy[COPY_STAGED] in (-1, offset)
        cargo = memory.cargo.setdefault((source.member, peer), np.zeros((2, berth.bytes), np.uint8))
        cargo[0][place] = data
        np.add.at(cargo[1], place.reshape(-1), 1)


def scatter(plan: Plan, target: Party, memory: Memory) -> None:
    part = plan.part(target.member)
    own, layout = memory.regions[target.member], target.layout
    room = layout.regions[layout.staging].length if layout.staging >= 0 else 0
    used = np.zeros(room, np.uint8)
    for peer, berth in zip(part.peers, part.berths, strict=True):
        if berth is not None:
            assert plan.part(peer).berths[plan.part(peer).peers.index(target.member)] == berth
            length = min(berth.bytes, berth.places * berth.chunk_bytes)
            used[berth.offset : berth.offset + length] += 1
            assert berth.offset + length <= room
            assert layout.lands != "copy" or length == berth.bytes
    assert used.max(initial=0) <= 1, "each edge has a part of the landing of its own"
    rows = target.layout.matrix().tolist()
    for copy in as_matrix(part.copies, COPY_COLUMNS).tolist():
        cargo = memory.cargo[part.peers[copy[COPY_PEER]], target.member]
        assert cargo[1].max() <= 1, "each byte of a cargo is sent once"
        low, extent = copy[COPY_BOX:COPY_REMOTE:2], copy[COPY_BOX + 1 : COPY_REMOTE : 2]
        values = rows[copy[COPY_ROW]]
        strides = values[ROW_BOX + 2 :: 3]
        item = ITEMSIZE[target.layout.tensors[values[0]].dtype]
        corner = values[2] + sum((a - b) * s for a, b, s in zip(low, values[ROW_BOX::3], strides, strict=True))
        place = addresses(corner, extent, strides, item)
        at = copy[COPY_STAGED]
        assert cargo[1][at : at + place.size].all()
        own[values[1]][place] = cargo[0][at : at + place.size].reshape(place.shape)
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
            np.testing.assert_array_equal(memory.written[target.member][region], expected)
