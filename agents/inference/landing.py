"""Where the next version lands in this worker, and how much memory that takes; decided while the engine starts.

The ranks of an engine land alike, so what one of them cannot have none takes (``Peers``).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from weightsync.agents.inference.modes import MODE_VARIABLE, ModeRefused, wanted_mode
from weightsync.orchestrator.protocol.landing import arena_bytes, usual_ring
from weightsync.orchestrator.protocol.layout import Lands, Layout

LANDING_VARIABLE: Final = "WEIGHTSYNC_LANDING_MIB"
"""What a rank may take for landing memory. Unset: what its mode needs."""

MIB: Final = 1 << 20

MAX_SHARE: Final = 0.5
"""With ``auto``, of the host's free memory: what the arenas of an engine leave for everything else."""

ANOTHER_RANK: Final = "another rank of this engine cannot, and its log says why"

PROC_MEMINFO: Final = Path("/proc/meminfo")
PROC_CGROUP: Final = Path("/proc/self/cgroup")
CGROUPS: Final = Path("/sys/fs/cgroup")


class Peers(Protocol):
    """The ranks that this one decides with, all of which ask the same questions in the same order.

    Attributes:
        count: of them, with this one.
    """

    @property
    def count(self) -> int: ...

    def least(self, value: int) -> int:
        """The least that one of them says."""


class _Alone:
    count = 1

    def least(self, value: int) -> int:
        return value


ALONE: Final[Peers] = _Alone()


@dataclass(frozen=True, slots=True)
class LandingChoice:
    """``bytes`` of one arena, 0 for none; ``why`` says to people how it came to that."""

    lands: Lands
    bytes: int
    why: str


def choose_landing(layout: Layout, device: torch.device, no_flip: str = "", peers: Peers = ALONE) -> LandingChoice:
    """What the environment asks for, if it can be had.

    Args:
        layout: of live memory.
        no_flip: why the weights do not lie in pages that can be exchanged; empty: they do.

    Raises:
        ModeRefused: it cannot; says what is missing.
    """
    mode, budget, needed = wanted_mode(), declared_budget(), arena_bytes(layout)
    missing = _missing(needed, budget, device, peers.count)
    if peers.least(int(not missing)) == 0:  # asked whatever the mode is, so that no rank waits for another's question
        missing = missing or ANOTHER_RANK
    ring = usual_ring(needed, on_device=device.type == "cuda")
    if mode == "live":
        return LandingChoice("live", ring if budget is None else budget, f"{MODE_VARIABLE}=live")
    if mode == "copy":
        if budget is not None and budget < needed:
            raise ModeRefused(
                f"{LANDING_VARIABLE} is {budget // MIB}, and {MODE_VARIABLE}=copy needs {-(-needed // MIB)} in this"
                " rank; raise it or unset it"
            )
        return LandingChoice("copy", needed, f"{MODE_VARIABLE}=copy")
    if mode == "flip":
        if no_flip:
            raise ModeRefused(f"{MODE_VARIABLE}=flip: the weights do not lie in pages: {no_flip}")
        return LandingChoice("flip", ring if budget is None else budget, f"{MODE_VARIABLE}=flip")
    if not no_flip:
        return LandingChoice("flip", ring, "the weights lie in pages, twice")
    if missing:
        small = ring if budget is None else min(ring, budget)
        return LandingChoice("live", small, f"no flip: {no_flip}; no copy: {missing}")
    return LandingChoice("copy", needed, f"no flip: {no_flip}; {-(-needed // MIB)} MiB for a whole version are there")


def _missing(needed: int, budget: int | None, device: torch.device, ranks: int) -> str:
    """Why ``auto`` takes no arena; empty when it does."""
    if budget is not None:
        short = f"a whole version needs {-(-needed // MIB)} MiB in this rank, and {LANDING_VARIABLE} is {budget // MIB}"
        return short if budget < needed else ""
    if device.type != "cpu":
        return f"{LANDING_VARIABLE} does not say that {-(-needed // MIB)} MiB of device memory may be taken"
    free, whole = free_bytes(), needed * ranks
    of = "" if ranks == 1 else f" in {ranks} ranks"
    share = f"a whole version takes {whole / MIB:.0f} MiB{of}, more than half of the {free / MIB:.0f} MiB that are free"
    return share if whole > MAX_SHARE * free else ""


def free_bytes(meminfo: Path = PROC_MEMINFO, own: Path = PROC_CGROUP, cgroups: Path = CGROUPS) -> int:
    """What this process can have of the host's memory without swapping, as Linux estimates it, and what the limits of
    its control groups (version 2: of containers and units) leave; 0 where nobody says."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 0
    return max(0, min([free, *_limits(own, cgroups)]))


def _limits(own: Path, cgroups: Path) -> list[int]:
    """Bytes that each control group around this process has left; those without a limit say nothing.

    ``memory.current`` counts the page cache, which is given back when it is asked for: inactive files are no use.
    """
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group, left = cgroups / path.strip().lstrip("/"), []
    for each in (group, *group.parents):
        if not each.is_relative_to(cgroups):
            break
        try:
            limit, used = (each / "memory.max").read_text().strip(), int((each / "memory.current").read_text())
            cached = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())["inactive_file"]
            left.append(int(limit) - used + int(cached))
        except (OSError, ValueError, KeyError):  # the root group has no such files, and "max" is no number
            continue
    return left


def declared_budget() -> int | None:
    """In bytes, of each rank; None where none is declared.

    Raises:
        ModeRefused: it is no number.
    """
    value = os.environ.get(LANDING_VARIABLE)
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise ModeRefused(f"{LANDING_VARIABLE} is {value!r}; give whole MiB, such as 1024")
    return int(value) * MIB
