"""FP8 block quantise: e4m3 codes and one scale per block, straight into slot memory.

The arithmetic, and what becomes of zeros, subnormals, infinities and NaN, is defined by
:mod:`weightsync.kernels.fp8_reference`; the Triton kernel gives the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from weightsync.kernels.dispatch import common_device, use_triton
from weightsync.kernels.errors import KernelError
from weightsync.kernels.fp8_reference import ScaleFormat, quantize_reference

__all__ = ["BLOCKS", "PreparedQuantize", "QuantizeJob", "ScaleFormat", "prepare_quantize", "quantize_blocks"]

BLOCKS: Final = ((128, 128), (1, 128), (1, 32))
"""Rows and columns per scale: block FP8 of weights, of activations, and MXFP8 (with ``scale_format="ue8m0"``)."""
EXPONENT_DTYPES: Final = [torch.uint8, *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else [])]
"""Of scales that are biased exponents; torch has a dtype for them since 2.7."""
SOURCE_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """One tensor to quantise; see :func:`quantize_blocks` for shapes and dtypes."""

    src: torch.Tensor
    out: torch.Tensor
    scale_out: torch.Tensor


class PreparedQuantize(Protocol):
    """Many tensors in one launch, their table already where it is needed."""

    def __call__(self, sources: Sequence[torch.Tensor] | None = None) -> None:
        """Quantise on the current stream; returns at once on CUDA.

        Args:
            sources: other tensors in place of the jobs' own, of the same dtypes, shapes and strides (gathered
                parameters are new tensors each time). Without it, the jobs' own.

        Raises:
            KernelError: a source does not look like the one it stands in for.
        """


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


def check_stand_in(source: torch.Tensor, job: QuantizeJob, index: int) -> None:
    """That ``source`` can take the place of the source of job ``index``.

    Raises:
        KernelError: another dtype, shape, stride or device.
    """
    own = job.src
    if (source.dtype, source.shape, source.stride(), source.device) != (own.dtype, own.shape, own.stride(), own.device):
        raise KernelError(
            f"source {index} was prepared as {own.dtype}{list(own.shape)} with strides {own.stride()} on {own.device}; "
            f"this is {source.dtype}{list(source.shape)} with strides {source.stride()} on {source.device}"
        )


class _ReferenceQuantize:
    """The jobs one after another, through the reference."""

    def __init__(
        self,
        jobs: Sequence[QuantizeJob],
        block: tuple[int, int],
        forward_dtype: torch.dtype | None,
        scale_format: ScaleFormat,
    ) -> None:
        self._jobs = list(jobs)
        self._block, self._forward_dtype, self._scale_format = block, forward_dtype, scale_format

    def __call__(self, sources: Sequence[torch.Tensor] | None = None) -> None:
        chosen = stand_ins(self._jobs, sources)
        for source, job in zip(chosen, self._jobs, strict=True):
            if source.numel() == 0:
                continue
            quantize_reference(
                source,
                job.out,
                job.scale_out,
                block=self._block,
                forward_dtype=self._forward_dtype,
                scale_format=self._scale_format,
            )


def stand_ins(jobs: Sequence[QuantizeJob], sources: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    """The sources of one call: the jobs' own, or ``sources`` after checking each.

    Raises:
        KernelError: their number or one of them does not fit.
    """
    if sources is None:
        return [job.src for job in jobs]
    if len(sources) != len(jobs):
        raise KernelError(f"{len(sources)} sources for {len(jobs)} jobs")
    for index, (source, job) in enumerate(zip(sources, jobs, strict=True)):
        check_stand_in(source, job, index)
    return list(sources)


def prepare_quantize(
    jobs: Sequence[QuantizeJob],
    *,
    block: tuple[int, int] = (128, 128),
    forward_dtype: torch.dtype | None = None,
    scale_format: ScaleFormat = "fp32",
) -> PreparedQuantize:
    """Quantise many tensors, each on its own block grid, in one launch (one per source dtype that occurs).

    The outputs may be adjacent ranges of one slot and of its scale tile: q, k and v; gate and up; all local experts;
    a whole layer. Arguments and errors as :func:`quantize_blocks`.
    """
    for job in jobs:
        check_job(job, block, forward_dtype, scale_format)
    if use_triton(common_device([job.src for job in jobs])):
        from weightsync.kernels.fp8_triton import TritonQuantize

        return TritonQuantize(jobs, block, forward_dtype, scale_format)
    return _ReferenceQuantize(jobs, block, forward_dtype, scale_format)


def quantize_blocks(
    src: torch.Tensor,
    out: torch.Tensor,
    scale_out: torch.Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    forward_dtype: torch.dtype | None = None,
    scale_format: ScaleFormat = "fp32",
) -> None:
    """Quantise one tensor into ``out`` and ``scale_out``.

    Args:
        src: bf16, fp16 or fp32 ``[rows, columns]`` or ``[groups, rows, columns]``, any strides; each group has its
            own grid, and blocks at the edges may be smaller.
        out: float8_e4m3fn (or uint8) of the same shape, any strides.
        scale_out: ``[(groups,) ceil(rows / block rows), ceil(columns / block columns)]``, any strides; fp32, or with
            ``ue8m0`` also uint8 or float8_e8m0fnu (biased exponents).
        block: rows and columns per scale, one of ``BLOCKS``; (1, 32) with ``ue8m0`` is MXFP8.
        forward_dtype: cast to this first, as the trainer's forward does; ``None`` quantises ``src`` as it is.
        scale_format: ``"fp32"``, or ``"ue8m0"`` for scales rounded up to powers of two.

    Raises:
        KernelError: the arguments do not fit together; nothing was written.
        KernelUnavailableError: the tensors are on CUDA and Triton is missing.
    """
    job = QuantizeJob(src, out, scale_out)
    prepare_quantize([job], block=block, forward_dtype=forward_dtype, scale_format=scale_format)()
