"""Real layers of vLLM's CPU build: a parameter that the forward does not read is found, and no byte stays changed."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.vllm import probe

EVERYTHING = ["embed_tokens.weight", "norm.weight", "proj.weight", "proj.bias", "lm_head.weight"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("vllm.model_executor.layers.linear")
    script = Path(__file__).with_name("probed_layers.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("probe"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")] or [done.stderr[-2000:]]
    found: dict[str, Any] = json.loads(line.removeprefix("RESULTS "))
    return found


@pytest.mark.e2e
def test_layers_that_read_their_parameters_pass(results: dict[str, Any]) -> None:
    assert sorted(results["in place"]["read"]) == sorted(EVERYTHING)
    assert (results["in place"]["unread"], results["in place"]["unknown"]) == ([], {})


@pytest.mark.e2e
def test_a_packed_copy_that_the_forward_reads_instead_is_found(results: dict[str, Any]) -> None:
    assert results["packed head"]["unread"] == ["lm_head.weight"]
    assert sorted(results["packed head"]["read"]) == sorted(set(EVERYTHING) - {"lm_head.weight"})


@pytest.mark.e2e
def test_a_tied_head_is_looked_at_by_itself(results: dict[str, Any]) -> None:
    """The embedding reads the memory that both share; the head has packed it for itself."""
    assert results["packed tied head"]["unread"] == ["lm_head.weight"]
    assert "embed_tokens.weight" in results["packed tied head"]["read"]


@pytest.mark.e2e
def test_a_copy_that_is_refreshed_counts_as_read(results: dict[str, Any]) -> None:
    assert results["packed head, refreshed"]["unread"] == []


@pytest.mark.e2e
def test_what_cannot_be_run_alone_is_said(results: dict[str, Any]) -> None:
    found = results["unrunnable"]
    assert found["unread"] == []
    assert set(found["unknown"]) == {"proj.weight", "proj.bias", "odd.weight", "odd.bias"}
    assert found["unknown"]["proj.weight"] == "ZeroDivisionError: division by zero"
    assert "no way is known to run a Bilinear alone" in found["unknown"]["odd.weight"]


@pytest.mark.e2e
def test_what_a_gate_keeps_for_the_router_is_not_the_gates(results: dict[str, Any]) -> None:
    assert results["gate"]["unread"] == []
    assert results["gate"]["unknown"] == {"proj.expert_bias": "its layer alone does not depend on it"}
    assert sorted(results["gate"]["read"]) == sorted(EVERYTHING)


@pytest.mark.parametrize(
    ("attribute", "own"),
    [
        ("weight", True), ("bias", True), ("weight_scale_inv", True), ("w13_weight", True), ("w2_bias", True),
        ("qzeros", True), ("input_scale", False), ("w13_input_scale", False), ("expert_bias", False),
        ("e_score_correction_bias", False),
    ],
)  # fmt: skip
def test_which_names_are_a_layers_own(attribute: str, own: bool) -> None:
    assert bool(probe.OWN.fullmatch(attribute)) == own


@pytest.mark.e2e
def test_a_layer_that_answers_otherwise_each_time_proves_nothing(results: dict[str, Any]) -> None:
    assert "twice" in results["restless"]["unknown"]["proj.weight"]
    assert "proj.weight" not in results["restless"]["read"]


@pytest.mark.e2e
def test_every_byte_is_put_back(results: dict[str, Any]) -> None:
    assert {case: found["restored"] for case, found in results.items()} == dict.fromkeys(results, True)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.uint8],
)
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (5,), ()])
def test_a_change_moves_zeros_too_and_is_undone_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    memory = torch.zeros(shape, dtype=dtype)
    before = memory.clone()
    undo = probe._change([memory])
    assert not probe._same(memory, before)
    undo()
    assert probe._same(memory, before)


def test_strided_memory_is_changed_where_it_lies() -> None:
    whole = torch.zeros(6, 4)
    memory = whole.T[1:3]
    undo = probe._change([memory])
    assert whole[:, 0].eq(0).all()
    assert whole[:, 3].eq(0).all()
    assert whole[::2, 1].eq(1).all()
    undo()
    assert whole.eq(0).all()


def found(*unread: str) -> probe.Probed:
    return probe.Probed(("a.weight",), unread, {"c.weight": "no way is known"})


def test_an_engine_with_unread_weights_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda *_: found())
    assert probe.require(nn.Module(), [], lambda: None) == {"c.weight": "no way is known"}
    monkeypatch.setattr(probe, "probe", lambda *_: found("lm_head.weight", "b.bias"))
    with pytest.raises(probe.UnreadWeights, match=r"^lm_head\.weight, b\.bias: the layer computes with a copy"):
        probe.require(nn.Module(), [], lambda: None)
    monkeypatch.setenv(probe.PROBE_VARIABLE, "0")
    assert probe.require(nn.Module(), [], lambda: None) == {"all parameters": "WEIGHTSYNC_PROBE is 0"}


def test_experts_that_write_into_what_they_are_given_answer_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(set_forward_context=lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "vllm.forward_context", context)

    class InPlace(nn.Module):
        routed_experts = SimpleNamespace(
            moe_config=SimpleNamespace(hidden_dim=4, num_logical_experts=2, in_dtype=torch.float32)
        )

        def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return hidden.mul_(2.0).add_(logits.mul_(3.0).sum())

    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    run = probe._expert_runner(InPlace(), torch.zeros(1), config)
    first = run().clone()
    assert torch.equal(run(), first)
