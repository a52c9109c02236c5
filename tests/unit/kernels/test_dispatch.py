"""Which implementation serves a tensor, and what is said when none can."""

import sys

import pytest
import torch
from weightsync.kernels.digest import prepare
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.dispatch import StreamMark, common_device, use_triton
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
