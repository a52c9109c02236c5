"""One edge's cargo: each byte of it in one chunk, from where it is packed or from where it lies."""

import numpy as np
import pytest
import torch
from layouts import Builder, copies_of, engine_rank, trainer
from msgspec import structs
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.tables.runs import runs
from weightsync.agents.transport.nixl.cargo import make_cargo
from weightsync.agents.transport.nixl.errors import EdgeError
from weightsync.orchestrator.planner import CostModel, make_plan
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Region, Tensor

WIDE = [Tensor(f"model.layers.{n}.down", "bfloat16", (32, 64)) for n in range(2)]
LONG = Tensor("model.embed", "bfloat16", (64, 64))
COST = CostModel(alpha_seconds=1e-6, bytes_per_second=1e9, pack_bytes_per_second=1e12)
"""A descriptor is worth 1000 bytes: half a row of 128 is packed, and a whole matrix of 8 KiB is not."""


def planned(lands, landing, ring=4096, long=LONG):
    """(share's copies and runs, berth, layout and arenas of a source of both halves; the target's regions)."""
    source = Builder(trainer(0), ring)
    for tensor in (*WIDE, long):
        source.dense((tensor, ((0, 0), tensor.shape)))
    target = Builder(engine_rank("e"), landing, lands)
    for tensor in WIDE:
        target.dense((tensor, ((0, 32), (32, 32))))
    target.dense((long, ((0, 0), long.shape)))
    here, there = source.party(), target.party()
    plan = make_plan([here], [there], COST)
    arenas = [host_arena(region.length) for region in here.layout.regions]
    arenas[0].copy_(torch.arange(arenas[0].numel()) % 251)
    layout = structs.replace(here.layout, regions=tuple(map(region_of, arenas)))
    copies, [berth] = copies_of(plan, trainer(0)), plan.part(trainer(0)).berths
    return copies, runs(copies, layout), berth, layout, arenas, there.layout.regions


def test_what_is_packed_fills_its_chunks_from_their_beginning():
    """Two halves of 2048 bytes through a landing of 1024: sixteen chunks of 256, four rows of 64 bytes each."""
    copies, table, berth, layout, arenas, remote = planned("live", 1024)
    cargo = make_cargo(copies, table, berth, layout, arenas, remote)
    assert (berth.chunk_bytes, berth.places, len(cargo.chunks)) == (256, 4, 16)
    assert all((chunk.bytes, chunk.packed, len(chunk.straight)) == (256, 256, 0) for chunk in cargo.chunks)
    assert [int(chunk.remote[0, 0]) for chunk in cargo.chunks] == [256 * (n % 4) for n in range(16)]
    chunk = cargo.chunks[9]  # the second of the second matrix, which lies 4096 bytes into the arena
    chunk.pack(512)
    rows = [4096 + 128 * row + 64 for row in range(4, 8)]
    assert arenas[1][512:768].tolist() == [(first + byte) % 251 for first in rows for byte in range(64)]
    ring = layout.regions[1]
    assert chunk.local(ring, 512).tolist() == [[ring.base + 512, 256, 0]]


def test_a_chunk_needs_what_it_is_read_from():
    copies, table, berth, layout, arenas, remote = planned("live", 1024)
    cargo = make_cargo(copies, table, berth, layout, arenas, remote)
    # Four rows of 128 bytes each, of which the second half is sent; the second matrix lies 4096 bytes into the arena.
    assert [chunk.needs for chunk in cargo.chunks] == [
        4096 * matrix + 512 * n for matrix in (0, 1) for n in range(1, 9)
    ]
    copies, table, berth, layout, arenas, remote = planned("flip", 4096)
    cargo = make_cargo(copies, table, berth, layout, arenas, remote)
    straight = [chunk.needs for chunk in cargo.chunks if not chunk.packed]
    assert straight == [8192 + 512 * n for n in range(1, 17)], "and what leaves from where it lies"


def test_what_leaves_its_slot_is_cut_where_places_come_again():
    """Into pages: a matrix of 8192 bytes, then 4096 packed ones, in 24 chunks."""
    copies, table, berth, layout, arenas, remote = planned("flip", 4096)
    cargo = make_cargo(copies, table, berth, layout, arenas, remote)
    assert (berth.chunk_bytes, berth.places, len(cargo.chunks)) == (512, 8, 24)
    assert sum(chunk.bytes for chunk in cargo.chunks) == 4096 + 8192
    last = cargo.chunks[15]
    assert last.pack is None
    assert last.straight.tolist() == [[layout.regions[0].base + 8192 + 8192 - 512, 512, 0]]
    assert last.local(layout.regions[1], 0) is last.straight
    assert int(last.remote[0, 0]) == remote[berth.region].base + berth.offset + 7 * 512


def test_of_a_chunk_that_both_share_what_is_packed_follows_what_leaves_its_slot():
    """A matrix of 8064 bytes ends 384 bytes into chunk 15; two rows of 64 packed bytes follow."""
    long = Tensor("model.embed", "bfloat16", (63, 64))
    copies, table, berth, layout, arenas, remote = planned("flip", 4096, long=long)
    chunk = make_cargo(copies, table, berth, layout, arenas, remote).chunks[15]
    assert (chunk.bytes, chunk.packed, chunk.packed_at) == (512, 128, 384)
    ring, there = layout.regions[1], remote[berth.region].base + berth.place(15)
    assert chunk.local(ring, 512).tolist() == [
        [ring.base + 512 + 384, 128, 0],
        [layout.regions[0].base + 8192 + 8064 - 384, 384, 0],
    ]
    assert chunk.remote.tolist() == [[there + 384, 128, 0], [there, 384, 0]]
    arenas[1].fill_(255)
    chunk.pack(512)
    rows = [128 * row + 64 for row in (0, 1)]
    assert arenas[1][512 + 384 : 1024].tolist() == [(first + byte) % 251 for first in rows for byte in range(64)]
    assert (arenas[1][: 512 + 384] == 255).all(), "nothing else of the ring is touched"


def test_where_all_lands_only_what_is_packed_is_cargo():
    copies, table, berth, layout, arenas, remote = planned("copy", 0)
    cargo = make_cargo(copies, table, berth, layout, arenas, remote)
    assert not berth.wraps
    assert sum(chunk.bytes for chunk in cargo.chunks) == 4096
    assert not any(len(chunk.straight) for chunk in cargo.chunks)
    nothing, none = copies[:0], table[:0]
    assert make_cargo(nothing, none, berth, layout, arenas, remote) is None


def test_a_berth_outside_its_region_is_refused():
    copies, table, berth, layout, arenas, remote = planned("live", 1024)
    for wrong in (Berth(9, 0, 256, 4, 4096), structs.replace(berth, offset=256)):
        with pytest.raises(EdgeError, match="a berth of"):
            make_cargo(copies, table, wrong, layout, arenas, remote)


def test_one_handle_reads_one_kind_of_memory():
    copies, table, berth, layout, arenas, remote = planned("flip", 4096)
    mixed = structs.replace(layout, regions=(layout.regions[0], Region(1 << 40, 4096, "VRAM")))
    with pytest.raises(EdgeError, match="different kinds of memory"):
        make_cargo(copies, table, berth, mixed, arenas, remote)
    assert np.array_equal(table, runs(copies, layout))
