"""Served pages of a real GPU are digested on one thread while another exchanges them: no kernel meets addresses that
mean nothing, and what an audit finds is one of the two sets, whole."""

import threading

import pytest
import torch
from weightsync.agents.inference import weights as inference_weights
from weightsync.agents.inference.shadow import Superseded
from weightsync.orchestrator.protocol.names import Version

from tests.gpu.test_late_writers import DEVICE, Engine, ours

__all__ = ["ours"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(DEVICE.type != "cuda", reason="of host memory there are no pages"),
]

FLIPS = 200


def test_pages_are_exchanged_while_they_are_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsync.kernels.digest_triton.PART_ITEMS", 1)
    monkeypatch.setattr(inference_weights, "FLIP_PAUSE_SECONDS", 0.0)
    engine = Engine("flip")
    weights = engine.weights
    for memory, value in ((engine.model.tensors[0], 1), (engine.model.standby_tensors[0], 2)):
        memory.copy_(torch.arange(memory.numel(), device=DEVICE) * value % 251)
    right = {weights.digest(), weights.landed(Version(1, 1))}
    assert len(right) == 2
    found, ended, over = [], 0, threading.Event()

    def audit() -> None:
        nonlocal ended
        while not over.is_set():
            try:
                found.append(weights.audit())
            except Superseded:
                ended += 1

    thread = threading.Thread(target=audit)
    thread.start()
    for _ in range(FLIPS):
        weights.take(Version(1, 1))
        weights.settle()
        assert weights.shown()
    over.set()
    thread.join(60)
    torch.cuda.synchronize()
    assert set(found) <= right
    assert ended, "no audit met a flip: make it longer"
    assert weights.audit() in right
