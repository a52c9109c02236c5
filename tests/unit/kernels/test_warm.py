"""Warming up: what is run ahead of time on a device that compiles."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kernel_compiler
import numpy as np
import pytest
import torch
from weightsync.kernels import warm
from weightsync.kernels.columns import UNSEEN
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.fp8_jobs import QuantizeJob
from weightsync.kernels.strided import Table, as_table

CPU = torch.device("cpu")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return kernel_compiler.compiling_device(monkeypatch)


def test_on_the_cpu_there_is_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    warm.warm_up(CPU)
    warm.warm_up_quantize(CPU, [torch.bfloat16])


def test_copy_and_digest_run_once_over_a_table_that_they_accept(
    compiling: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[list[object]] = []
    digests: list[tuple[int, int]] = []
    looked: list[tuple[str | None, bool]] = []

    def copy(
        sources: list[torch.Tensor], destinations: list[torch.Tensor], table: Table, *, beside: str | None
    ) -> Callable[[], None]:
        return lambda: moved.append([beside, *as_table(table)[0].tolist()])

    def digest(regions: list[torch.Tensor], table: Table, codes: Table, *, beside: str | None) -> Callable[[], None]:
        looked.append((beside, bool(any(codes))))
        return lambda: digests.append(ReferenceDigest(regions, as_table(table), codes)())

    monkeypatch.setattr(warm.copy_module, "prepare", copy)
    monkeypatch.setattr(warm.digest_module, "prepare", digest)
    warm.warm_up(compiling)
    assert moved == [[beside, 64, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0] for beside in (None, "batches")]
    whole = np.array([[64, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]])
    assert digests == [ReferenceDigest([torch.arange(64, dtype=torch.uint8)], whole, np.array([UNSEEN]))()] * 4
    forms = list(itertools.product((None, "batches"), (False, True)))
    assert looked == forms, "beside others and alone, with a look at the elements and without"


def test_quantising_runs_for_each_dtype_and_each_way_of_lying_in_memory(
    compiling: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], list[int]]] = []
    options: list[dict[str, object]] = []

    def prepare(jobs: list[QuantizeJob], **given: object) -> Callable[[list[torch.Tensor]], None]:
        [job] = jobs
        options.append(given)

        def run(sources: list[torch.Tensor]) -> None:
            assert [source.data_ptr() for source in sources] == [job.src.data_ptr()]
            seen.append((job.src.dtype, tuple(job.src.shape), job.src.stride(), list(job.scale_out.shape)))

        return run

    monkeypatch.setattr(warm, "prepare_quantize", prepare)
    warm.warm_up_quantize(
        compiling, [torch.bfloat16, torch.float32], block=(1, 32), forward_dtype=torch.float16, beside="wire"
    )
    ways = [((8, 32), (48, 1), [8, 1]), ((8, 32), (48, 1), [8, 1]), ((32, 8), (1, 48), [32, 1])]
    assert seen == [(dtype, *way) for dtype in (torch.bfloat16, torch.float32) for way in ways]
    given = {"block": (1, 32), "forward_dtype": torch.float16, "scale_format": "fp32", "beside": "wire"}
    assert options == [given] * 6


if importlib.util.find_spec("triton") is not None:

    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("architecture", [80, 90, 100], ids=["A100", "H100", "B200"])
    def test_every_form_is_compiled_by_the_warm_up(architecture: int, tmp_path: Path) -> None:
        """By Triton's compiler, which brings each GPU's assembler; in this process they are interpreted."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, kernel_compiler.__file__, str(architecture)],
            check=False,
            env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        counts = {name: found["warmed"].count(name) for name in found["warmed"]}
        quantised = 2 * 2 * 2 * 3  # beside or not, two scale formats, two dtypes, three ways to lie in memory
        assert counts == {"_copy_kernel": 2, "_digest_kernel": 2 * 2, "_quantize_kernel": quantised}
        assert found["later"] == [], "no round waits for a compiler"
