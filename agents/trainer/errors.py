"""What can be wrong with a trainer's tensors or its table. Its fault; the same state fails again."""

from weightsync.agents.errors import AgentError


class TrainerError(AgentError):
    """Base of all errors of the trainer's side. ``fault`` and ``retry`` are for the daemon's report."""

    fault = "trainer"


class MissingTensor(TrainerError, KeyError):
    """The trainer's state lacks a tensor that the conversion table reads."""

    def __init__(self, key: str, dst: str) -> None:
        super().__init__(key)
        self.key = key
        self.dst = dst

    def __str__(self) -> str:
        return f"the trainer's state has no tensor {self.key!r}, which the table reads for {self.dst!r}"


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
