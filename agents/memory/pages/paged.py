"""The weights of one device in pages: what is served, and standby, which is filled while that is."""

from collections.abc import Sequence
from typing import Final, Protocol

import torch
from weightsync.agents.memory.errors import PagesUnavailable, StandbyLost, StandbyMissing
from weightsync.agents.memory.pages.driver import CudaMemory, DriverError, VirtualMemory
from weightsync.agents.memory.pages.pool import PageAddresses, Relocation, span_of
from weightsync.agents.memory.pages.ranges import CHUNK_BYTES, PageRange, PhysicalChunks, flip

MIB: Final = 1 << 20


class Pages(Protocol):
    """Weights in two sets of pages.

    Attributes:
        bytes: of physical memory, in both sets together.
    """

    bytes: int

    def standby_of(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The same bytes of the other set: uint8 of one dimension, at addresses that stay whatever is flipped.

        Raises:
            PagesUnavailable: one of them does not lie in pages.
        """

    def flip(self) -> None:
        """What was standby is served, and what was served is standby when ``settle`` was called; again: back. Waits
        for the device.

        Raises:
            FlipFailed: not flipped; what is served is as it was.
            PagesTorn: served addresses have no memory.
        """

    def settle(self) -> None:
        """After a flip, before anybody uses standby's addresses; the device may work. Again does nothing.

        Raises:
            StandbyLost: they have no memory; what is served is whole.
        """


class PagedMemory:
    """Memory that is in pages, and as much again.

    Args:
        live: what is served.
        standby: shows as many bytes of chunks as ``live`` does.

    Attributes:
        bytes: of physical memory, in both sets together.
    """

    def __init__(self, memory: VirtualMemory, live: PageRange, standby: PageRange) -> None:
        self._memory = memory
        self._live, self._standby = live, standby
        self._left: PhysicalChunks | None = None
        """What was served before a flip that has not settled."""
        self.bytes = 2 * standby.size

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether all of a contiguous tensor lies in what is served."""
        size = tensor.numel() * tensor.element_size()
        return self._live.base <= tensor.data_ptr() <= self._live.base + self._standby.size - size

    def standby_of(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """See ``Pages``."""
        for tensor in tensors:
            if not self.covers(tensor):
                raise PagesUnavailable(f"{tensor.numel()} bytes at {tensor.data_ptr():#x} do not lie in pages")
        whole = self._memory.tensor(self._standby.base, self._standby.size)
        starts = [tensor.data_ptr() - self._live.base for tensor in tensors]
        return tuple(whole[at : at + t.numel() * t.element_size()] for at, t in zip(starts, tensors, strict=True))

    def flip(self) -> None:
        """See ``Pages``."""
        self.settle()
        self._left = flip(self._memory, self._live, self._standby)

    def settle(self) -> None:
        """See ``Pages``."""
        if self._left is None:
            return
        try:
            self._standby.show(self._left)
        except DriverError as error:
            raise StandbyLost(
                f"standby has no memory since a flip ({error}); what is served is whole; restart the engine"
            ) from error
        self._left = None


def into_pages(
    tensors: Sequence[torch.Tensor],
    memory: VirtualMemory | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    most: int | None = None,
) -> PagedMemory:
    """Move the storages of ``tensors`` into pages, with a standby set that holds the same bytes.

    On the main thread while an engine starts: after the weights were loaded and processed, before graphs are captured.

    Args:
        tensors: all on one CUDA device. They follow their storages.
        memory: of the device, if not CUDA's own.
        most: bytes that standby may take, if not all that are free.

    Raises:
        PagesUnavailable: with the reason; nothing was moved.
        StandbyMissing: they were moved, and there is no second set.
    """
    device = _device(tensors)
    memory = CudaMemory(device) if memory is None else memory
    storages = list({t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values())
    sizes = [storage.nbytes() for storage in storages]
    torch.cuda.empty_cache()
    if memory.free() < sum(sizes):
        raise PagesUnavailable(
            f"a standby set of {sum(sizes) / MIB:.0f} MiB of weights needs as much memory again, and"
            f" {memory.free() / MIB:.0f} MiB of {device} are free; set WEIGHTSYNC_MODE=live, or give the engine fewer"
            " weights a rank"
        )
    live = _reserved(memory, _up(span_of(sizes), memory.granularity))
    try:
        move = Relocation(storages, PageAddresses(live.base, live.size), device)
    except PagesUnavailable:
        live.close()
        raise
    size = _up(move.used, memory.granularity)
    try:
        if most is not None and size > most:
            raise PagesUnavailable(
                f"a standby set of {size / MIB:.0f} MiB is more than the {most / MIB:.0f} MiB that it may take"
            )
        live.fill(size, chunk_bytes)
    except PagesUnavailable:
        move.cancel()
        live.close()
        raise
    except DriverError as error:
        move.cancel()
        live.close()
        raise PagesUnavailable(f"no pages for {size / MIB:.0f} MiB of weights on {device}: {error}") from error
    move.finish()
    memory.synchronise()
    torch.cuda.empty_cache()  # what the weights had until now is what standby needs
    try:
        standby = PageRange(memory, size)
        standby.fill(size, chunk_bytes)
    except DriverError as error:
        raise StandbyMissing(
            f"no room for a second set of {size / MIB:.0f} MiB of weights on {device} ({error};"
            f" {memory.free() / MIB:.0f} MiB are free): start the engine with WEIGHTSYNC_MODE=live, or give it fewer"
            " weights a rank"
        ) from error
    memory.tensor(standby.base, size).copy_(memory.tensor(live.base, size))
    return PagedMemory(memory, live, standby)


def _reserved(memory: VirtualMemory, size: int) -> PageRange:
    try:
        return PageRange(memory, size)
    except DriverError as error:
        raise PagesUnavailable(f"{size / MIB:.0f} MiB of addresses for weights: {error}") from error


def _device(tensors: Sequence[torch.Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        places = ", ".join(sorted(map(str, devices))) or "no memory at all"
        raise PagesUnavailable(
            f"weights of one worker lie on {places}, and pages are of one device; give each worker one GPU, or set"
            " WEIGHTSYNC_MODE=copy"
        )
    return devices.pop()


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
