"""The kernels compiled for a GPU that is not there, by Triton's own compiler; what launches them runs on the CPU.

``python kernel_compiler.py ARCHITECTURE`` prints, as JSON, which kernels the warm-up compiles, and which any launch
after it.
"""

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from weightsync.kernels import copy, digest, fp8, warm
from weightsync.kernels.columns import CODES, COUNTS, DST_OFFSET, RUN_BYTES, SRC_OFFSET, UNSEEN
from weightsync.kernels.fp8_jobs import QuantizeJob
from weightsync.kernels.strided import Table

REGION_BYTES, ROOM_BYTES = 1 << 17, 1 << 16

BESIDE = (None, "batches", "wire")

QUANTISED = tuple(itertools.product((None, "wire"), ((torch.bfloat16, "fp32"), (None, "ue8m0"))))
"""What it runs beside, and the dtype that it goes through with the format of its scales."""


class Compiling:
    """Says that it is CUDA when asked, and lets torch make tensors on the CPU."""

    type = "cuda"


def compiling_device(patch: pytest.MonkeyPatch) -> torch.device:
    """A ``Compiling``, of which torch makes tensors while ``patch`` is in force."""
    patch.setattr(torch.cuda, "synchronize", lambda device: None)
    for name in ("arange", "zeros", "empty"):
        make: Callable[..., torch.Tensor] = getattr(torch, name)
        patch.setattr(torch, name, lambda *size, make=make, device=None, **options: make(*size, **options))
    return Compiling()  # type: ignore[return-value]


def compile_for(architecture: int) -> list[str]:
    """From here on launches of this process compile for ``architecture`` (90: sm_90) and do no more; the list grows by
    the name of each kernel that is compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    run, names, seen = JITFunction.run, [], set()

    def compiles(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel not in seen:
            seen.add(kernel)
            assert kernel.asm["cubin"], "the assembler has taken it"
            names.append(kernel.metadata.name)
        return kernel

    driver.set_active(Driver())
    JITFunction.run = compiles
    torch.cuda.get_device_capability = lambda device: divmod(architecture, 10)
    for module in (copy, digest, fp8):
        module.use_triton = lambda device: True
    return names


def warm_all() -> None:
    """All that agents warm up, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        device = compiling_device(patch)
        warm.warm_up(device)
        for beside, (forward, scales) in QUANTISED:
            dtypes = (torch.bfloat16, torch.float32)
            warm.warm_up_quantize(device, dtypes, forward_dtype=forward, scale_format=scales, beside=beside)


def launch_all() -> None:
    """Of each kernel, tables and sources of many kinds."""
    for shape in ((128, 128), (1, 1), (129, 300), (3, 130, 70), (64, 16)):
        for dtype in (torch.bfloat16, torch.float32):
            src = torch.randn(shape).to(dtype)
            turned = src.transpose(-1, -2)
            jobs = [_job(src), _job(turned), _job(src[..., 1:])] if shape[-1] > 1 else [_job(src)]
            for beside, (forward, scales) in QUANTISED:
                prepared = fp8.prepare_quantize(jobs, forward_dtype=forward, scale_format=scales, beside=beside)
                prepared([job.src for job in jobs])
    region = torch.zeros(REGION_BYTES, dtype=torch.uint8)
    target = torch.zeros(REGION_BYTES + ROOM_BYTES, dtype=torch.uint8)
    tables = [_table(1, 0), _table(REGION_BYTES, 0), _table(4, 3), _table(1000, 1), _many()]
    for table, beside in itertools.product(tables, BESIDE):
        copies = copy.prepare([region], [target], table, beside=beside)
        for shift in (0, 16, 256, ROOM_BYTES):
            copies(shift)
        whole = not any(table[0, [RUN_BYTES, SRC_OFFSET]] % 4)
        for code in (UNSEEN, CODES["float8_e4m3fn"], *([CODES["float32"]] if whole else [])):
            parts = digest.prepare([region], table, np.full(len(table), code), beside=beside)
            parts.launch()
            for part in range(parts.parts):
                parts.launch(part)


def _job(src: torch.Tensor) -> QuantizeJob:
    grid = [*src.shape[:-2], -(-src.shape[-2] // 128), -(-src.shape[-1] // 128)]
    return QuantizeJob(src, torch.empty(src.shape, dtype=torch.uint8), torch.empty(grid))


def _table(run: int, offset: int) -> Table:
    """One row: ``run`` bytes from ``offset`` on, in as many rows of a matrix as fit twice their width."""
    rows = max(1, (REGION_BYTES - offset) // (2 * run)) if run < REGION_BYTES else 1
    return np.array([[run, 0, offset, 0, offset, rows, 2 * run, 2 * run, 1, 0, 0, 1, 0, 0]])


def _many() -> Table:
    """More rows than a digest has items in one part."""
    from weightsync.kernels.digest_triton import PART_ITEMS  # without Triton this module can be imported, too

    rows = np.repeat(_table(16, 0), PART_ITEMS + 1, axis=0)
    rows[:, [SRC_OFFSET, DST_OFFSET]] = 16 * np.arange(len(rows))[:, np.newaxis]
    rows[:, COUNTS] = 1
    return rows


if __name__ == "__main__":
    compiled = compile_for(int(sys.argv[1]))
    warm_all()
    warmed = list(compiled)
    launch_all()
    print(json.dumps({"warmed": warmed, "later": compiled[len(warmed) :]}))
