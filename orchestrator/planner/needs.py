"""What all engines together need, each tensor in one way: what a trainer without a table makes its slots for."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from weightsync.orchestrator.planner.errors import (
    DtypeMismatch,
    LayoutError,
    PlanError,
    QuantizationMismatch,
    ShapeMismatch,
)
from weightsync.orchestrator.planner.inputs import Party
from weightsync.orchestrator.protocol.layout import ITEMSIZE, Layout, Quantized, Tensor
from weightsync.orchestrator.protocol.limits import MAX_TENSORS
from weightsync.orchestrator.protocol.messages import Needs
from weightsync.orchestrator.protocol.names import Member

_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Treatment:
    """How a tensor's codes come about: the name of the scales' tensor, and ``Quantized``'s other fields."""

    scales: str
    block: tuple[int, int]
    scale_format: str

    def __str__(self) -> str:
        return f"codes in blocks of {self.block} with {self.scale_format} scales in {self.scales!r}"


@dataclass(frozen=True, slots=True)
class NeedsFound:
    """``needs`` of the engines that agree; ``misfits`` says of each other engine why it does not, by name."""

    needs: Needs
    misfits: Mapping[str, str]


@dataclass(slots=True)
class _Union:
    """Tensors by name, in the order in which they were first needed, and who needed each first."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    treatments: dict[str, Treatment] = field(default_factory=dict)
    first: dict[str, Member] = field(default_factory=dict)
    quantization: str = ""

    def add(self, member: Member, layout: Layout) -> None:
        """What ``layout`` needs, too.

        Raises:
            LayoutError: the layout contradicts itself.
            Disagreement: it needs a tensor in another way than an earlier one.
        """
        treatments = dict(_treatments(member, layout))
        for tensor in layout.tensors:
            known = self.tensors.setdefault(tensor.name, tensor)
            first = self.first.setdefault(tensor.name, member)
            if known is not tensor and known != tensor:
                if known.shape != tensor.shape:
                    raise ShapeMismatch(tensor.name, first, known.shape, member, tensor.shape)
                raise DtypeMismatch(tensor.name, first, known.dtype, member, tensor.dtype)
            wanted = treatments.get(tensor.name)
            if first is member:
                if wanted is not None:
                    self.treatments[tensor.name] = wanted
            elif self.treatments.get(tensor.name) != wanted:
                plain = "plain values"
                there = self.treatments.get(tensor.name) or plain
                raise QuantizationMismatch(tensor.name, first, there, member, wanted or plain)
        self.quantization = self.quantization or layout.quantization


def union_of_needs(targets: Sequence[Party]) -> NeedsFound:
    """What the engines of ``targets`` need together.

    The engine that ``targets`` names first wins: a later one that needs some tensor in another dtype, shape or
    quantisation is a misfit, with the tensor, both values and both ranks.
    """
    engines: dict[str, list[Party]] = {}
    for party in targets:
        engines.setdefault(party.member.engine, []).append(party)
    union, misfits = _Union(), {}
    for name, ranks in engines.items():
        trial = _Union(dict(union.tensors), dict(union.treatments), dict(union.first), union.quantization)
        try:
            for layout, member in _different(ranks):
                trial.add(member, layout)
        except PlanError as error:
            misfits[name] = str(error)
        else:
            union = trial
    return NeedsFound(_message(union), misfits)


def _different(ranks: Sequence[Party]) -> Iterator[tuple[Layout, Member]]:
    """Each table of tensors once: the ranks of an engine mostly have the same one."""
    seen: list[tuple[tuple[Tensor, ...], tuple[Quantized, ...]]] = []
    for party in ranks:
        table = (party.layout.tensors, party.layout.quantized)
        if table not in seen:
            seen.append(table)
            yield party.layout, party.member


def _treatments(member: Member, layout: Layout) -> Iterator[tuple[str, Treatment]]:
    tensors = layout.tensors
    if len(tensors) > MAX_TENSORS:
        raise LayoutError(member, f"{len(tensors)} tensors exceed the limit of {MAX_TENSORS}")
    for tensor in tensors:
        if tensor.dtype not in ITEMSIZE:
            raise LayoutError(member, f"dtype {tensor.dtype!r} is not one that may travel", tensor.name)
    for entry in layout.quantized:
        if not (0 <= entry.tensor < len(tensors) and 0 <= entry.scales < len(tensors)) or min(entry.block) < 1:
            raise LayoutError(member, f"{entry} does not fit its {len(tensors)} tensors")
        yield tensors[entry.tensor].name, Treatment(tensors[entry.scales].name, entry.block, entry.scale_format)


def _message(union: _Union) -> Needs:
    # By name, so that the fingerprint does not depend on which engine spoke first.
    tensors = tuple(union.tensors[name] for name in sorted(union.tensors))
    index = {tensor.name: number for number, tensor in enumerate(tensors)}
    quantized = tuple(
        Quantized(index[name], index[t.scales], t.block, "ue8m0" if t.scale_format == "ue8m0" else "float32")
        for name, t in sorted(union.treatments.items())
    )
    covered = _encoder.encode((tensors, quantized, union.quantization))
    fingerprint = hashlib.sha256(covered).hexdigest()
    return Needs(tensors=tensors, quantized=quantized, quantization=union.quantization, fingerprint=fingerprint)
