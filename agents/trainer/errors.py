"""What can be wrong with a trainer's tensors or its table. Its fault; the same state fails again."""

from collections.abc import Sequence
from typing import Final

from weightsync.agents.errors import AgentError

SHOWN_NAMES: Final = 6
"""Of tensors in one error; their number is said beside them."""


class TrainerError(AgentError):
    """Base of all errors of the trainer's side. ``fault`` and ``retry`` are for the daemon's report."""

    fault = "trainer"


class MissingTensor(TrainerError, KeyError):
    """The trainer's state lacks a tensor that the conversion table reads."""

    def __init__(self, key: str, dst: str, hint: str = "") -> None:
        super().__init__(key)
        self.key = key
        self.dst = dst
        self.hint = hint

    def __str__(self) -> str:
        return f"the trainer's state has no tensor {self.key!r}, which the table reads for {self.dst!r}{self.hint}"


class UnfitTensor(TrainerError):
    """A tensor that can be no weight as it is: codes of a quantisation, a placeholder, one without values."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r} {reason}")
        self.name = name


class AmbiguousName(TrainerError):
    """Two tensors that would have one name without what wrappers put before it."""

    def __init__(self, one: str, other: str, plain: str) -> None:
        super().__init__(
            f"{one!r} and {other!r} are different tensors, and both are {plain!r} without the names of wrappers; give"
            " the model inside the wrapper, or a callable that returns one of them"
        )


class UnreadTensors(TrainerError):
    """Tensors that are trained and that no engine would get."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"{len(names)} trained tensors are read by nobody, engines would serve a model without them:"
            f" {shown(names)}. Merge adapters by lora=LoraMerge(…) or a callable that returns merged weights; what"
            " engines do not need is declared by ignore=('pattern', …)"
        )
        self.names = tuple(names)


class AdapterError(TrainerError):
    """Adapters that cannot be merged into a weight of the module ``name``."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r}: {reason}")
        self.name = name


class NoRoomForSlots(TrainerError):
    """The memory that slots need cannot be had."""


class NonFiniteWeights(TrainerError):
    """Converted weights that are NaN or infinite, where the option ``nonfinite`` refuses them."""

    def __init__(self, found: Sequence[object]) -> None:
        super().__init__(
            f"{len(found)} tensors hold NaN or infinity in the dtype that engines are sent: {shown(found)}. Publish a"
            " step before they came, or allow them by nonfinite='warn' or 'allow'"
        )


class DifferentCopies(TrainerError):
    """Ranks that hold the same tensors hold other values of them."""

    def __init__(self, one: int, other: int, names: str) -> None:
        super().__init__(
            f"ranks {one} and {other} hold different values of {names}: engines would be sent a mixture. Reduce or"
            " broadcast what all ranks are to have alike; SlotOptions(hsdp='primary') sends from one replica,"
            " replicas='trust' compares nothing"
        )


class DifferentGathering(TrainerError):
    """Ranks of one mesh that would not gather the same tensors."""

    def __init__(self, one: int, other: int, names: str) -> None:
        super().__init__(
            f"ranks {one} and {other} would not gather the same of {names}: all ranks of a mesh give tensors of the"
            " same global shapes and placements, one table and the same SlotOptions (DTensor.from_local of uneven"
            " shards needs shape= and stride=)"
        )


class ChangedTensor(TrainerError):
    """A tensor of the state has another shape, dtype or sharding than when the slots were made."""


class UnsupportedPlacement(TrainerError):
    """A DTensor placement that has no boxes."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"tensor {name!r}: {reason}")


class ExpertPartitionError(TrainerError):
    """Local experts × FSDP × expert parallelism is not the number of experts of the model."""


class OffGridError(TrainerError):
    """A tensor-parallel slice cuts a quantisation block."""


class ConversionTableError(TrainerError):
    """A conversion table that contradicts itself or the trainer's shapes."""


class UnknownArchitecture(TrainerError):
    """No table is registered for the architectures of a model configuration."""


class UnsupportedFormat(TrainerError):
    """Engines hold some tensors in a format that cannot be made from a trainer's values."""


class UnroutableTensors(TrainerError):
    """Engines need tensors for which the trainer's state has no source, or one of another shape."""


class ReplicaFailed(TrainerError):
    """Another rank failed inside the section that all leave together."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


def shown(things: Sequence[object]) -> str:
    """The first of ``things``, and how many more there are."""
    more = f" and {len(things) - SHOWN_NAMES} more" if len(things) > SHOWN_NAMES else ""
    return ", ".join(map(str, things[:SHOWN_NAMES])) + more
