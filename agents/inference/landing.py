"""Where the next version lands in this worker, and how much memory that takes; decided while the engine starts."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from weightsync.agents.inference.modes import MODE_VARIABLE, ModeRefused, wanted_mode
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Lands, Layout

LANDING_VARIABLE: Final = "WEIGHTSYNC_LANDING_MIB"
"""What a rank may take for landing memory. Unset: what its mode needs."""

DEFAULT_RING_MIB: Final = 64
"""Of ``live`` and ``flip``: what lands there goes on to its place at once, so a few chunks are enough."""

MIB: Final = 1 << 20

MAX_SHARE: Final = 0.5
"""With ``auto``, of the host's free memory: what an arena leaves for everything else."""


@dataclass(frozen=True, slots=True)
class LandingChoice:
    """``bytes`` of one arena, 0 for none; ``why`` says to people how it came to that."""

    lands: Lands
    bytes: int
    why: str


def choose_landing(layout: Layout, device: torch.device, paged: bool) -> LandingChoice:
    """What the environment asks for, if it can be had.

    Args:
        layout: of live memory.
        paged: the weights lie in pages that can be exchanged.

    Raises:
        ModeRefused: it cannot; says what is missing.
    """
    mode, budget = wanted_mode(), _budget()
    ring = DEFAULT_RING_MIB * MIB if budget is None else budget
    if mode == "live":
        return LandingChoice("live", ring, f"{MODE_VARIABLE}=live")
    if paged:
        return LandingChoice("flip", ring, "the weights lie in pages, twice")
    if mode == "flip":
        raise ModeRefused(f"{MODE_VARIABLE}=flip: the weights do not lie in pages that could be exchanged")
    needed = arena_bytes(layout)
    if mode == "copy":
        if budget is not None and budget < needed:
            raise ModeRefused(
                f"{LANDING_VARIABLE} is {budget // MIB}, and {MODE_VARIABLE}=copy needs {-(-needed // MIB)} in this"
                " rank; raise it or unset it"
            )
        return LandingChoice("copy", needed, f"{MODE_VARIABLE}=copy")
    if missing := _missing(needed, budget, device):
        return LandingChoice("live", ring, missing)
    return LandingChoice("copy", needed, f"{needed / MIB:.0f} MiB for a whole version are there")


def _missing(needed: int, budget: int | None, device: torch.device) -> str:
    """Why ``auto`` takes no arena; empty when it does."""
    if budget is not None:
        short = f"a whole version needs {-(-needed // MIB)} MiB, and {LANDING_VARIABLE} is {budget // MIB}"
        return short if budget < needed else ""
    if device.type != "cpu":
        return f"{LANDING_VARIABLE} does not say that {-(-needed // MIB)} MiB of device memory may be taken"
    free = free_bytes()
    share = f"a whole version takes {needed / MIB:.0f} MiB, more than half of the {free / MIB:.0f} MiB that are free"
    return share if needed > MAX_SHARE * free else ""


def free_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Of this host, as Linux estimates what can be had without swapping; 0 where nobody says."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 0


def _budget() -> int | None:
    value = os.environ.get(LANDING_VARIABLE)
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise ModeRefused(f"{LANDING_VARIABLE} is {value!r}; give whole MiB, such as {DEFAULT_RING_MIB}")
    return int(value) * MIB
