"""Ranges of addresses, the physical chunks that they mean, and the flip: one comes to mean the other's chunks.

Kernels, captured graphs and compiled code keep their addresses and see the other memory from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from weightsync.agents.memory.errors import FlipFailed, PagesTorn
from weightsync.agents.memory.pages.driver import DriverError, VirtualMemory

CHUNK_BYTES: Final = 4 << 30
"""Of one physical allocation. Remapping costs by their number and by their bytes: both sets of 15 GB on an H100 take
2.4 ms with chunks of 1 GiB, 1.6 ms with 4 or 16 GiB (``tests/benchmarks/bench_gpu_flip.py``). The last one is as small
as it can be."""


@dataclass(frozen=True, slots=True)
class PhysicalChunk:
    """``size`` bytes of physical memory and its place in a range that it is mapped to."""

    handle: Any
    offset: int
    size: int


PhysicalChunks = tuple[PhysicalChunk, ...]


def create_chunks(memory: VirtualMemory, size: int, chunk_bytes: int = CHUNK_BYTES) -> PhysicalChunks:
    """Physical memory of ``size`` bytes, a multiple of the granularity.

    Raises:
        DriverError: there is no room; what was created is given back.
    """
    made: list[PhysicalChunk] = []
    try:
        for offset in range(0, size, chunk_bytes):
            part = min(chunk_bytes, size - offset)
            made.append(PhysicalChunk(memory.create(part), offset, part))
    except DriverError:
        release_chunks(memory, made)
        raise
    return tuple(made)


def release_chunks(memory: VirtualMemory, chunks: Sequence[PhysicalChunk]) -> None:
    """Give them back; they are mapped nowhere."""
    for chunk in chunks:
        memory.release(chunk.handle)


class PageRange:
    """Reserved addresses.

    Args:
        size: bytes, a multiple of the granularity.

    Attributes:
        base: the first address.
        chunks: what its addresses mean from the first on; None while nothing or only a part is there.

    Raises:
        DriverError: the addresses cannot be had.
    """

    def __init__(self, memory: VirtualMemory, size: int) -> None:
        self._memory = memory
        self.size = size
        self.base = memory.reserve(size)
        self.chunks: PhysicalChunks | None = None
        self._mapped: list[PhysicalChunk] = []

    def show(self, chunks: PhysicalChunks) -> None:
        """Let the addresses mean ``chunks`` and nothing else. Nobody may use them meanwhile.

        Raises:
            DriverError: the addresses mean a part of what they meant, or of ``chunks``; call again to go on or back.
        """
        if chunks is self.chunks:
            return
        self.hide()
        for chunk in chunks:
            self._memory.map(self.base + chunk.offset, chunk.size, chunk.handle)
            self._mapped.append(chunk)
        self._memory.allow(self.base, chunks[-1].offset + chunks[-1].size)
        self.chunks = chunks

    def fill(self, size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Show physical memory that is made for it: ``size`` bytes, a multiple of the granularity.

        Raises:
            DriverError: there is no room; what was made is given back.
        """
        chunks = create_chunks(self._memory, size, chunk_bytes)
        try:
            self.show(chunks)
        except DriverError:
            self.hide()
            release_chunks(self._memory, chunks)
            raise

    def hide(self) -> None:
        """Let the addresses mean nothing.

        Raises:
            DriverError: they mean what they did, or a part of it.
        """
        while self._mapped:
            chunk = self._mapped[-1]
            self._memory.unmap(self.base + chunk.offset, chunk.size)
            self._mapped.pop()
            self.chunks = None

    def close(self) -> None:
        """Give the addresses back."""
        self.hide()
        self._memory.give_back(self.base, self.size)


def flip(memory: VirtualMemory, live: PageRange, standby: PageRange) -> PhysicalChunks:
    """Let ``live`` mean what ``standby`` does, or change nothing. Both show chunks of one size; waits until the device
    is idle.

    Both mean the same memory then, so nobody may use ``standby`` before it shows what is returned: what ``live`` meant.

    Raises:
        FlipFailed: the driver refused; both are as they were.
        PagesTorn: the driver refused the way back too: nobody may use ``live`` any more.
    """
    served, waiting = live.chunks, standby.chunks
    if served is None:
        raise PagesTorn("served addresses were lost in a flip that failed; restart the engine")
    assert waiting is not None, "standby shows what was served before"
    memory.synchronise()
    try:
        live.show(waiting)
    except DriverError as error:
        try:
            live.show(served)
        except DriverError as again:
            live.chunks = None
            raise PagesTorn(
                f"flip failed ({error}), and so did the way back ({again}): served addresses are lost; restart the"
                " engine"
            ) from error
        raise FlipFailed(f"flip failed: {error}; what is served is as it was") from error
    return served
