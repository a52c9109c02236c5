"""Strided copies in Triton: all rows of a table in one launch, at the speed of a device copy.

Runs become *blocks*, 16 KiB in which source and destination are 16-byte aligned, and *items*: the rest of such
stretches, and sheets of short pieces that move in units of 16, 4 or 1 bytes, the widest that addresses, steps and
lengths allow. Blocks are many, so each is only a pair of addresses (0.1 % of what it moves).
"""
# Triton's functions are compiled from their source and have types of their own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from weightsync.kernels.columns import DST_REGION, SRC_REGION
from weightsync.kernels.dispatch import Beside, common_device, on_device, programs_beside
from weightsync.kernels.strided import (
    SHIFT_UNIT,
    Sheets,
    Table,
    canonical,
    check_shift,
    concatenate,
    sheets,
)

ITEM_COLUMNS: Final = 8
"""Of int64: kind, source, destination, run bytes, count, source step, destination step, pieces per run."""
_ITEM_COLUMNS: Final = tl.constexpr(ITEM_COLUMNS)
"""The same for the kernel: compiled functions read no other globals than constexpr ones."""
STRETCH, WIDE, WORDS, SINGLE = range(4)
UNIT: Final = {WIDE: 16, WORDS: 4, SINGLE: 1}
PIECE_BYTES: Final = {WIDE: 256, WORDS: 256, SINGLE: 64}
"""Of each run, what one row of a program's block moves at a time: 64 elements of 4 bytes, or of one."""
SMALL_RUN: Final = 8192
"""Runs below this are pieces only."""
BLOCK_BYTES: Final = 16384
"""Larger blocks, of which each program copies one part after the other, reach 4 to 6 % less."""
ITEM_PIECES: Final = 64
OPTIONS: Final = {"num_warps": 8}


@triton.jit
def _stretch(source, destination, bytes_left):
    """At most one block from one aligned address to another; ``bytes_left`` is a multiple of 16."""
    source = tl.multiple_of(source.to(tl.pointer_type(tl.uint32)), 16)
    destination = tl.multiple_of(destination.to(tl.pointer_type(tl.uint32)), 16)
    place = tl.arange(0, 4096)
    mask = place < (bytes_left >> 4) * 4
    tl.store(destination + place, tl.load(source + place, mask=mask), mask=mask)


@triton.jit
def _pieces(item, UNIT: tl.constexpr, shift):
    """A sheet of runs, 32 pieces of 64 elements at a time; elements are 4 bytes, or one where UNIT is."""
    SIZE: tl.constexpr = 1 if UNIT == 1 else 4
    kind: tl.constexpr = tl.uint8 if UNIT == 1 else tl.uint32
    source = tl.load(item + 1).to(tl.pointer_type(tl.uint8))
    destination = (tl.load(item + 2) + shift).to(tl.pointer_type(tl.uint8))
    run = tl.load(item + 3)
    count, source_step, destination_step = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    pieces = tl.load(item + 7).to(tl.int32)
    if UNIT == 16:
        source, destination = tl.multiple_of(source, 16), tl.multiple_of(destination, 16)
        source_step, destination_step = (source_step >> 4) * 16, (destination_step >> 4) * 16
    total = count.to(tl.int32) * pieces
    element = tl.arange(0, 64)[None, :]
    for step in range(0, total, 32):
        piece = step + tl.arange(0, 32)
        row = piece // pieces
        skip = ((piece - row * pieces) * (64 * SIZE)).to(tl.int64)
        left = tl.where(piece < total, (run - skip) // SIZE, 0).to(tl.int32)
        mask = element < left[:, None]
        if UNIT == 16:
            mask = element < ((left >> 2) * 4)[:, None]
        there = row.to(tl.int64)
        load_at = (source + there * source_step + skip).to(tl.pointer_type(kind), bitcast=True)[:, None]
        store_at = (destination + there * destination_step + skip).to(tl.pointer_type(kind), bitcast=True)[:, None]
        tl.store(store_at + element, tl.load(load_at + element, mask=mask), mask=mask)


@triton.jit
def _job(blocks, count, items, shift, number):
    """One block or item, of which the blocks come first."""
    if number < count:
        _stretch(tl.load(blocks + number * 2), tl.load(blocks + number * 2 + 1) + shift, 16384)
    else:
        item = items + (number - count) * _ITEM_COLUMNS
        kind = tl.load(item)
        if kind == 0:
            _stretch(tl.load(item + 1), tl.load(item + 2) + shift, tl.load(item + 3))
        elif kind == 1:
            _pieces(item, 16, shift)
        elif kind == 2:
            _pieces(item, 4, shift)
        else:
            _pieces(item, 1, shift)


@triton.jit(do_not_specialize=["count", "units", "jobs"])
def _copy_kernel(blocks, count, items, units, jobs, PERSISTENT: tl.constexpr):
    shift = units.to(tl.int64) * 16
    if PERSISTENT:
        for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            _job(blocks, count, items, shift, job + tl.full([], 0, tl.int64))
    else:
        _job(blocks, count, items, shift, tl.program_id(0).to(tl.int64))


class TritonCopy:
    """A copy with its items on the device; see :class:`weightsync.kernels.copy.PreparedCopy`."""

    def __init__(
        self,
        sources: Sequence[torch.Tensor],
        destinations: Sequence[torch.Tensor],
        table: Table,
        room: int,
        beside: Beside | None = None,
    ) -> None:
        """Arguments as checked by ``prepare``; ``room``: bytes by which a copy may be shifted. Blocks and items are
        uploaded here."""
        self._room = room
        self._regions = [*sources, *destinations]  # their memory must outlive the addresses in the items
        self._device = common_device(self._regions)
        bases = [[region.data_ptr() for region in side] for side in (sources, destinations)]
        blocks, items = blocks_and_items(bases[0], bases[1], table)
        self._blocks, self._items = (torch.from_numpy(part).to(self._device) for part in (blocks, items))
        self._most = programs_beside(beside, self._device) if beside else 0

    def __call__(self, shift: int = 0) -> None:
        """Copy on the current stream."""
        check_shift(shift, self._room)
        if jobs := len(self._blocks) + len(self._items):
            with on_device(self._device):
                # In units, so that it is 32 bits wide whatever the region: another width would be compiled anew.
                units = shift // SHIFT_UNIT
                _copy_kernel[(min(jobs, self._most or jobs),)](
                    self._blocks, len(self._blocks), self._items, units, jobs, PERSISTENT=self._most > 0, **OPTIONS
                )


def blocks_and_items(source_bases: list[int], destination_bases: list[int], table: Table) -> tuple[Table, Table]:
    """The table as blocks int64[n, 2] and items int64[m, ITEM_COLUMNS]; ``bases`` are the regions' addresses."""
    rows = canonical(table)
    absolute = sheets(rows)
    if len(absolute):
        np.add(absolute.src, np.asarray(source_bases, np.int64)[rows[absolute.row, SRC_REGION]], out=absolute.src)
        np.add(absolute.dst, np.asarray(destination_bases, np.int64)[rows[absolute.row, DST_REGION]], out=absolute.dst)
    long = absolute.run >= SMALL_RUN
    runs = absolute.take(long).unrolled()
    matching = (runs.src - runs.dst) % 16 == 0
    odd, runs = runs.take(~matching), runs.take(matching)
    head = -runs.dst % 16
    whole = (runs.run - head) // BLOCK_BYTES * BLOCK_BYTES
    middle = (runs.run - head) // 16 * 16
    ends = [runs.part(0 * head, head), runs.part(head + middle, runs.run - head - middle)]
    rest = runs.part(head + whole, middle - whole)
    pieces = concatenate([absolute.take(~long), _cut(odd, ITEM_PIECES * PIECE_BYTES[SINGLE]), *ends])
    unit = _units(pieces)
    items = [_items(STRETCH, rest)]
    for kind in (WIDE, WORDS, SINGLE):
        chosen = pieces.take(unit == kind)
        per_run = -(-chosen.run // PIECE_BYTES[kind])
        items.append(_items(kind, chosen.at_most(np.maximum(1, ITEM_PIECES // np.maximum(1, per_run)))))
    return _blocks(runs.src + head, runs.dst + head, whole // BLOCK_BYTES), np.ascontiguousarray(np.concatenate(items))


def _blocks(source: Table, destination: Table, counts: Table) -> Table:
    """``counts[i]`` blocks in a row from each pair of addresses, int64[n, 2]."""
    steps = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.empty((len(steps), 2), np.int64)
    for side, start in enumerate((source, destination)):
        blocks[:, side] = np.repeat(start, counts) + steps * BLOCK_BYTES
    return blocks


def _cut(runs: Sheets, size: int) -> Sheets:
    """Single runs as runs of at most ``size`` bytes."""
    parts = -(-runs.run // size)
    which = np.repeat(np.arange(len(runs)), parts)
    skip = (np.arange(len(which), dtype=np.int64) - (np.cumsum(parts) - parts)[which]) * size
    spread = runs.take(which)
    return spread.part(skip, np.minimum(spread.run - skip, size))


def _units(pieces: Sheets) -> Table:
    """The kind of each sheet: the widest unit that divides all its addresses, steps and lengths."""
    steps = np.where(pieces.count > 1, pieces.src_step | pieces.dst_step, 0)
    low = pieces.src | pieces.dst | pieces.run | steps
    return np.where(low % 16 == 0, WIDE, np.where(low % 4 == 0, WORDS, SINGLE))


def _items(kind: int, part: Sheets) -> Table:
    """Items of one kind, int64[n, ITEM_COLUMNS]."""
    per_run = -(-part.run // PIECE_BYTES.get(kind, BLOCK_BYTES))
    columns = [np.full(len(part), kind, np.int64), part.src, part.dst, part.run]
    return np.column_stack([*columns, part.count, part.src_step, part.dst_step, per_run])
