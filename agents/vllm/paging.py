"""Whether this worker's weights lie in pages of ours, and moving them there: while vLLM starts, before it profiles
memory, so that its own budget sees both sets."""

from collections.abc import Sequence
from typing import Final

import torch
from weightsync.agents.inference.modes import Mode
from weightsync.agents.memory.errors import PagesUnavailable
from weightsync.agents.memory.pages.paged import MIB, PagedMemory, into_pages
from weightsync.agents.vllm.backend import logger

KEPT_FOR_CACHE: Final = 0.5
"""With ``auto``, of the device's memory that is free beside one set of weights: what standby leaves for the rest."""


def place(tensors: Sequence[torch.Tensor], mode: Mode) -> PagedMemory | None:
    """Move the storages of ``tensors`` into pages if ``mode`` wants that; None if not or, with ``auto``, it cannot be.

    Args:
        tensors: all that rounds write in this worker; they follow their storages.

    Raises:
        PagesUnavailable: ``flip``, and it cannot be had; nothing was moved.
        StandbyMissing: they were moved, and there is no memory for a second set.
    """
    if mode not in ("auto", "flip"):
        return None
    try:
        if mode == "auto":
            _require_moderation(tensors)
        pages = into_pages(tensors)
    except PagesUnavailable as error:
        if mode == "flip":
            raise
        logger.info("weightsync: no flip, because weights cannot lie in pages: %s", error)
        return None
    logger.info(
        "weightsync: weights lie in pages, twice: %.0f MiB in all; a version is switched to by remapping",
        pages.bytes / MIB,
    )
    return pages


def _require_moderation(tensors: Sequence[torch.Tensor]) -> None:
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.empty_cache()
        weights = sum(tensor.numel() for tensor in tensors if tensor.device == device)
        free = torch.cuda.mem_get_info(device)[0]
        if weights > (1 - KEPT_FOR_CACHE) * free:
            raise PagesUnavailable(
                f"a standby set of {weights / MIB:.0f} MiB takes more than half of the {free / MIB:.0f} MiB that are"
                f" free on {device}; WEIGHTSYNC_MODE=flip takes them all the same"
            )
