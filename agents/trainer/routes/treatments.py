"""What each tensor that engines need is on the wire: a cast or a quantisation, as their layouts say."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.agents.trainer.errors import UnsupportedFormat
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.kernels.fp8_reference import ScaleFormat
from weightsync.orchestrator.protocol.layout import ITEMSIZE, Quantized, Tensor
from weightsync.orchestrator.protocol.messages import Needs

SHOWN: Final = 5
"""Tensors that an error names; it counts the others, and stays short enough to reach the other ranks whole."""

CODES: Final = torch.float8_e4m3fn
VALUES: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes that a trainer's values may be cast to."""
NEVER_ROUNDED: Final = (torch.float32, torch.float64)
"""Needed in one of these, a master is not rounded to the forward dtype on its way."""
QUANTISED_FROM: Final = torch.bfloat16
"""What masters are rounded to before they are quantised, unless a forward dtype is given: FP8 checkpoints are made
from bfloat16 ones."""
SCALES: Final[Mapping[torch.dtype, tuple[ScaleFormat, ...]]] = {
    torch.float32: ("fp32", "ue8m0"),
    torch.float8_e8m0fnu: ("ue8m0",),
    torch.uint8: ("ue8m0",),
}
"""Dtypes that scales may have, and what they may then be."""


@dataclass(frozen=True, slots=True)
class Needed:
    """A tensor that engines need, and its treatment. Scales are no needed tensor of their own: they come with it."""

    tensor: Tensor
    treatment: QuantizationSpec
    scales: Tensor | None = None

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return self.tensor.name


def treatments(needs: Needs, forward_dtype: torch.dtype | None) -> dict[str, Needed]:
    """Every tensor of ``needs`` but scales, by name, in their order.

    A tensor that is cast goes from the trainer's master straight to the needed dtype, unless ``forward_dtype`` is
    given and the needed dtype is none of NEVER_ROUNDED: then through it.

    Raises:
        UnsupportedFormat: some tensors are neither values nor codes that can be made from values; all of them by name.
    """
    codes = {entry.tensor: entry for entry in needs.quantized}
    scales = {entry.scales for entry in needs.quantized}
    found: dict[str, Needed] = {}
    refused: list[tuple[Tensor, str]] = []
    for number, tensor in enumerate(needs.tensors):
        if number in scales:
            continue
        entry = codes.get(number)
        if entry is not None:
            of = needs.tensors[entry.scales]
            reason = "; ".join(_objections(tensor, of, entry))
            if not reason:
                spec = _quantised(tensor, of, entry, forward_dtype)
                found[tensor.name] = Needed(tensor, spec, of)
                if spec.stored(spec.scale_shape(tensor.shape)) != of.shape:
                    reason = f"scales of shape {of.shape}, for blocks of {entry.block}"
        else:
            reason = "" if _dtype(tensor) in VALUES or _is_index(tensor) else _why_not(tensor)
            if not reason:
                found[tensor.name] = Needed(tensor, _cast(_dtype(tensor), forward_dtype))
        if reason:
            refused.append((tensor, reason))
    if refused:
        raise UnsupportedFormat(_explained(refused, needs.quantization))
    return found


def _dtype(tensor: Tensor) -> torch.dtype:
    """The protocol has names of torch's dtypes only."""
    dtype = getattr(torch, tensor.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _is_index(tensor: Tensor) -> bool:
    """Tables of integers that are no packed weights: 64 bits wide, as torch makes them."""
    return tensor.dtype in ("int64", "bool")


def _cast(dtype: torch.dtype, forward_dtype: torch.dtype | None) -> QuantizationSpec:
    if dtype not in VALUES:
        return QuantizationSpec(dtype, forward_dtype=dtype, keeps_master=True)
    keeps = dtype in NEVER_ROUNDED
    return QuantizationSpec(dtype, forward_dtype=forward_dtype or dtype, keeps_master=keeps)


def _quantised(codes: Tensor, scales: Tensor, entry: Quantized, forward_dtype: torch.dtype | None) -> QuantizationSpec:
    return QuantizationSpec(
        CODES,
        scales.name.removeprefix(codes.name),
        forward_dtype=forward_dtype or QUANTISED_FROM,
        block=entry.block,
        scale_dtype=_dtype(scales),
        scale_format="ue8m0" if entry.scale_format == "ue8m0" else "fp32",
        scale_dims=2 - (len(codes.shape) - len(scales.shape)),
    )


def _objections(codes: Tensor, scales: Tensor, entry: Quantized) -> Iterator[str]:
    if _dtype(codes) != CODES:
        yield f"codes of {codes.dtype}"
    if not scales.name.startswith(codes.name) or scales.name == codes.name:
        yield f"scales are in {scales.name!r}, a name that does not begin with the tensor's"
    known = SCALES.get(_dtype(scales), ())
    if ("ue8m0" if entry.scale_format == "ue8m0" else "fp32") not in known:
        yield f"{entry.scale_format} scales as {scales.dtype}"
    if len(codes.shape) != 2:
        yield f"codes of {len(codes.shape)} dimensions; there are conversions for matrices"
    elif not 0 <= len(scales.shape) <= 2:
        yield f"scales of {len(scales.shape)} dimensions"


def _why_not(tensor: Tensor) -> str:
    if tensor.dtype in ITEMSIZE and _dtype(tensor) == CODES:
        return "codes without scales"
    return f"{tensor.dtype} elements that are packed or quantised"


def _explained(refused: Sequence[tuple[Tensor, str]], quantization: str) -> str:
    shown = [f"{tensor.name!r} ({tensor.dtype} {tensor.shape}): {reason}" for tensor, reason in refused[:SHOWN]]
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    called = f" (the engines' format: {quantization})" if quantization else ""
    return (
        f"{len(refused)} tensors that the engines need cannot be made from a trainer's values{called}: "
        f"{'; '.join(shown)}{more}. Serve the model unquantised, or in FP8 by blocks, rows or tensors, or in MXFP8"
    )
