"""Why a plan cannot be made. None may be retried with the same layouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from weightsync.orchestrator.core.errors import WeightsyncError
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import Member

MIB: Final = 1 << 20

SHOWN: Final = 20
"""Tensors listed in a message; the whole list is an attribute of the error."""


class PlanError(WeightsyncError):
    """The layouts do not make a plan. ``member`` is the agent whose layout does not fit, where it is one agent's."""

    fault: ClassVar[Fault] = "config"

    def __init__(self, message: str, member: Member | None = None) -> None:
        super().__init__(message)
        self.member = member


class LayoutError(PlanError):
    """A layout contradicts itself: an index, box, stride or address outside of what it declares."""

    def __init__(self, member: Member, reason: str, tensor: str = "") -> None:
        where = f"{member}: tensor {tensor!r}: " if tensor else f"{member}: "
        super().__init__(where + reason, member)
        self.tensor = tensor


class Disagreement(PlanError):
    """Two agents declare one logical tensor differently."""

    what: ClassVar[str]

    def __init__(self, tensor: str, first: Member, first_value: object, second: Member, second_value: object) -> None:
        super().__init__(
            f"tensor {tensor!r} has {self.what} {first_value} at {first} but {second_value} at {second}", second
        )
        self.tensor = tensor
        self.first, self.first_value = first, first_value
        self.second, self.second_value = second, second_value


class ShapeMismatch(Disagreement):
    """The full shapes differ."""

    what = "shape"


class DtypeMismatch(Disagreement):
    """The wire dtypes differ."""

    what = "dtype"


class QuantizationMismatch(Disagreement):
    """One needs values where the other needs codes, or codes that are made otherwise."""

    what = "treatment"


@dataclass(frozen=True, slots=True)
class Missing:
    """``elements`` of a box of ``tensor`` that ``member`` needs and no source holds."""

    tensor: str
    member: Member
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    elements: int

    def __str__(self) -> str:
        box = ", ".join(f"{o}:{o + e}" for o, e in zip(self.offset, self.extent, strict=True))
        return f"{self.tensor}[{box}] lacks {self.elements} elements at {self.member}"


class CoverageError(PlanError):
    """Some target needs what no source holds."""

    def __init__(self, missing: Sequence[Missing]) -> None:
        self.missing = tuple(missing)
        self.tensors = tuple(dict.fromkeys(m.tensor for m in missing))
        engines = {m.member.engine for m in missing}
        shown = "; ".join(map(str, self.missing[:SHOWN]))
        more = f"; and {len(self.missing) - SHOWN} more" if len(self.missing) > SHOWN else ""
        super().__init__(
            f"no trainer rank holds all of {len(self.tensors)} tensors that the engines need: {shown}{more}",
            missing[0].member if len(engines) == 1 else None,
        )


class LandingTooSmall(PlanError):
    """An engine's landing memory does not take what must land there at once."""

    def __init__(self, member: Member, needed: int, room: int) -> None:
        missing = -(-(needed - room) // MIB)
        super().__init__(
            f"{member}: its landing of {room / MIB:.1f} MiB is {missing} MiB too small for the {needed / MIB:.1f} MiB"
            f" that land there. Fix: raise WEIGHTSYNC_LANDING_MIB of the engine by {missing}, or unset it",
            member,
        )


class TooComplex(PlanError):
    """Sources hold one tensor in so many different overlapping boxes that splitting them would not end soon."""


class ProofFailed(PlanError):
    """The independent check found a destination byte not written exactly once with its own value. Our bug."""

    fault: ClassVar[Fault] = "daemon"
