"""One edge's cargo, made ready once for all rounds: of each chunk what is packed, and what leaves its slot as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from weightsync.agents.tables.cargo import cut_packing, cut_runs
from weightsync.agents.tables.runs import (
    RUN_LENGTH,
    RUN_LOCAL_OFFSET,
    RUN_LOCAL_REGION,
    RUN_REMOTE_OFFSET,
    RUN_REMOTE_REGION,
    pack_table,
    table_bytes,
)
from weightsync.agents.transport.nixl.chunks import Memory, filled_before, local_spans
from weightsync.agents.transport.nixl.errors import EdgeError
from weightsync.kernels.columns import COUNTS, DST_OFFSET, RUN_BYTES, SRC_OFFSET, SRC_REGION, SRC_STRIDE
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Layout, Matrix, Region

Descriptors = npt.NDArray[np.uint64]
"""``[n, 3]``: address, bytes, device."""


@dataclass(frozen=True, slots=True)
class CargoChunk:
    """One chunk: ``bytes`` of the layout in it, ``packed`` by ``pack`` into so many bytes of a place of the ring from
    ``packed_at`` on, and what leaves from where it lies. The first of ``remote`` is for what is packed, if anything is.
    ``needs``: how much of region 0 must be filled before (ALL if another region is read)."""

    number: int
    bytes: int
    packed: int
    pack: PreparedCopy | None
    straight: Descriptors
    remote: Descriptors
    needs: int = 0
    packed_at: int = 0

    def local(self, ring: Region, offset: int) -> Descriptors:
        """Where it is read, if what is packed lies ``offset`` bytes into the ``ring``."""
        if self.pack is None:
            return self.straight
        gathered = np.array([[ring.base + offset + self.packed_at, self.packed, ring.device]], np.uint64)
        return np.concatenate([gathered, self.straight])


@dataclass(frozen=True, slots=True)
class Cargo:
    """All chunks that are not prepared as plain writes, ascending; the kinds of memory at both ends."""

    berth: Berth
    chunks: tuple[CargoChunk, ...]
    local_memory: Memory
    remote_memory: Memory


def make_cargo(
    copies: Matrix,
    runs: Matrix,
    berth: Berth,
    layout: Layout,
    arenas: Sequence[torch.Tensor],
    remote: Sequence[Region],
) -> Cargo | None:
    """The cargo of one edge; None if none of it is packed and it lands as a whole: then its runs
    are plain writes.

    Args:
        copies, runs: of the edge's share.
        berth: of the edge.
        layout, arenas: this rank's own.
        remote: the peer's regions.

    Raises:
        EdgeError: the berth leaves its region, or the ring and the slots are different kinds of memory.
    """
    if berth.region >= len(remote) or berth.end > remote[berth.region].length:
        raise EdgeError(f"a berth of {berth.end} bytes in region {berth.region} of {len(remote)}, which has fewer")
    packing = cut_packing(pack_table(copies, layout), berth.chunk_bytes)
    lands = runs[runs[:, RUN_REMOTE_REGION] == berth.region] if berth.passes else runs[:0]
    straight = cut_runs(lands, berth.chunk_bytes)
    numbers = np.union1d(packing.chunk, straight.chunk).tolist()
    if not numbers:
        return None
    kinds = {layout.regions[region].memory for region in _regions(lands, layout, bool(len(packing.chunk)))}
    if len(kinds) > 1:
        raise EdgeError("the packing ring and the slots are different kinds of memory")
    there = remote[berth.region]
    chunks = []
    for number in numbers:
        rows, part = packing.of(number), straight.of(number)
        place = there.base + berth.place(number)
        at = int(rows[:, DST_OFFSET].min(initial=berth.chunk_bytes))
        packed = int((rows[:, DST_OFFSET] + _sizes(rows)).max(initial=at)) - at
        targets = [np.array([[place + at, packed, there.device]], np.uint64)] if packed else []
        targets.append(_descriptors(place + part[:, RUN_REMOTE_OFFSET], part, there.device))
        chunks.append(
            CargoChunk(
                number,
                table_bytes(rows) + int(part[:, RUN_LENGTH].sum()),
                packed,
                prepare_copy(arenas, arenas, rows) if packed else None,
                local_spans(layout.regions, part).descriptors(part[:, RUN_LENGTH]),
                np.concatenate(targets),
                int(np.concatenate([_packing_needs(rows), _straight_needs(part)]).max(initial=0)),
                at if packed else 0,
            )
        )
    return Cargo(berth, tuple(chunks), kinds.pop(), there.memory)


def _regions(runs: Matrix, layout: Layout, packs: bool) -> set[int]:
    """Own regions that the cargo is read from."""
    return {*np.unique(runs[:, RUN_LOCAL_REGION]).tolist(), *([layout.staging] if packs else [])}


def _straight_needs(runs: Matrix) -> Matrix:
    return filled_before(runs[:, RUN_LOCAL_REGION], runs[:, RUN_LOCAL_OFFSET] + runs[:, RUN_LENGTH])


def _packing_needs(rows: Matrix) -> Matrix:
    """As ``filled_before``, of what a packing table's ``rows`` read."""
    loops = sum((rows[:, column] - 1) * np.maximum(rows[:, column + SRC_STRIDE], 0) for column in COUNTS)
    return filled_before(rows[:, SRC_REGION], rows[:, SRC_OFFSET] + rows[:, RUN_BYTES] + loops)


def _sizes(rows: Matrix) -> Matrix:
    sizes: Matrix = rows[:, RUN_BYTES] * rows[:, list(COUNTS)].prod(axis=1)
    return sizes


def _descriptors(address: Matrix, runs: Matrix, device: int) -> Descriptors:
    return np.stack([address, runs[:, RUN_LENGTH], np.full(len(runs), device)], axis=1).astype(np.uint64)
