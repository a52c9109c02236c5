"""Whether this worker's weights lie in pages of ours, and moving them there: while vLLM starts, before it profiles
memory, so that its own budget sees both sets."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from weightsync.agents.inference.modes import Mode
from weightsync.agents.memory.errors import PagesUnavailable
from weightsync.agents.memory.pages.paged import MIB, PagedMemory, into_pages
from weightsync.agents.vllm.backend import logger

KEPT_FOR_CACHE: Final = 0.5
"""With ``auto``, of the memory that vLLM may use beside one set of weights: what standby leaves for everything else."""


def place(tensors: Sequence[torch.Tensor], vllm_config: Any, mode: Mode) -> PagedMemory | None:
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
        _require_own_memory(vllm_config)
        if mode == "auto":
            _require_moderation(tensors, vllm_config)
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


def _require_own_memory(vllm_config: Any) -> None:
    """vLLM's own pages (sleep mode's) keep their memory when weights are moved out of them."""
    model = getattr(vllm_config, "model_config", None)
    for setting in ("enable_sleep_mode", "enable_cumem_allocator"):
        if getattr(model, setting, False):
            raise PagesUnavailable(
                f"model_config.{setting} is True: vLLM then keeps weights in pages of its own; start without"
                f" --{setting.replace('_', '-')}"
            )


def _require_moderation(tensors: Sequence[torch.Tensor], vllm_config: Any) -> None:
    share = getattr(getattr(vllm_config, "cache_config", None), "gpu_memory_utilization", None)
    devices = {tensor.device for tensor in tensors}
    if share is None or any(device.type != "cuda" for device in devices):
        return  # ``into_pages`` says what is the matter
    weights = sum(tensor.numel() for tensor in tensors)
    left = share * min(torch.cuda.mem_get_info(device)[1] for device in devices) - weights
    if weights > (1 - KEPT_FOR_CACHE) * left:
        raise PagesUnavailable(
            f"a standby set of {weights / MIB:.0f} MiB takes more than half of the {left / MIB:.0f} MiB that"
            " gpu_memory_utilization leaves beside the weights; WEIGHTSYNC_MODE=flip takes them all the same"
        )
