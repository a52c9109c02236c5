"""The digest in Triton: all regions and rows in one launch, at the speed of reading.

Runs become items of three kinds. *Tiles*: whole 8 KiB tiles, 16-byte aligned. *Columns*: the same 256-byte chunk of
many tiles, as a slice of every row of a tensor has. Both hold their inner weights in registers. *Chunks*: rows of
pieces of at most 256 bytes, each within one 256-byte chunk of the tensor; aligned ones, and those at any alignment. A
long run gives tiles for its middle and chunks for its ends.

Where elements are to be looked at (``LOOK``), each word is tested beside its product: with ``exponent`` the bits that
are all ones in NaN and infinity, adding the lowest of them carries into the bit above if and only if all are set.
"""
# Triton's functions are compiled from their source and have types of their own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from weightsync.kernels.columns import DST_REGION, SRC_REGION, UNSEEN, WORD_TESTS
from weightsync.kernels.digest_multipliers import TILE_BYTES, inner_multipliers, outer_keys
from weightsync.kernels.dispatch import Beside, StreamMark, common_device, on_device, programs_beside
from weightsync.kernels.strided import Sheets, Table, canonical, concatenate, sheets

ITEM_COLUMNS: Final = 12
"""Of int64: kind, address, logical offset, run bytes, count, address step, logical step, pieces per run, 2 keys, and a
row of WORD_TESTS."""
_ITEM_COLUMNS: Final = tl.constexpr(ITEM_COLUMNS)  # compiled functions read no other globals
TILES, COLUMNS, ALIGNED_CHUNKS, CHUNKS = range(4)
CHUNK_BYTES: Final = 256
MIN_COLUMN_ROWS: Final = 1024
"""Sheets of at least this many runs become columns: up to 32 each, so that each fills a program's 32 rows."""
ITEM_TILES: Final = 32
"""Tiles per item: 256 KiB amortise the 16 KiB of weights that each program loads, and still balance over a GPU."""
ITEM_CHUNKS: Final = 512
ITEM_COLUMN_ROWS: Final = 2048
"""Chunks per item of columns: 512 KiB, because each program first loads weights for all its threads."""
SMALL_RUN: Final = 2 * TILE_BYTES
"""Runs below this are chunks only; they need not hold a whole tile."""
OPTIONS: Final = {"num_warps": 4, "maxnreg": 80}
"""At 80 registers six programs share a multiprocessor, at the 96 that the compiler would take five: 2 % slower."""
PART_ITEMS: Final = 4096
"""1 GiB and more, which an H100 reads in 0.4 ms. Hopper's GEMM and attention kernels take whole multiprocessors: all
programs for 15 GB, launched at once, held the next step up for 5 ms, and half as many, which stayed until the end, for
20 ms."""


@triton.jit
def _outer(key, tile):
    """One outer weight: MurmurHash3's finaliser of a 32-bit key and a tile's index."""
    state = (tile.to(tl.uint32)) ^ key
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return (state ^ (state >> 16)).to(tl.uint64)


@triton.jit
def _outer_sums(first, second, key_low, key_high, tile):
    """``H_s·D + H'_s·D'`` of both seeds; ``key_low`` and ``key_high`` are the two packed words of the key."""
    low = first * _outer(key_low.to(tl.uint32), tile) + second * _outer((key_low >> 32).to(tl.uint32), tile)
    high = first * _outer(key_high.to(tl.uint32), tile) + second * _outer((key_high >> 32).to(tl.uint32), tile)
    return low, high


@triton.jit
def _either(one, other):
    return one | other


@triton.jit
def _beyond(words, item):
    """Bits, some of which are set where words hold what is no finite number; the bit above each exponent counts."""
    exponent, free = tl.load(item + 10), tl.load(item + 11)
    return ((words & exponent.to(tl.uint32)) + (exponent >> 32).to(tl.uint32)) & (words | free.to(tl.uint32))


@triton.jit
def _tiles(item, weights, LOOK: tl.constexpr):
    """Both sums over whole tiles, and what is beyond the finite numbers."""
    address, logical, count = tl.load(item + 1), tl.load(item + 2), tl.load(item + 4)
    key_low, key_high = tl.load(item + 8), tl.load(item + 9)
    # Rows of 512 words: a thread owns 4 of each, so that sums over the first axis stay inside it.
    place = tl.arange(0, 4)[:, None] * 512 + tl.arange(0, 512)[None, :]
    inner, inner_too = tl.load(weights + place), tl.load(weights + 2048 + place)
    present = tl.sum(inner.to(tl.uint64) * 0x01010101, axis=0)
    present_too = tl.sum(inner_too.to(tl.uint64) * 0x01010101, axis=0)
    low, high = tl.zeros((128,), tl.uint64), tl.zeros((128,), tl.uint64)  # one partial sum per thread
    beyond = tl.zeros((128,), tl.uint32)
    start = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
    tile = logical >> 13
    following = tl.load(start + place)
    for step in range(count):
        words = following
        # One tile ahead, so that there are always loads in flight.
        following = tl.load(start + tl.minimum(step + 1, count - 1) * 2048 + place)
        if LOOK:
            more = tl.reduce(_beyond(words, item), 0, _either)
            beyond |= tl.reduce(tl.reshape(more, (128, 4)), 1, _either)
        first = tl.sum(words.to(tl.uint64) * inner.to(tl.uint64), axis=0) + present
        second = tl.sum(words.to(tl.uint64) * inner_too.to(tl.uint64), axis=0) + present_too
        first, second = tl.sum(tl.reshape(first, (128, 4)), axis=1), tl.sum(tl.reshape(second, (128, 4)), axis=1)
        more_low, more_high = _outer_sums(first, second, key_low, key_high, tile + step)
        low += more_low
        high += more_high
    return tl.sum(low), tl.sum(high), tl.reduce(beyond, 0, _either)


@triton.jit
def _product(words, inner):
    """Sums of each thread's four words times their weights: uint64[32, 4]."""
    return tl.sum(words.to(tl.uint64) * inner.to(tl.uint64), axis=2)


@triton.jit
def _columns(item, weights, LOOK: tl.constexpr):
    """The same over one chunk of each of many tiles, 16-byte aligned. Four threads share a chunk, in four parts."""
    address, logical, count = tl.load(item + 1), tl.load(item + 2), tl.load(item + 4)
    source_step, tile_step = (tl.load(item + 5) >> 4) * 16, tl.load(item + 6) >> 13
    key_low, key_high = tl.load(item + 8), tl.load(item + 9)
    rows = tl.arange(0, 32)
    word = tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    # Every row has the same weights; they take the shape of the data so that they lie in the same threads.
    inner = weights + ((logical & 8191) >> 8) * 64 + word + (rows * 0)[:, None, None]
    first_0, first_1, first_2, first_3 = tl.load(inner), tl.load(inner + 16), tl.load(inner + 32), tl.load(inner + 48)
    inner += 2048
    other_0, other_1, other_2, other_3 = tl.load(inner), tl.load(inner + 16), tl.load(inner + 32), tl.load(inner + 48)
    ones = tl.full((32, 4, 4), 0x01010101, tl.uint32)
    present = _product(ones, first_0) + _product(ones, first_1) + _product(ones, first_2) + _product(ones, first_3)
    present_too = _product(ones, other_0) + _product(ones, other_1) + _product(ones, other_2) + _product(ones, other_3)
    low, high = tl.zeros((32, 4), tl.uint64), tl.zeros((32, 4), tl.uint64)
    beyond = tl.zeros((32, 4), tl.uint32)
    start = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
    for step in range(0, count, 32):
        row = step + rows
        inside = row < count
        source = (start + row * source_step).to(tl.pointer_type(tl.uint32), bitcast=True)[:, None, None] + word
        mask = inside[:, None, None]
        words_0, words_1 = tl.load(source, mask=mask, other=0), tl.load(source + 16, mask=mask, other=0)
        words_2, words_3 = tl.load(source + 32, mask=mask, other=0), tl.load(source + 48, mask=mask, other=0)
        if LOOK:
            upper = _beyond(words_0, item) | _beyond(words_1, item)
            lower = _beyond(words_2, item) | _beyond(words_3, item)
            beyond |= tl.reduce(upper | lower, 2, _either)
        first = present + _product(words_0, first_0) + _product(words_1, first_1)
        first += _product(words_2, first_2) + _product(words_3, first_3)
        second = present_too + _product(words_0, other_0) + _product(words_1, other_1)
        second += _product(words_2, other_2) + _product(words_3, other_3)
        tile = ((logical >> 13) + row * tile_step)[:, None]
        more_low, more_high = _outer_sums(first, second, key_low, key_high, tile)
        low += tl.where(inside[:, None], more_low, 0)
        high += tl.where(inside[:, None], more_high, 0)
    return tl.sum(low), tl.sum(high), tl.reduce(tl.reduce(beyond, 1, _either), 0, _either)


@triton.jit
def _aligned_chunks(item, weights, LOOK: tl.constexpr):
    """The same over rows of whole 256-byte chunks, 16-byte aligned."""
    address, logical, count = tl.load(item + 1), tl.load(item + 2), tl.load(item + 4)
    source_step, logical_step = (tl.load(item + 5) >> 4) * 16, (tl.load(item + 6) >> 8) * 256
    key_low, key_high = tl.load(item + 8), tl.load(item + 9)
    word = tl.arange(0, 16)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    low, high = tl.zeros((32, 16), tl.uint64), tl.zeros((32, 16), tl.uint64)
    beyond = tl.zeros((32, 16), tl.uint32)
    start, first_logical = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16), (logical >> 8) * 256
    for step in range(0, count, 32):
        row = step + tl.arange(0, 32)
        inside = row < count
        source = (start + row * source_step).to(tl.pointer_type(tl.uint32), bitcast=True)[:, None, None] + word
        offset = first_logical + row * logical_step
        place = ((offset & 8191) >> 8)[:, None, None] * 64 + word
        words = tl.load(source, mask=inside[:, None, None], other=0)
        if LOOK:
            beyond |= tl.reduce(_beyond(words, item), 2, _either)
        words = words.to(tl.uint64) + 0x01010101
        first = tl.sum(words * tl.load(weights + place).to(tl.uint64), axis=2)
        second = tl.sum(words * tl.load(weights + 2048 + place).to(tl.uint64), axis=2)
        more_low, more_high = _outer_sums(first, second, key_low, key_high, (offset >> 13)[:, None])
        low += tl.where(inside[:, None], more_low, 0)
        high += tl.where(inside[:, None], more_high, 0)
    return tl.sum(low), tl.sum(high), tl.reduce(tl.reduce(beyond, 1, _either), 0, _either)


@triton.jit
def _chunks(item, weights, LOOK: tl.constexpr):
    """The same over rows of pieces at any alignment."""
    address, logical, run, count = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    source_step, logical_step, pieces = tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
    key_low, key_high = tl.load(item + 8), tl.load(item + 9)
    word = tl.arange(0, 16)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    low, high = tl.zeros((8, 16), tl.uint64), tl.zeros((8, 16), tl.uint64)
    beyond = tl.zeros((8, 16), tl.uint32)
    for step in range(0, count * pieces, 8):
        piece = step + tl.arange(0, 8).to(tl.int64)
        row = piece // pieces
        begin = logical + row * logical_step
        chunk = (begin >> 8) + piece - row * pieces
        # Bytes of this chunk that the run has; none for pieces past its end.
        left = tl.maximum(begin - chunk * 256, 0)
        right = tl.where(row < count, tl.minimum(begin + run - chunk * 256, 256), 0)
        source = address + row * source_step + chunk * 256 - begin
        after, before = right[:, None, None] - word * 4, left[:, None, None] - word * 4
        some = (after > 0) & (before < 4)
        where = source[:, None, None] + word * 4
        # Memory is read in whole aligned words, the second only where the run's bytes reach into it.
        skew = where & 3
        aligned = (where - skew).to(tl.pointer_type(tl.uint32))
        below = tl.load(aligned, mask=some & (before + skew < 4), other=0).to(tl.uint64)
        above = tl.load(aligned + 1, mask=some & (tl.minimum(after, 4) + skew > 4), other=0).to(tl.uint64)
        words = ((above << 32) | below) >> (skew * 8).to(tl.uint64)
        ones = tl.full((8, 16, 4), 0xFFFFFFFF, tl.uint64)
        keep = ones << (tl.minimum(tl.maximum(before, 0), 4) * 8).to(tl.uint64)
        keep = tl.where(some, keep & (ones >> ((4 - tl.minimum(tl.maximum(after, 0), 4)) * 8).to(tl.uint64)), 0)
        words &= keep
        if LOOK:
            beyond |= tl.reduce(_beyond(words.to(tl.uint32), item), 2, _either)
        words += keep & 0x01010101
        place = (chunk & 31)[:, None, None] * 64 + word
        first = tl.sum(words * tl.load(weights + place).to(tl.uint64), axis=2)
        second = tl.sum(words * tl.load(weights + 2048 + place).to(tl.uint64), axis=2)
        more_low, more_high = _outer_sums(first, second, key_low, key_high, (chunk >> 5)[:, None])
        low += more_low
        high += more_high
    return tl.sum(low), tl.sum(high), tl.reduce(tl.reduce(beyond, 1, _either), 0, _either)


@triton.jit
def _add_item(item, weights, sums, LOOK: tl.constexpr):
    kind = tl.load(item)
    if kind == 0:
        low, high, beyond = _tiles(item, weights, LOOK)
    elif kind == 1:
        low, high, beyond = _columns(item, weights, LOOK)
    elif kind == 2:
        low, high, beyond = _aligned_chunks(item, weights, LOOK)
    else:
        low, high, beyond = _chunks(item, weights, LOOK)
    tl.atomic_add(sums, low.to(tl.int64, bitcast=True))
    tl.atomic_add(sums + 1, high.to(tl.int64, bitcast=True))
    if LOOK:
        exponent = tl.load(item + 10)
        # Where all exponent bits carry to; everything else in ``beyond`` is what became of other bits.
        carries = exponent.to(tl.uint32) + (exponent >> 32).to(tl.uint32)
        found = (beyond & carries) != 0
        tl.atomic_or(sums + 2, found.to(tl.int64), mask=found)


@triton.jit(do_not_specialize=["count"])
def _digest_kernel(items, weights, sums, count, LOOK: tl.constexpr, PERSISTENT: tl.constexpr):
    if PERSISTENT:
        for number in range(tl.program_id(0), count, tl.num_programs(0)):
            _add_item(items + (number + tl.full([], 0, tl.int64)) * _ITEM_COLUMNS, weights, sums, LOOK)
    else:
        _add_item(items + tl.program_id(0).to(tl.int64) * _ITEM_COLUMNS, weights, sums, LOOK)


class TritonDigest:
    """A digest with its items on the device; see :class:`weightsync.kernels.digest.PreparedDigest`."""

    def __init__(
        self, regions: Sequence[torch.Tensor], table: Table, codes: Table, beside: Beside | None = None
    ) -> None:
        """``regions``, ``table`` and ``codes`` as checked by ``prepare``. Items are uploaded here."""
        self._regions = list(regions)  # their memory must outlive the addresses in the items
        self._device = common_device(self._regions)
        items = digest_items([region.data_ptr() for region in regions], table, codes)
        self._items = torch.from_numpy(items).to(self._device)
        weights = np.ascontiguousarray(inner_multipliers().T.astype(np.uint32)).view(np.int32)
        self._weights = torch.from_numpy(weights).to(self._device).view(torch.uint32)
        self._look = bool((codes != UNSEEN).any())
        self._most = programs_beside(beside, self._device) if beside else 0
        self._finite = True
        self._sums = torch.zeros(3, dtype=torch.int64, device=self._device)
        self._done = StreamMark(self._device)

    @property
    def parts(self) -> int:
        """That it can be launched in; at least one."""
        return max(1, -(-len(self._items) // PART_ITEMS))

    def launch(self, part: int | None = None) -> None:
        """Start on the current stream: everything, or one part."""
        items = self._items if part is None else self._items[part * PART_ITEMS : (part + 1) * PART_ITEMS]
        with on_device(self._device):
            if not part:
                self._sums.zero_()
            if count := len(items):
                _digest_kernel[(min(count, self._most or count),)](
                    items, self._weights, self._sums, count, LOOK=self._look, PERSISTENT=self._most > 0, **OPTIONS
                )
            self._done.mark()

    def wait(self) -> None:
        """Until what was launched is done."""
        self._done.wait()

    def result(self) -> tuple[int, int]:
        """The sums of what was launched; waits for the device."""
        self.wait()
        low, high, beyond = self._sums.tolist()
        self._finite = not beyond
        return low & ((1 << 64) - 1), high & ((1 << 64) - 1)

    def finite(self) -> bool:
        """Whether all that the last :meth:`result` looked at are finite numbers."""
        return self._finite

    def __call__(self) -> tuple[int, int]:
        """``launch`` and ``result``."""
        self.launch()
        return self.result()


def digest_items(bases: list[int], table: Table, codes: Table) -> Table:
    """The table as items int64[n, ITEM_COLUMNS], the largest first; ``bases`` are the regions' addresses, ``codes`` of
    the rows' elements."""
    rows = canonical(table)
    facts = np.column_stack([outer_keys(rows[:, DST_REGION]).view(np.int64), WORD_TESTS[codes]])
    region = np.asarray(bases, np.int64)[rows[:, SRC_REGION]] if len(bases) else np.zeros(len(rows), np.int64)
    all_sheets = sheets(rows)
    long = all_sheets.run >= SMALL_RUN
    runs = all_sheets.take(long).unrolled()
    aligned = (region[runs.row] + runs.src - runs.dst) % 16 == 0
    runs, odd = runs.take(aligned), runs.take(~aligned)
    head = -runs.dst % TILE_BYTES
    middle = (runs.run - head) // TILE_BYTES * TILE_BYTES
    ends = [runs.part(0 * head, head), runs.part(head + middle, runs.run - head - middle)]
    tiles = runs.part(head, middle).folded(TILE_BYTES)
    tiles = tiles.at_most(np.full(len(tiles), ITEM_TILES))
    pieces = concatenate([all_sheets.take(~long), odd, *ends])
    items = [_items(TILES, tiles, region, facts), *_chunk_items(pieces, region, facts)]
    return np.ascontiguousarray(np.concatenate(items))


def _chunk_items(pieces: Sheets, region: Table, facts: Table) -> list[Table]:
    """Sheets of short runs (and long misaligned ones) as items of all kinds but tiles."""
    single = pieces.count == 1
    whole = (pieces.dst % CHUNK_BYTES == 0) & (pieces.run % CHUNK_BYTES == 0)
    aligned = whole & ((region[pieces.row] + pieces.src) % 16 == 0)
    aligned &= single | ((pieces.src_step % 16 == 0) & (pieces.dst_step % CHUNK_BYTES == 0))
    fast, rest = pieces.take(aligned), pieces.take(~aligned)
    tall = fast.count >= MIN_COLUMN_ROWS
    columns = _same_place(_by_chunk(fast.take(tall)))
    columns = columns.at_most(np.full(len(columns), ITEM_COLUMN_ROWS))
    wide = fast.take(~tall).unrolled().folded(CHUNK_BYTES)
    wide = wide.at_most(np.full(len(wide), ITEM_CHUNKS))
    rest = _limited(rest, _pieces_per_run(rest))
    return [
        _items(kind, part, region, facts) for kind, part in ((COLUMNS, columns), (ALIGNED_CHUNKS, wide), (CHUNKS, rest))
    ]


def _same_place(sheets_of_chunks: Sheets) -> Sheets:
    """Each sheet as sheets whose logical step is a multiple of a tile: every second, every fourth … of its chunks."""
    phases = TILE_BYTES // np.gcd(sheets_of_chunks.dst_step, TILE_BYTES)
    which = np.repeat(np.arange(len(phases)), phases)
    phase = np.arange(len(which), dtype=np.int64) - (np.cumsum(phases) - phases)[which]
    part, stride = sheets_of_chunks.take(which), phases[which]
    count = (part.count - phase + stride - 1) // stride
    src, dst = part.src + phase * part.src_step, part.dst + phase * part.dst_step
    return Sheets(part.row, part.run, src, dst, count, part.src_step * stride, part.dst_step * stride)


def _by_chunk(tall: Sheets) -> Sheets:
    """Each sheet of runs of several chunks as sheets of one chunk per run, side by side."""
    which = np.repeat(np.arange(len(tall)), tall.run // CHUNK_BYTES)
    spread = tall.take(which)
    starts = np.cumsum(tall.run // CHUNK_BYTES) - tall.run // CHUNK_BYTES
    skip = (np.arange(len(which), dtype=np.int64) - starts[which]) * CHUNK_BYTES
    return spread.part(skip, np.full(len(which), CHUNK_BYTES, np.int64))


def _limited(rest: Sheets, per_run: Table) -> Sheets:
    """Sheets of at most about ITEM_CHUNKS pieces; single long runs are cut as well."""
    long = per_run > ITEM_CHUNKS
    runs = rest.take(long).unrolled()
    step = ITEM_CHUNKS * CHUNK_BYTES
    which = np.repeat(np.arange(len(runs)), -(-runs.run // step))
    starts = np.cumsum(-(-runs.run // step)) - -(-runs.run // step)
    skip = (np.arange(len(which), dtype=np.int64) - starts[which]) * step
    spread = runs.take(which)
    cut = spread.part(skip, np.minimum(spread.run - skip, step))
    short = rest.take(~long)
    return concatenate([cut, short.at_most(np.maximum(1, ITEM_CHUNKS // np.maximum(1, per_run[~long])))])


def _pieces_per_run(part: Sheets) -> Table:
    """In how many chunks each run of a sheet has bytes; the most, where that differs between the runs."""
    regular = (part.count == 1) | (part.dst_step % CHUNK_BYTES == 0)
    before = np.where(regular, part.dst % CHUNK_BYTES, CHUNK_BYTES - 1)
    return np.asarray((before + part.run - 1) // CHUNK_BYTES + 1, np.int64)


def _items(kind: int, part: Sheets, region: Table, facts: Table) -> Table:
    """Items of one kind, int64[n, ITEM_COLUMNS]."""
    columns = [
        np.full(len(part), kind, np.int64), region[part.row] + part.src, part.dst, part.run, part.count,
        part.src_step, part.dst_step, _pieces_per_run(part),
    ]  # fmt: skip
    return np.column_stack([*columns, facts[part.row]])
