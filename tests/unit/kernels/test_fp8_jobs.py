"""Jobs that do not fit together are refused before anything is written."""

import pytest
import torch
from weightsync.kernels.errors import KernelError
from weightsync.kernels.fp8_jobs import BLOCKS, Look, QuantizeJob, check_job, checked_sources

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


def job(
    shape: tuple[int, ...] = (130, 256),
    scales: tuple[int, ...] = (2, 2),
    src: torch.dtype = BF16,
    out: torch.dtype = E4M3,
    scale: torch.dtype = torch.float32,
    device: str = "cpu",
) -> QuantizeJob:
    made = torch.empty(scales, dtype=scale, device=device)
    return QuantizeJob(torch.empty(shape, dtype=src), torch.empty(shape, dtype=out), made)


def test_what_fits_is_accepted() -> None:
    check_job(job(), (128, 128), None, "fp32")
    check_job(job(out=torch.uint8), (128, 128), torch.float16, "fp32")
    check_job(job((3, 130, 256), (3, 2, 2)), (128, 128), BF16, "fp32")
    check_job(job(scales=(130, 8), scale=torch.uint8), (1, 32), BF16, "ue8m0")
    assert (128, 128) in BLOCKS


@pytest.mark.parametrize(
    ("made", "block", "forward", "scale_format", "words"),
    [
        (job(), (64, 64), None, "fp32", r"blocks of \(64, 64\) are not supported"),
        (job(), (128, 128), None, "e8m0", "scale format 'e8m0'"),
        (job(src=torch.float64), (128, 128), None, "fp32", "cannot quantise torch.float64"),
        (job(), (128, 128), torch.int8, "fp32", "torch.int8 is no forward dtype"),
        (job((256,), (2,)), (128, 128), None, "fp32", r"not \[256\]"),
        (job(out=BF16), (128, 128), None, "fp32", "out must be float8_e4m3fn"),
        (job(scales=(1, 2)), (128, 128), None, "fp32", r"scale_out must be torch.float32 \[2, 2\]"),
        (job(scale=torch.uint8), (128, 128), None, "fp32", "scale_out must be torch.float32"),
        (job(device="meta"), (128, 128), None, "fp32", "one job on several devices: cpu, cpu, meta"),
    ],
)
def test_what_does_not_fit_is_named(
    made: QuantizeJob, block: tuple[int, int], forward: torch.dtype | None, scale_format: str, words: str
) -> None:
    with pytest.raises(KernelError, match=words):
        check_job(made, block, forward, scale_format)  # type: ignore[arg-type]


def test_sources_look_like_those_that_a_call_was_prepared_with() -> None:
    looks = [Look.of(job().src), Look.of(job((4, 8), (1, 1)).src)]
    others = [torch.empty(130, 256, dtype=BF16), torch.empty(4, 8, dtype=BF16)]
    assert [source.data_ptr() for source in checked_sources(looks, others)] == [other.data_ptr() for other in others]
    with pytest.raises(KernelError, match="1 sources for 2 jobs"):
        checked_sources(looks, others[:1])
    with pytest.raises(
        KernelError, match=r"source 1 was prepared as torch.bfloat16\[4, 8\] with strides \(8, 1\) on cpu;"
    ):
        checked_sources(looks, [others[0], torch.empty(8, 4, dtype=BF16).t()])
