"""Which implementation serves a tensor, and what is said when none can."""

import sys
from types import SimpleNamespace

import pytest
import torch
from weightsync.kernels.digest import prepare
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.dispatch import StreamMark, common_device, programs_beside, use_triton
from weightsync.kernels.errors import KernelUnavailableError

CPU = torch.device("cpu")


def test_the_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not use_triton(CPU)
    assert isinstance(prepare([torch.zeros(8, dtype=torch.uint8)], []), ReferenceDigest)


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelUnavailableError, match=r"weights on cuda:1 need Triton: pip install .*\[kernels\]"):
        use_triton(torch.device("cuda:1"))


def test_tensors_of_one_call_share_a_device() -> None:
    assert common_device([]) == CPU
    with pytest.raises(ValueError, match="different devices"):
        common_device([torch.empty(1), torch.empty(1, device="meta")])


@pytest.mark.parametrize(("multiprocessors", "batches", "wire"), [(132, 66, 264), (1, 1, 2)])
def test_a_persistent_kernel_leaves_a_device_to_what_it_runs_beside(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: int, batches: int, wire: int
) -> None:
    found = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert programs_beside("batches", torch.device("cuda:0")) == batches
    assert programs_beside("wire", torch.device("cuda:0")) == wire


def test_what_a_device_has_yet_to_do_is_asked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = [False, False, True], []

    class Event:
        def record(self, stream: str) -> None:
            asked.append(f"marked {stream}")

        def query(self) -> bool:
            asked.append("asked")
            return answers.pop(0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    mark = StreamMark(torch.device("cuda:0"))
    mark.mark()
    mark.wait()
    assert asked == ["marked stream of cuda:0", *["asked"] * 3]
    nothing = StreamMark(CPU)
    nothing.mark()
    assert nothing.reached()
    nothing.wait()
