"""Compile and load the kernels ahead of time, so that no round waits for a compiler."""

from collections.abc import Iterable

import numpy as np
import torch
from weightsync.kernels import copy as copy_module
from weightsync.kernels import digest as digest_module
from weightsync.kernels.columns import CODES, COLUMNS, COUNTS, RUN_BYTES, UNSEEN
from weightsync.kernels.dispatch import Beside
from weightsync.kernels.fp8 import prepare_quantize
from weightsync.kernels.fp8_jobs import QuantizeJob
from weightsync.kernels.fp8_reference import ScaleFormat

_BYTES = 64


def warm_up(device: torch.device) -> None:
    """Run digest and copy once on ``device`` in each of their compiled forms, which no table changes.

    Call it when memory is registered, on the thread that may use the device. It synchronises, and leaves no memory
    behind. On the CPU there is nothing to compile.
    """
    if device.type != "cuda":
        return
    # One run of a few bytes serves: no launch depends on the table's length or on what is in it.
    source = torch.arange(_BYTES, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    table = np.zeros((1, COLUMNS), np.int64)
    table[0, RUN_BYTES] = _BYTES
    table[0, list(COUNTS)] = 1
    forms: tuple[Beside | None, ...] = (None, "batches")  # persistent or not; how many programs is not compiled
    for beside in forms:
        copy_module.prepare([source], [destination], table, beside=beside)()
        for code in (UNSEEN, CODES["bfloat16"]):  # without and with a look at the elements: one form each
            digest_module.prepare([source], table, np.array([code]), beside=beside)()
    torch.cuda.synchronize(device)


def warm_up_quantize(
    device: torch.device,
    source_dtypes: Iterable[torch.dtype],
    *,
    block: tuple[int, int] = (128, 128),
    forward_dtype: torch.dtype | None = None,
    scale_format: ScaleFormat = "fp32",
    scale_dtype: torch.dtype = torch.float32,
    beside: Beside | None = None,
) -> None:
    """Run the quantise kernel once for every way in which sources of these dtypes may lie in memory.

    Call it before the first round needs it. It synchronises, and leaves no memory behind. On the CPU there is nothing
    to compile. Arguments as :func:`weightsync.kernels.fp8.prepare_quantize`; ``scale_dtype`` is that of ``scale_out``.

    Raises:
        KernelError: a dtype, block or scale format that the kernel does not have.
    """
    if device.type != "cuda":
        return
    for dtype in source_dtypes:
        base = torch.zeros(2, 8, 48, dtype=dtype, device=device)
        # Rows of aligned vectors, rows at any alignment, any strides: one compiled form each.
        for src in (base[0, :, :32], base[0, :, 1:33], base[0, :, :32].T):
            out = torch.empty(src.shape, dtype=torch.uint8, device=device)
            grid = [-(-src.shape[0] // block[0]), -(-src.shape[1] // block[1])]
            scale = torch.empty(grid, dtype=scale_dtype, device=device)
            jobs = [QuantizeJob(src, out, scale)]
            prepare_quantize(jobs, block=block, forward_dtype=forward_dtype, scale_format=scale_format, beside=beside)(
                [src]
            )
    torch.cuda.synchronize(device)
