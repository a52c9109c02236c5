"""How trainer tensors become logical (checkpoint) tensors: routing only, the arithmetic is ``quantization``'s.

``dst`` is a name of the checkpoint. Fusion (qkv, gate_up, w13) is the business of the engine's own boxes.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.slots.quantization import PLAIN, QuantizationSpec

EXPERT: Final = "{expert}"
"""Stands for the global expert id in the ``dst`` of a specification whose sources stack experts."""


@dataclass(frozen=True, slots=True)
class Source:
    """A trainer tensor, or ``length`` entries of it from ``start`` along ``dim`` (the experts' dimension left out).

    Raises:
        ConversionTableError: numbers that count from the end, or no entries.
    """

    key: str
    dim: int = 0
    start: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        if self.dim < 0 or self.start < 0 or (self.length is not None and self.length < 1):
            raise ConversionTableError(
                f"{self.key!r}: dim={self.dim}, start={self.start}, length={self.length}: dim and start are counted"
                " from the beginning, and length is at least 1"
            )


@dataclass(frozen=True, slots=True)
class ConversionSpec:
    """One logical tensor and the trainer tensors that it is made of.

    ``sources`` are joined along ``cat_dim``, for checkpoints that store as one what the trainer keeps apart. With
    ``experts`` > 0 every source is stacked ``[experts, …]`` and ``dst`` names one logical tensor per expert. With
    ``expert_id`` set, the tensor belongs to one expert, and a rank that does not own it lacks it rightfully.
    ``layer`` is None for tensors outside the layers.

    Raises:
        ConversionTableError: contradictory fields.
    """

    dst: str
    sources: tuple[Source, ...]
    cat_dim: int = 0
    quantization: QuantizationSpec = PLAIN
    experts: int = 0
    expert_id: int | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConversionTableError(f"{self.dst!r} has no sources")
        if self.cat_dim < 0:
            raise ConversionTableError(
                f"{self.dst!r}: cat_dim={self.cat_dim}: it is counted from the beginning, from 0"
            )
        if (EXPERT in self.dst) != (self.experts > 0):
            raise ConversionTableError(
                f"{self.dst!r}: {EXPERT} stands in the name if and only if the sources stack experts"
            )
        if self.experts and len(self.sources) != 1:
            raise ConversionTableError(
                f"{self.dst!r}: stacked experts come from one source; cut it with Source(dim, start, length)"
            )

    @property
    def scale_name(self) -> str:
        """Logical name of the scales (with ``{expert}`` where ``dst`` has it); empty for a plain cast."""
        return self.quantization.scale_name(self.dst) if self.quantization.quantizes else ""

    def per_source_scale_key(self, source: Source) -> str:
        """Key under which the scales of one source's share are kept and explained; empty for a plain cast."""
        return self.quantization.scale_name(source.key) if self.quantization.quantizes else ""

    def logical(self, expert: int) -> tuple[str, str]:
        """Names of the values and of the scales (empty without) of one expert; ``expert`` is ignored if not stacked."""
        if not self.experts:
            return self.dst, self.scale_name
        return self.dst.replace(EXPERT, str(expert)), self.scale_name.replace(EXPERT, str(expert))


def refuse_doubles(specs: Iterable[ConversionSpec]) -> None:
    """That each logical tensor comes from one specification: the plan would send either.

    Raises:
        ConversionTableError: two make one tensor, or one makes the scales that another one has by their name.
    """
    made: dict[str, ConversionSpec] = {}
    for spec in specs:
        for expert in range(max(spec.experts, 1)):
            for name in filter(None, spec.logical(expert)):
                other = made.setdefault(name, spec)
                if other is not spec:
                    raise ConversionTableError(
                        f"{name!r} is made twice, of {_read_by(other)} (for {other.dst!r}) and of {_read_by(spec)} (for"
                        f" {spec.dst!r}); a version has one value for each name"
                    )


def _read_by(spec: ConversionSpec) -> str:
    return ", ".join(repr(source.key) for source in spec.sources)


class ConversionTable(Protocol):
    """What slots ask of a model's table (``weightsync.agents.trainer.models``)."""

    @property
    def layers(self) -> int:
        """Decoder layers."""

    def for_keys(self, keys: Collection[str], /) -> "ConversionTable":
        """This table for a trainer whose tensors have the names ``keys``."""

    def conversion_specs(self, layer_idx: int, /) -> Iterable[ConversionSpec]:
        """All logical tensors of one layer, in an order that is the same on every rank."""

    def non_layer_specs(self) -> Iterable[ConversionSpec]:
        """All logical tensors outside the layers, likewise."""
