"""What the recorder is told of vLLM's layers."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.blueprint import Blueprint
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.vllm.recorder.facts import VllmFacts
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
    with recording.processing:
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
    with recording.processing:
        model.exchange_halves()
    with pytest.raises(RecordError, match="w13_weight"):
        recording.finish()


class Padded(nn.Module):
    """A parameter, a buffer and a scale of the cache; whatever else a test gives it."""

    def __init__(self, **about: object) -> None:
        super().__init__()
        self.w2_weight = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.k_scale = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("table", torch.zeros(3))
        for name, value in about.items():
            setattr(self, name, value)


SIZES = {"intermediate_size_per_partition": 4, "hidden_dim": 8}


@pytest.mark.parametrize(
    ("about", "whole", "reasons"),
    [
        ({}, True, {"k_scale": "a scale of the KV cache", "table": "a buffer that the model computes itself"}),
        ({}, False, {}),
        ({"moe_config": SimpleNamespace(**SIZES)}, False, {}),
        (
            {"moe_config": SimpleNamespace(**SIZES, hidden_dim_unpadded=7)},
            False,
            {"w2_weight": "padding of the experts"},
        ),
        ({"org_vocab_size": 3}, False, dict.fromkeys(("w2_weight", "k_scale", "table"), "padding of the vocabulary")),
    ],
    ids=["all of it", "a part", "experts without padding", "padded experts", "a vocabulary"],
)
def test_what_may_stay_unreached(about: dict[str, object], whole: bool, reasons: dict[str, str]) -> None:
    facts = VllmFacts(F32)
    found = {p.name: facts.reason_to_stay(p, whole) for p in Blueprint(Padded(**about)).parameters}
    assert {name: reason for name, reason in found.items() if reason} == reasons


def test_only_gate_and_up_may_be_exchanged() -> None:
    facts = VllmFacts(F32)
    (w13,) = Blueprint(Fused()).parameters
    assert facts.may_exchange_halves(w13)
    assert not any(facts.may_exchange_halves(p) for p in Blueprint(Padded()).parameters)
