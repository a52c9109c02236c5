"""What a plan is made from."""

from dataclasses import dataclass
from typing import Literal

from weightsync.orchestrator.protocol.edges import RATES
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.names import Member


@dataclass(frozen=True, slots=True)
class Party:
    """One agent of a plan: a source that holds, or a target that needs, what ``layout`` says."""

    member: Member
    incarnation: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of an edge: ``descriptors * alpha_seconds + bytes / bytes_per_second``.

    The defaults are those of a NIC. ``pack_bytes_per_second`` is gather plus scatter of packed bytes, on
    both ends together: two passes of a strided copy through HBM at about half the rate of a plain device copy.
    """

    alpha_seconds: float = RATES["nic"].alpha_seconds
    bytes_per_second: float = RATES["nic"].bytes_per_second
    pack_bytes_per_second: float = 500e9

    def pack_below_bytes(self, memory: Literal["DRAM", "VRAM"]) -> float:
        """Contiguous bytes of a source below which a descriptor is worth avoiding: the wire does not hide it, and
        copying is cheaper. Out of a GPU the wire may be NVLink, which hides less than a NIC; packing costs little
        there, whichever it is."""
        own = self.alpha_seconds * min(self.bytes_per_second, self.pack_bytes_per_second)
        between = RATES["nvlink"]
        fast = between.alpha_seconds * min(between.bytes_per_second, self.pack_bytes_per_second)
        return max(own, fast) if memory == "VRAM" else own

    def seconds(self, descriptors: int, size: int) -> float:
        """Predicted seconds of ``descriptors`` writes that carry ``size`` bytes in all."""
        return descriptors * self.alpha_seconds + size / self.bytes_per_second
