"""Layouts that vLLM's CPU kernels want, with a double of its prepacking."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.blueprint import Blueprint, ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.vllm.recorder.kernel_layouts import KERNEL_LAYOUTS, as_fed

BF16 = torch.bfloat16
(PREPACK,) = KERNEL_LAYOUTS


class UnquantizedFusedMoEMethod:
    """Under the name that vLLM's has; its experts pad the intermediate size to a multiple of four."""

    def __init__(self, size: int) -> None:
        experts = SimpleNamespace(
            isa="amx",
            moe_config=SimpleNamespace(intermediate_size_per_partition=size),
            _padded_intermediate_size=lambda config: -(-config.intermediate_size_per_partition // 4) * 4,
        )
        self.moe_kernel = SimpleNamespace(fused_experts=experts)


class Experts(nn.Module):
    """Two experts, hidden size 3."""

    def __init__(self, size: int, method: object) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.arange(12.0 * size).view(2, 2 * size, 3), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.arange(6.0 * size).view(2, 3, size), requires_grad=False)
        self.quant_method = method

    def places(self) -> list[ParameterPlace]:
        return Blueprint(self).parameters


@pytest.fixture
def prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of vLLM's prepacking: the negative, so that it is seen to have run."""
    module = ModuleType("vllm._custom_ops")
    module.cpu_prepack_moe_weight = lambda weight, isa: -weight if isa == "amx" else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", module)


def test_only_unquantised_experts_on_the_cpu_are_prepacked() -> None:
    assert all(PREPACK.may_apply(place) for place in Experts(2, UnquantizedFusedMoEMethod(2)).places())
    assert not any(PREPACK.may_apply(place) for place in Experts(2, SimpleNamespace()).places())
    layer = nn.Linear(2, 2)
    layer.quant_method = UnquantizedFusedMoEMethod(2)  # type: ignore[assignment]
    assert not any(PREPACK.may_apply(place) for place in Blueprint(layer).parameters)


@pytest.mark.usefixtures("prepacked")
def test_whole_sizes_are_prepacked_as_they_are() -> None:
    for place in Experts(4, UnquantizedFusedMoEMethod(4)).places():
        current = place.current()
        assert current is not None
        assert torch.equal(PREPACK.forward(place, current), -current)


@pytest.mark.usefixtures("prepacked")
def test_gate_and_up_are_padded_one_by_one_and_down_by_columns() -> None:
    layer = Experts(3, UnquantizedFusedMoEMethod(3))
    w13, w2 = layer.places()
    gate_up, down = PREPACK.forward(w13, layer.w13_weight), PREPACK.forward(w2, layer.w2_weight)
    assert gate_up.shape == (2, 8, 3)
    assert torch.equal(gate_up[:, [0, 1, 2, 4, 5, 6]], -layer.w13_weight)
    assert not gate_up[:, [3, 7]].any()
    assert down.shape == (2, 3, 4)
    assert torch.equal(down[:, :, :3], -layer.w2_weight)
    assert not down[:, :, 3].any()


@pytest.mark.usefixtures("prepacked")
def test_a_layer_without_grouped_experts_has_no_such_layout() -> None:
    method = UnquantizedFusedMoEMethod(4)
    method.moe_kernel = SimpleNamespace()
    layer = Experts(4, method)
    with pytest.raises(LookupError, match="w13_weight: this vLLM has no grouped-GEMM experts"):
        PREPACK.forward(layer.places()[0], layer.w13_weight)


def test_a_projection_that_vllm_dequantises_into_a_fused_parameter_travels_in_its_dtype() -> None:
    wk = "layers.0.indexer.wk"
    fp8 = [
        Checkpoint(f"{wk}.weight", (4, 8), torch.float8_e4m3fn),
        Checkpoint(f"{wk}.weight_scale_inv", (1, 1), torch.float32),
    ]
    other = Checkpoint("layers.0.indexer.weights_proj.weight", (2, 8), BF16)
    fused = {"layers.0.indexer.wk_weights_proj.weight": BF16}
    assert as_fed([*fp8, other], fused) == [Checkpoint(f"{wk}.weight", (4, 8), BF16), other]
    plain = [Checkpoint(f"{wk}.weight", (4, 8), BF16), other]
    assert as_fed(plain, fused) == plain
    assert as_fed(fp8, {}) == fp8
