"""The digest of what lands chunk by chunk, at the rows that it is brought to, while the rest is on its way.

A copy of the plan is digested when all chunks with bytes of it were scattered. Digests of disjoint boxes add up, so
what is left when the last writer has finished is the last chunks' part. On a CPU, where digesting is computing and
others need the cores, all of it is.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from weightsync.agents.tables.runs import copy_sizes, digest_table, table_bytes
from weightsync.agents.tables.spans import Spans
from weightsync.kernels.digest import PreparedDigest, prepare
from weightsync.kernels.dispatch import StreamWork
from weightsync.orchestrator.protocol.layout import COPY_STAGED, Layout, Matrix
from weightsync.orchestrator.protocol.names import Digest, add_digests

PART_BYTES: Final = 1 << 30
"""Of an edge, at least: 0.4 ms of an H100 behind the last chunk. A launch, and the look at what came out, take 0.1 ms
each beside an engine that hardly lets go of the interpreter: with parts of 256 MiB that was 5 ms of each publish of
15 GB, and chunks waited."""


class Digester:
    """Begins digests: on ``stream``, or where there is none when they are asked for."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._work = None if stream is None else StreamWork(stream)

    def begin(self, digest: PreparedDigest) -> None:
        """Of rows to which nothing comes any more; the device has done what has written them."""
        if self._work is None:
            digest.launch()
        else:
            self._work.begin(digest.launch, digest)


def digesting_stream(device: torch.device) -> torch.cuda.Stream:
    """Of its own, for which no batch waits: 0, the priority by default, is the lowest."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class DigestPart:
    """Copies that are all there when the first ``chunks`` chunks of their cargo were scattered."""

    chunks: int
    digest: PreparedDigest


def digest_parts(
    copies: Matrix, chunk_bytes: int, layout: Layout, tensors: Sequence[torch.Tensor], part_bytes: int = PART_BYTES
) -> tuple[DigestPart, ...]:
    """All ``copies`` of one edge, as they become whole.

    Args:
        copies: int64 ``[n, COPY_COLUMNS]``, with their places in the edge's cargo.
        chunk_bytes: of that.
        layout: of this rank; ``tensors`` (uint8) are its regions.
        part_bytes: of a part, at least, but of the last one.

    Raises:
        RunTableError: copies that do not fit the layout.
    """
    sizes = copy_sizes(copies, layout)
    last = (copies[:, COPY_STAGED] + np.maximum(sizes, 1) - 1) // chunk_bytes
    order = np.argsort(last, kind="stable")
    number = (np.cumsum(sizes[order]) - 1) // part_bytes
    parts = []
    for part in np.unique(number):
        mine = order[number == part]
        table = digest_table(copies[mine], layout)
        parts.append(DigestPart(int(last[mine].max()) + 1, prepare(tensors, table, beside="batches")))
    return tuple(parts)


class CargoDigest:
    """Of one edge, on the agent's thread; ``result`` on another one, when nothing is scattered any more. Made for what
    begins now, as after ``begin``.

    Args:
        parts: in the order in which they become whole.
        digest: begins one.
    """

    def __init__(self, parts: Sequence[DigestPart], digest: Callable[[PreparedDigest], None]) -> None:
        self._parts = tuple(parts)
        self._digest = digest
        self.begin()

    def begin(self) -> None:
        """Nothing of this round is there."""
        self._whole = self._begun = 0

    def advance(self, scattered: Set[int]) -> None:
        """All chunks ``scattered`` in this round are in their rows."""
        while self._whole in scattered:
            self._whole += 1
        while self._begun < len(self._parts) and self._parts[self._begun].chunks <= self._whole:
            self._digest(self._parts[self._begun].digest)
            self._begun += 1

    def result(self) -> Digest | None:
        """Of all of it, once; waits for the device. None: some of it was not scattered since ``begin``, or it was asked
        for before, and other bytes may be there now."""
        if self._begun < len(self._parts):
            return None
        found = add_digests(*(part.digest.result() for part in self._parts))
        self.begin()
        return found


def covers(copies: Matrix, layout: Layout) -> bool:
    """Whether ``copies`` reach each byte of the layout's rows, and none of them twice: only then are their digests
    together that of the whole."""
    tables = [digest_table(copies, layout), digest_table(layout.matrix(), layout)]
    of_copies, of_rows = (Spans.of(table) for table in tables)
    reached = int((of_copies.ends - of_copies.starts).sum())
    alike = np.array_equal(of_copies.starts, of_rows.starts) and np.array_equal(of_copies.ends, of_rows.ends)
    return alike and reached == table_bytes(tables[0]) == table_bytes(tables[1])
