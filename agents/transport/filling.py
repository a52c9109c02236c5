"""How far the slots of a version are filled, whose bytes are written while the rest is still being converted."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import torch
from weightsync.kernels.dispatch import StreamMark
from weightsync.orchestrator.protocol.names import Version

ALL: Final = 2**63 - 1
"""An offset beyond every arena."""

Filled = Callable[[], int]
"""How many bytes of region 0 of the layout, from its beginning, hold the version that is written."""


def whole() -> int:
    """``Filled`` of slots that hold all of it."""
    return ALL


class Filling:
    """One conversion. Made on the agent's thread, which asks how far it is; the trainer's thread says it.

    Args:
        version: what the slots are filled with.
        device: of the slots.

    Attributes:
        ended: done when nothing is converted any more: whether the version was staged. Of the agent's event loop.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        self.version = version
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._device = device
        self._marks: deque[tuple[int, StreamMark]] = deque()
        self._filled = 0

    def reached(self, offset: int) -> None:
        """All below ``offset`` is converted, once the caller's stream has done what it has been given so far."""
        mark = StreamMark(self._device)
        mark.mark()
        self._marks.append((offset, mark))

    def filled(self) -> int:
        """See ``Filled``. On the agent's thread."""
        while self._marks and self._marks[0][1].reached():
            self._filled = self._marks.popleft()[0]
        return self._filled
