"""Cargo in chunks: what of each chunk is packed, scattered or sent as it lies, and where it is in the chunk."""

from typing import NamedTuple

import numpy as np
from weightsync.agents.tables.boxes import Column
from weightsync.agents.tables.runs import RUN_LENGTH, RUN_LOCAL_OFFSET, RUN_REMOTE_OFFSET, RUN_REMOTE_REGION
from weightsync.kernels.columns import COUNTS, DST_OFFSET, DST_STRIDE, RUN_BYTES, SRC_OFFSET, SRC_STRIDE
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Matrix


class CutTable(NamedTuple):
    """Rows of a table that was cut at the borders of chunks, and the chunk of each, ascending ``[m]``."""

    rows: Matrix
    chunk: Column

    def of(self, chunk: int) -> Matrix:
        """The rows of one chunk."""
        low, high = np.searchsorted(self.chunk, [chunk, chunk + 1])
        return self.rows[low:high]


def plain_runs(runs: Matrix, berth: Berth | None) -> Matrix:
    """Those of an edge's runs that are the same bytes to the same place in every round, with their place at the peer.

    What leaves its slot for a berth that it only passes is none of them.
    """
    if berth is None:
        return runs
    lands = runs[:, RUN_REMOTE_REGION] == berth.region
    if berth.passes:
        plain: Matrix = runs[~lands]
        return plain
    placed = runs.copy()
    placed[lands, RUN_REMOTE_OFFSET] += berth.offset
    return placed


def cut_runs(runs: Matrix, chunk_bytes: int) -> CutTable:
    """``runs [n, RUN_COLUMNS]`` into a cargo, whose remote offsets then are those in their chunk."""
    owner, chunk, skip, length = _parts(runs[:, RUN_REMOTE_OFFSET], runs[:, RUN_LENGTH], chunk_bytes)
    found = runs[owner]
    found[:, RUN_LOCAL_OFFSET] += skip
    found[:, RUN_REMOTE_OFFSET] += skip - chunk * chunk_bytes
    found[:, RUN_LENGTH] = length
    return _by_chunk(found, chunk)


def cut_packing(table: Matrix, chunk_bytes: int) -> CutTable:
    """A ``pack_table``, whose destination offsets then are those in their chunk."""
    return _cut(table, chunk_bytes, DST_OFFSET, DST_STRIDE)


def cut_scattering(table: Matrix, chunk_bytes: int) -> CutTable:
    """A ``scatter_table``, whose source offsets then are those in their chunk."""
    return _cut(table, chunk_bytes, SRC_OFFSET, SRC_STRIDE)


def _cut(table: Matrix, chunk_bytes: int, offset: int, stride: int) -> CutTable:
    """CutTable kernel rows whose bytes lie in a cargo, without a gap, from column ``offset`` on.

    A row that crosses a border is cut in its outermost loop: whole iterations stay together, and those that cross a
    border themselves are cut in the next loop, in the end in the run.
    """
    done, left = [], table
    for column in COUNTS:
        crossing = _crosses(left, chunk_bytes, offset)
        done.append(left[~crossing])
        left = _cut_loop(left[crossing], chunk_bytes, offset, column, column + stride)
    crossing = _crosses(left, chunk_bytes, offset)
    done.append(left[~crossing])
    left = left[crossing]
    owner, chunk, skip, length = _parts(left[:, offset], left[:, RUN_BYTES], chunk_bytes)
    left = left[owner]
    left[:, SRC_OFFSET] += skip
    left[:, DST_OFFSET] += skip
    left[:, RUN_BYTES] = length
    rows = np.concatenate([*done, left])
    chunk = rows[:, offset] // chunk_bytes
    rows[:, offset] -= chunk * chunk_bytes
    return _by_chunk(rows, chunk)


def _crosses(rows: Matrix, chunk_bytes: int, offset: int) -> Column:
    """Which rows reach from one chunk into another."""
    size = rows[:, RUN_BYTES] * rows[:, list(COUNTS)].prod(axis=1)
    crosses: Column = rows[:, offset] // chunk_bytes != (rows[:, offset] + size - 1) // chunk_bytes
    return crosses


def _cut_loop(rows: Matrix, chunk_bytes: int, offset: int, column: int, step: int) -> Matrix:
    """Rows with the loop of ``column`` cut so that its whole iterations of a chunk are a row, and so is each iteration
    that crosses a border. ``step`` is the loop's stride in the cargo."""
    loops = rows[:, column] > 1
    flat, rows = rows[~loops], rows[loops]
    begin, count, stride = rows[:, offset], rows[:, column], rows[:, step]
    first = begin // chunk_bytes
    chunks = (begin + count * stride - 1) // chunk_bytes - first + 1
    owner = np.repeat(np.arange(len(rows)), chunks)
    low = (first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * chunk_bytes
    # Of each chunk: the iterations that begin and end in it.
    whole_low = np.clip(-(-(low - begin[owner]) // stride[owner]), 0, count[owner])
    whole_high = np.clip((low + chunk_bytes - begin[owner]) // stride[owner], 0, count[owner])
    # The iteration that begins in the chunk and goes on behind it is none of those.
    over = np.clip((low + chunk_bytes - 1 - begin[owner]) // stride[owner], 0, count[owner] - 1)
    begins = begin[owner] + over * stride[owner]
    crossing = (begins >= low) & (begins < low + chunk_bytes) & (begins + stride[owner] > low + chunk_bytes)
    some = whole_high > whole_low
    parts = [(owner[some], whole_low[some], (whole_high - whole_low)[some])]
    parts.append((owner[crossing], over[crossing], np.ones(int(crossing.sum()), np.int64)))
    found = [flat]
    for which, start, length in parts:
        part = rows[which]
        part[:, SRC_OFFSET] += start * part[:, column + SRC_STRIDE]
        part[:, DST_OFFSET] += start * part[:, column + DST_STRIDE]
        part[:, column] = length
        found.append(part)
    return np.concatenate(found)


def _parts(begin: Column, size: Column, chunk_bytes: int) -> tuple[Column, Column, Column, Column]:
    """Ranges cut at borders of chunks: of each part its range, its chunk, where in its range it begins, its size."""
    first = begin // chunk_bytes
    chunks = np.where(size > 0, (begin + size - 1) // chunk_bytes - first + 1, 0)
    owner = np.repeat(np.arange(len(begin)), chunks)
    chunk = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    low = np.maximum(begin[owner], chunk * chunk_bytes)
    high = np.minimum((begin + size)[owner], (chunk + 1) * chunk_bytes)
    return owner, chunk, low - begin[owner], high - low


def _by_chunk(rows: Matrix, chunk: Column) -> CutTable:
    order = np.argsort(chunk, kind="stable")
    return CutTable(rows[order], chunk[order])
