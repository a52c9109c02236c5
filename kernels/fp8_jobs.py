"""What is quantised, and the checks that its tensors fit together: shared by the reference and the Triton kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.kernels.errors import KernelError
from weightsync.kernels.fp8_reference import ScaleFormat

BLOCKS: Final = ((128, 128), (1, 128), (1, 32))
"""Rows and columns per scale: block FP8 of weights, of activations, and MXFP8 (with ``scale_format="ue8m0"``)."""
EXPONENT_DTYPES: Final = [torch.uint8, *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else [])]
"""Of scales that are biased exponents; torch has a dtype for them since 2.7."""
SOURCE_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """One tensor to quantise; see :func:`weightsync.kernels.fp8.quantize_blocks` for shapes and dtypes."""

    src: torch.Tensor
    out: torch.Tensor
    scale_out: torch.Tensor


@dataclass(frozen=True, slots=True)
class Look:
    """What a prepared call depends on of a source. The source itself is not kept: it may be the only copy of its kind,
    and nobody else's any more after the first call. ``stride`` in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> "Look":
        """The look of ``tensor``."""
        return Look(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} with strides {self.stride} on {self.device}"


def check_job(job: QuantizeJob, block: tuple[int, int], forward_dtype: torch.dtype | None, fmt: ScaleFormat) -> None:
    """That one job's tensors fit together.

    Raises:
        KernelError: what does not, and what it should be.
    """
    if block not in BLOCKS:
        raise KernelError(f"blocks of {block} are not supported; there are {BLOCKS}")
    if fmt not in ("fp32", "ue8m0"):
        raise KernelError(f"scale format {fmt!r}; there are 'fp32' and 'ue8m0'")
    src, out, scale = job.src, job.out, job.scale_out
    if src.dtype not in SOURCE_DTYPES:
        raise KernelError(f"cannot quantise {src.dtype}; sources are bf16, fp16 or fp32")
    if forward_dtype is not None and forward_dtype not in SOURCE_DTYPES:
        raise KernelError(f"{forward_dtype} is no forward dtype; bf16, fp16 and fp32 are")
    if src.dim() not in (2, 3):
        raise KernelError(f"a source is [rows, columns] or [groups, rows, columns], not {list(src.shape)}")
    if out.dtype not in (torch.float8_e4m3fn, torch.uint8) or out.shape != src.shape:
        raise KernelError(f"out must be float8_e4m3fn (or uint8) {list(src.shape)}: {out.dtype}{list(out.shape)}")
    grid = [*src.shape[:-2], -(-src.shape[-2] // block[0]), -(-src.shape[-1] // block[1])]
    kinds = [torch.float32, *(EXPONENT_DTYPES if fmt == "ue8m0" else [])]
    if scale.dtype not in kinds or list(scale.shape) != grid:
        raise KernelError(f"scale_out must be {' or '.join(map(str, kinds))} {grid}: {scale.dtype}{list(scale.shape)}")
    if not src.device == out.device == scale.device:
        raise KernelError(f"one job on several devices: {src.device}, {out.device}, {scale.device}")


def checked_sources(looks: Sequence[Look], sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``sources`` of one call, after checking that each looks like the one that the call was prepared with.

    Raises:
        KernelError: their number or one of them does not fit.
    """
    if len(sources) != len(looks):
        raise KernelError(f"{len(sources)} sources for {len(looks)} jobs")
    for index, (source, look) in enumerate(zip(sources, looks, strict=True)):
        # Of tens of thousands; to make a Look of each would take most of a conversion.
        alike = source.shape == look.shape and source.stride() == look.stride and source.device == look.device
        if not alike or source.dtype != look.dtype:
            raise KernelError(f"source {index} was prepared as {look}; this is {Look.of(source)}")
    return list(sources)
