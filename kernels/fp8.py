"""FP8 block quantise: e4m3 codes and one scale per block, straight into slot memory.

The arithmetic, and what becomes of zeros, subnormals, infinities and NaN, is defined by
:mod:`weightsync.kernels.fp8_reference`; the Triton kernel gives the same bytes.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from weightsync.kernels.dispatch import Beside, common_device, use_triton
from weightsync.kernels.fp8_jobs import Look, QuantizeJob, check_job, checked_sources
from weightsync.kernels.fp8_reference import ScaleFormat, quantize_reference


class PreparedQuantize(Protocol):
    """Many tensors in one launch, their table already where it is needed."""

    def __call__(self, sources: Sequence[torch.Tensor]) -> None:
        """Quantise on the current stream; returns at once on CUDA.

        Args:
            sources: one per job, of the dtypes, shapes, strides and devices of the jobs' own (gathered parameters are
                new tensors each time). None of them is kept.

        Raises:
            KernelError: a source does not look like its job's.
        """


class _ReferenceQuantize:
    """The jobs one after another, through the reference."""

    def __init__(
        self,
        jobs: Sequence[QuantizeJob],
        block: tuple[int, int],
        forward_dtype: torch.dtype | None,
        scale_format: ScaleFormat,
    ) -> None:
        self._looks = [Look.of(job.src) for job in jobs]
        self._outs = [(job.out, job.scale_out) for job in jobs]
        self._block, self._forward_dtype, self._scale_format = block, forward_dtype, scale_format

    def __call__(self, sources: Sequence[torch.Tensor]) -> None:
        for source, (out, scale_out) in zip(checked_sources(self._looks, sources), self._outs, strict=True):
            if source.numel() == 0:
                continue
            quantize_reference(
                source,
                out,
                scale_out,
                block=self._block,
                forward_dtype=self._forward_dtype,
                scale_format=self._scale_format,
            )


def prepare_quantize(
    jobs: Sequence[QuantizeJob],
    *,
    block: tuple[int, int] = (128, 128),
    forward_dtype: torch.dtype | None = None,
    scale_format: ScaleFormat = "fp32",
    beside: Beside | None = None,
) -> PreparedQuantize:
    """Quantise many tensors, each on its own block grid, in one launch (one per source dtype that occurs).

    The outputs may be adjacent ranges of one slot and of its scale tile: q, k and v; gate and up; all local experts;
    a whole layer. They are kept, sources are not. ``beside``: what it must not hold up on a GPU, see
    :func:`weightsync.kernels.dispatch.programs_beside`; None: nothing. Other arguments and errors as
    :func:`quantize_blocks`.
    """
    for job in jobs:
        check_job(job, block, forward_dtype, scale_format)
    if use_triton(common_device([job.src for job in jobs])):
        from weightsync.kernels.fp8_triton import TritonQuantize

        return TritonQuantize(jobs, block, forward_dtype, scale_format, beside)
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
        block: rows and columns per scale, one of ``fp8_jobs.BLOCKS``; (1, 32) with ``ue8m0`` is MXFP8.
        forward_dtype: cast to this first, as the trainer's forward does; ``None`` quantises ``src`` as it is.
        scale_format: ``"fp32"``, or ``"ue8m0"`` for scales rounded up to powers of two.

    Raises:
        KernelError: the arguments do not fit together; nothing was written.
        KernelUnavailableError: the tensors are on CUDA and Triton is missing.
    """
    job = QuantizeJob(src, out, scale_out)
    prepare_quantize([job], block=block, forward_dtype=forward_dtype, scale_format=scale_format)([src])
