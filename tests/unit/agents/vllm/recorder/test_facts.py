"""What the recorder is told of vLLM's layers."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.trace import Checkpoint
from weightsync.agents.vllm.recorder.recorded import RecordError, keep, record, recorded_layout

CONFIG = SimpleNamespace(dtype=torch.float32)
VLLM_CONFIG = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))
F32 = torch.float32


class Fused(nn.Module):
    """Two experts of gate and up, and a loader for ``<expert>.<gate|up>``."""

    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.randn(2, 4, 3), requires_grad=False)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            expert, part = name.split(".")
            start = {"gate": 0, "up": 2, "all": 0}[part]
            self.w13_weight.data[int(expert), start : start + len(tensor)].copy_(tensor)

    def exchange_halves(self) -> None:
        self.w13_weight = nn.Parameter(self.w13_weight.data.roll(2, dims=1), requires_grad=False)


def test_experts_whose_halves_a_kernel_wants_exchanged_are_written_there() -> None:
    model = Fused()
    names = [f"{expert}.{part}" for expert in range(2) for part in ("gate", "up")]
    recording = record(model, CONFIG, [Checkpoint(name, (2, 3), F32) for name in names])
    model.exchange_halves()
    recording.finish()
    keep(recording)
    new = {name: torch.randn(2, 3) for name in names}
    recorded_layout(model, VLLM_CONFIG).load(new.items())
    expected = Fused()
    expected.load_weights(iter(new.items()))
    expected.exchange_halves()
    assert torch.equal(model.w13_weight, expected.w13_weight)


def test_exchanged_halves_of_what_the_checkpoint_keeps_whole_are_refused() -> None:
    model = Fused()
    recording = record(model, CONFIG, [Checkpoint(f"{expert}.all", (4, 3), F32) for expert in range(2)])
    model.exchange_halves()
    with pytest.raises(RecordError, match="w13_weight"):
        recording.finish()
