"""Codes and their scales, as the checkpoints of each format have them."""

from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm.recorder.quantized import quantization_name, quantized_of
from weightsync.orchestrator.protocol.layout import Quantized, Tensor

E4M3 = "float8_e4m3fn"


def vllm(block: list[int] | None = None, **settings: Any) -> Any:
    hf_config = SimpleNamespace(quantization_config=settings) if settings else SimpleNamespace()
    return SimpleNamespace(
        quant_config=SimpleNamespace(weight_block_size=block),
        model_config=SimpleNamespace(hf_config=hf_config, quantization="fp8"),
    )


@pytest.mark.parametrize(
    ("shape", "scales", "config", "block", "scale_format"),
    [
        ((256, 384), ("_scale_inv", "float32", (2, 3)), vllm([128, 128]), (128, 128), "float32"),
        ((200, 130), ("_scale_inv", "float32", (2, 2)), vllm([128, 128]), (128, 128), "float32"),
        ((64, 64), ("_scale_inv", "float32", (1, 1)), vllm([128, 128]), (128, 128), "float32"),
        ((256, 384), ("_scale_inv", "float32", (2, 3)), vllm([128, 128], scale_fmt="ue8m0"), (128, 128), "ue8m0"),
        ((256, 384), ("_scale_inv", "float32", (2, 3)), vllm([128, 128], scale_format="ue8m0"), (128, 128), "ue8m0"),
        ((256, 384), ("_scale_inv", "float8_e8m0fnu", (2, 3)), vllm([128, 128]), (128, 128), "ue8m0"),
        ((256, 384), ("_scale", "uint8", (256, 12)), vllm(), (1, 32), "ue8m0"),
        ((256, 384), ("_scale", "float32", ()), vllm(), (256, 384), "float32"),
        ((256, 384), ("_scale", "float32", (1,)), vllm(), (256, 384), "float32"),
        ((256, 384), ("_scale", "float32", (256, 1)), vllm(), (1, 384), "float32"),
        ((256, 384), ("_scale", "bfloat16", (256,)), vllm(), (1, 384), "float32"),
        ((4, 256, 384), ("_scale_inv", "float32", (4, 2, 3)), vllm([128, 128]), (128, 128), "float32"),
        ((4, 256, 384), ("_scale", "float32", (4, 256, 1)), vllm(), (1, 384), "float32"),
        ((4, 256, 384), ("_scale", "float32", (4,)), vllm(), (256, 384), "float32"),
    ],
)
def test_each_kind_of_scale(
    shape: tuple[int, ...], scales: tuple[str, str, tuple[int, ...]], config: Any, block: tuple[int, int],
    scale_format: Any,
) -> None:  # fmt: skip
    suffix, dtype, grid = scales
    tensors = (
        Tensor("norm.weight", "bfloat16", (384,)),
        Tensor(f"up.weight{suffix}", dtype, grid),
        Tensor("up.weight", E4M3, shape),
    )
    assert quantized_of(tensors, config) == (Quantized(2, 1, block, scale_format),)


@pytest.mark.parametrize(
    "tensors",
    [
        (Tensor("up.weight", E4M3, (256, 384)),),
        (Tensor("up.weight", E4M3, (256, 384)), Tensor("up.weight_scale", "float32", (3,))),
        (Tensor("up.weight", "float8_e5m2", (256, 384)), Tensor("up.weight_scale", "float32", ())),
        (Tensor("up.weight", "uint8", (256, 192)), Tensor("up.weight_scale", E4M3, (256, 24))),
        (Tensor("up.weight", E4M3, (256,)), Tensor("up.weight_scale", "float32", ())),
    ],
    ids=["no scales", "scales of no known shape", "e5m2", "nvfp4", "a vector"],
)
def test_what_is_not_understood_is_left_to_be_refused_by_name(tensors: tuple[Tensor, ...]) -> None:
    assert quantized_of(tensors, vllm()) == ()


def test_an_engine_that_is_not_quantised_has_no_format() -> None:
    assert quantization_name(vllm()) == "fp8"
    assert quantization_name(SimpleNamespace(model_config=SimpleNamespace(quantization=None))) == ""
