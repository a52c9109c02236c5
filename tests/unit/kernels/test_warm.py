"""Warming up: what is run ahead of time on a device that compiles. (That it suffices, a GPU shows: tests/gpu.)"""

import itertools
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from weightsync.kernels import warm
from weightsync.kernels.columns import UNSEEN
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.fp8_jobs import QuantizeJob
from weightsync.kernels.strided import Table, as_table

CPU = torch.device("cpu")


class Compiling:
    """Says that it is CUDA when asked, and lets torch make tensors on the CPU."""

    type = "cuda"


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for name in ("arange", "zeros", "empty"):
        make: Callable[..., torch.Tensor] = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *size, make=make, device=None, **options: make(*size, **options), raising=True
        )
    return Compiling()  # type: ignore[return-value]


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
