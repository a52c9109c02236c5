"""Whether this worker's weights lie in pages of ours, and moving them there: while vLLM starts, before it profiles
memory, so that its own budget sees both sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.agents.inference.landing import (
    ALONE,
    ANOTHER_RANK,
    LANDING_VARIABLE,
    Peers,
    declared_budget,
    free_bytes,
)
from weightsync.agents.inference.modes import MODE_VARIABLE, Mode
from weightsync.agents.memory.errors import PagesUnavailable, StandbyMissing
from weightsync.agents.memory.pages.host import HostPages
from weightsync.agents.memory.pages.paged import MIB, Pages, into_pages
from weightsync.agents.vllm.backend import logger
from weightsync.orchestrator.protocol.landing import usual_ring

KEPT_FOR_CACHE: Final = 0.5
"""With ``auto``, of the device's memory that is free beside one set of weights: what standby leaves for the rest."""


@dataclass(frozen=True, slots=True)
class Placed:
    """``pages`` hold the weights; None: nothing was moved, and ``why_not`` says why."""

    pages: Pages | None
    why_not: str = ""


def place(tensors: Sequence[torch.Tensor], needed: int, mode: Mode, peers: Peers = ALONE) -> Placed:
    """Move the storages of ``tensors`` into pages if ``mode`` wants that and, with ``auto``, it can be in all ranks.

    Args:
        tensors: all that rounds write in this worker; they follow their storages.
        needed: bytes of landing that a whole version takes here (``arena_bytes``): no ring is longer.

    Raises:
        PagesUnavailable: ``flip``, and it cannot be had; nothing was moved.
        StandbyMissing: they were moved, and there is no memory for a second set, here or in another rank.
    """
    ring = usual_ring(needed, on_device=True)
    why_not = _why_not(tensors, mode, ring)
    if peers.least(int(not why_not)) == 0:
        return _not_placed(why_not or ANOTHER_RANK)
    pages: Pages | None = None
    try:
        on_host = all(tensor.device.type == "cpu" for tensor in tensors)
        pages = _on_host(tensors) if on_host else into_pages(tensors, most=_most(mode, ring))
    except PagesUnavailable as error:
        if mode == "flip":
            raise
        why_not = str(error)
    everywhere = peers.least(int(pages is not None)) == 1
    if pages is None:
        return _not_placed(why_not)
    if not everywhere:
        raise StandbyMissing(
            f"the weights of this rank lie in pages, and those of {ANOTHER_RANK.replace('cannot', 'do not')}; start"
            f" the engine with {MODE_VARIABLE}=copy"
        )
    logger.info(
        "weightsync: weights lie in pages, twice: %.0f MiB in all; a version is switched to by remapping",
        pages.bytes / MIB,
    )
    return Placed(pages)


def _on_host(tensors: Sequence[torch.Tensor]) -> HostPages:
    needed, free = sum(tensor.numel() for tensor in tensors), free_bytes()
    if needed > free:
        raise PagesUnavailable(
            f"a second set of {needed / MIB:.0f} MiB of weights is more than the {free / MIB:.0f} MiB of host memory"
            f" that are free; set {MODE_VARIABLE}=live"
        )
    return HostPages(tensors)


def _not_placed(why_not: str) -> Placed:
    logger.info("weightsync: no flip: %s", why_not)
    return Placed(None, why_not)


def _why_not(tensors: Sequence[torch.Tensor], mode: Mode, ring: int) -> str:
    """Why ``mode`` does without pages before anybody has tried; empty where it does not."""
    if mode == "flip":
        return ""
    if mode != "auto":
        return f"{MODE_VARIABLE}={mode}"
    devices = {tensor.device for tensor in tensors}
    if any(device.type != "cuda" for device in devices):
        return f"pages of host memory are exchanged with {MODE_VARIABLE}=flip alone"
    most = _most(mode, ring)
    for device in devices:
        torch.cuda.empty_cache()
        weights = sum(tensor.numel() for tensor in tensors if tensor.device == device)
        if most is not None:
            if weights > most:
                return (
                    f"a second set of {weights / MIB:.0f} MiB and a ring of {ring / MIB:.0f} MiB are more"
                    f" than {LANDING_VARIABLE} allows, which is {(declared_budget() or 0) // MIB}"
                )
            continue
        free = torch.cuda.mem_get_info(device)[0]
        if weights > (1 - KEPT_FOR_CACHE) * free:
            return (
                f"a second set of {weights / MIB:.0f} MiB takes more than half of the {free / MIB:.0f} MiB that are"
                f" free on {device}; {MODE_VARIABLE}=flip takes them all the same"
            )
    return ""


def _most(mode: Mode, ring: int) -> int | None:
    """Bytes that a second set may take; None: as many as are free. Who names ``flip`` declares its ring alone."""
    budget = declared_budget() if mode == "auto" else None
    return None if budget is None else max(0, budget - ring)
