"""Memory that a writer may still reach, by what it was told once, and that nobody uses any more.

A process of the same machine writes by addresses of ours without asking anybody, and one that was stopped may do so
when it wakes up. So the addresses stay mapped for as long as this process lives, and nothing else is ever put there.
Host pages go back to the system: what is written there takes new ones, which nobody reads. Those of a GPU stay
in use with their addresses, so its memory is quarantined only while there is plenty (``spare``).
"""

import ctypes
import logging
import mmap
import os
from typing import Final

import torch
from weightsync.agents.memory.arena import arena
from weightsync.agents.memory.cuda import Runtime
from weightsync.agents.memory.errors import MemoryPlacementError

log = logging.getLogger(__name__)

MOST: Final = 16
"""Quarantined in one process. Each takes as many pages again as late writers write, so there is an end."""

_kept: list[torch.Tensor] = []
_words: list[mmap.mmap] = []


def room() -> int:
    """How much more can be quarantined in this process."""
    return MOST - len(_kept)


def keep(word: mmap.mmap) -> None:
    """Never unmap a page that peers write a word into. There is no limit: one comes with each endpoint that is given
    up, at most one in some seconds and ever fewer."""
    _words.append(word)


def spare(size: int, device: torch.device) -> torch.Tensor:
    """What takes the place of as many bytes that are about to be quarantined, as ``arena`` gives it.

    Raises:
        MemoryPlacementError: there is no room; of a GPU's memory, not as much again would stay free for the engine.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 * size
    if 2 * size > free:
        raise MemoryPlacementError(
            f"a spare of {size} bytes takes more than half of the {free} that are free on {device}"
        )
    return arena(size, device)


def quarantine(memory: torch.Tensor) -> None:
    """An arena, as ``arena`` gives it. It is not registered any more, and not read.

    Pages that are locked cannot go back; a warning says so.

    Raises:
        MemoryPlacementError: there is no ``room``, or it is host memory that begins within a page.
    """
    address, size = memory.data_ptr(), memory.numel()
    if room() < 1 or (not memory.is_cuda and address % mmap.PAGESIZE):
        raise MemoryPlacementError(
            f"{size} bytes on {memory.device} at {address:#x} cannot be quarantined: {MOST} arenas can"
        )
    _kept.append(memory)
    if memory.is_cuda:
        log.warning("%d bytes of %s stay in use until this process ends: they are quarantined", size, memory.device)
        return
    if torch.cuda.is_available():
        Runtime().unpin(address)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED):
        log.warning("%d quarantined bytes stay in use: %s", size, os.strerror(ctypes.get_errno()))
