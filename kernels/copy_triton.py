"""Strided copies in Triton: all rows of a table in one launch, at the speed of a device copy.

Runs become items of four kinds: *long* stretches in which source and destination are 16-byte aligned, and sheets of
short pieces that move in units of 16, 4 or 1 bytes, the widest that addresses, steps and lengths allow.
"""
# Triton's functions are compiled from their source and have types of their own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from weightsync.kernels.dispatch import common_device, on_device
from weightsync.kernels.strided import (
    DST_REGION,
    SRC_REGION,
    Sheets,
    Table,
    canonical,
    concatenate,
    sheets,
)

ITEM_COLUMNS: Final = 8
"""Of int64: kind, source, destination, run bytes, count, source step, destination step, pieces per run."""
LONG, WIDE, WORDS, SINGLE = range(4)
UNIT: Final = {WIDE: 16, WORDS: 4, SINGLE: 1}
PIECE_BYTES: Final = {WIDE: 256, WORDS: 256, SINGLE: 64}
"""Of each run, what one row of a program's block moves at a time: 64 elements of 4 bytes, or of one."""
SMALL_RUN: Final = 8192
"""Runs below this are pieces only."""
ITEM_BYTES: Final = 16384
ITEM_PIECES: Final = 64
OPTIONS: Final = {"num_warps": 8}


@triton.jit
def _long(item):
    """One aligned stretch, 8 KiB at a time; its length is a multiple of 16."""
    source = tl.multiple_of(tl.load(item + 1).to(tl.pointer_type(tl.uint32)), 16)
    destination = tl.multiple_of(tl.load(item + 2).to(tl.pointer_type(tl.uint32)), 16)
    words = (tl.load(item + 3) >> 4) * 4
    place = tl.arange(0, 2048)
    for start in range(0, words, 2048):
        mask = start + place < words
        value = tl.load(source + start + place, mask=mask)
        tl.store(destination + start + place, value, mask=mask)


@triton.jit
def _pieces(item, UNIT: tl.constexpr):
    """A sheet of runs, 32 pieces of 64 elements at a time; elements are 4 bytes, or one where UNIT is."""
    SIZE: tl.constexpr = 1 if UNIT == 1 else 4
    kind: tl.constexpr = tl.uint8 if UNIT == 1 else tl.uint32
    source = tl.load(item + 1).to(tl.pointer_type(tl.uint8))
    destination = tl.load(item + 2).to(tl.pointer_type(tl.uint8))
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
def _copy_kernel(items):
    item = items + tl.program_id(0).to(tl.int64) * 8
    kind = tl.load(item)
    if kind == 0:
        _long(item)
    elif kind == 1:
        _pieces(item, 16)
    elif kind == 2:
        _pieces(item, 4)
    else:
        _pieces(item, 1)


class TritonCopy:
    """A copy with its items on the device; see :class:`weightsync.kernels.copy.PreparedCopy`."""

    def __init__(self, sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor], table: Table) -> None:
        """Arguments as checked by ``prepare``. Items are uploaded here."""
        self._regions = [*sources, *destinations]  # their memory must outlive the addresses in the items
        self._device = common_device(self._regions)
        bases = [[region.data_ptr() for region in side] for side in (sources, destinations)]
        items = copy_items(bases[0], bases[1], table)
        self._programs = len(items)
        self._items = torch.from_numpy(items).to(self._device)

    def __call__(self) -> None:
        """Copy on the current stream."""
        if self._programs:
            with on_device(self._device):
                _copy_kernel[(self._programs,)](self._items, **OPTIONS)


def copy_items(source_bases: list[int], destination_bases: list[int], table: Table) -> Table:
    """The table as items int64[n, ITEM_COLUMNS], the longest first; bases are the regions' addresses."""
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
    middle = (runs.run - head) // 16 * 16
    ends = [runs.part(0 * head, head), runs.part(head + middle, runs.run - head - middle)]
    stretches = _cut(runs.part(head, middle), ITEM_BYTES)
    pieces = concatenate([absolute.take(~long), _cut(odd, ITEM_PIECES * PIECE_BYTES[SINGLE]), *ends])
    unit = _units(pieces)
    items = [_items(LONG, stretches)]
    for kind in (WIDE, WORDS, SINGLE):
        chosen = pieces.take(unit == kind)
        per_run = -(-chosen.run // PIECE_BYTES[kind])
        items.append(_items(kind, chosen.at_most(np.maximum(1, ITEM_PIECES // np.maximum(1, per_run)))))
    return np.ascontiguousarray(np.concatenate(items))


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
    per_run = -(-part.run // PIECE_BYTES.get(kind, ITEM_BYTES))
    columns = [np.full(len(part), kind, np.int64), part.src, part.dst, part.run]
    return np.column_stack([*columns, part.count, part.src_step, part.dst_step, per_run])
