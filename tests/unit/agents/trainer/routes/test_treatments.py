"""What each needed tensor is on the wire, by formats; what no values can be made into is refused by name."""

from typing import Any

import pytest
import torch
from weightsync.agents.trainer.errors import UnsupportedFormat
from weightsync.agents.trainer.routes.treatments import treatments
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.orchestrator.protocol.layout import Quantized, Tensor
from weightsync.orchestrator.protocol.messages import Needs

E4M3 = torch.float8_e4m3fn


def needs(*tensors: Tensor, quantized: tuple[Quantized, ...] = (), quantization: str = "") -> Needs:
    return Needs(tensors=tensors, quantized=quantized, quantization=quantization, fingerprint="f")


@pytest.mark.parametrize(
    ("dtype", "given", "treatment"),
    [
        ("bfloat16", None, QuantizationSpec(torch.bfloat16, forward_dtype=torch.bfloat16)),
        ("float16", None, QuantizationSpec(torch.float16, forward_dtype=torch.float16)),
        ("float16", torch.bfloat16, QuantizationSpec(torch.float16, forward_dtype=torch.bfloat16)),
        ("float32", None, QuantizationSpec(torch.float32, forward_dtype=torch.float32, keeps_master=True)),
        ("float32", torch.bfloat16, QuantizationSpec(torch.float32, forward_dtype=torch.bfloat16, keeps_master=True)),
        ("int64", None, QuantizationSpec(torch.int64, forward_dtype=torch.int64, keeps_master=True)),
    ],
)
def test_values_are_cast_to_what_is_needed(dtype: str, given: Any, treatment: QuantizationSpec) -> None:
    assert treatments(needs(Tensor("w", dtype, (4,))), given)["w"].treatment == treatment


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("needed", "given", "expected"),
    [
        ("float32", None, lambda m: m.float()),
        ("float32", torch.bfloat16, lambda m: m.float()),
        ("float16", None, lambda m: m.half()),
        ("float16", torch.bfloat16, lambda m: m.bfloat16().half()),
        ("bfloat16", None, lambda m: m.bfloat16()),
        ("bfloat16", torch.float16, lambda m: m.half().bfloat16()),
    ],
)
def test_values_on_the_wire(dtype: torch.dtype, needed: str, given: Any, expected: Any) -> None:
    master = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    treatment = treatments(needs(Tensor("w", needed, (64,))), given)["w"].treatment
    out = torch.empty(64, dtype=getattr(torch, needed))
    treatment.apply(master, out)
    assert torch.equal(out, expected(master))


CASES = [
    ("_scale_inv", "float32", (2, 3), (128, 128), "float32", "fp32", 2),
    ("_scale_inv", "float32", (2, 3), (128, 128), "ue8m0", "ue8m0", 2),
    ("_scale_inv", "float8_e8m0fnu", (2, 3), (128, 128), "ue8m0", "ue8m0", 2),
    ("_scale", "uint8", (200, 9), (1, 32), "ue8m0", "ue8m0", 2),
    ("_scale", "float32", (200, 1), (1, 270), "float32", "fp32", 2),
    ("_scale", "float32", (200,), (1, 270), "float32", "fp32", 1),
    ("_scale", "float32", (1,), (200, 270), "float32", "fp32", 1),
    ("_scale", "float32", (), (200, 270), "float32", "fp32", 0),
]


@pytest.mark.parametrize(("suffix", "dtype", "grid", "block", "said", "kept", "dims"), CASES)
def test_codes_come_with_their_scales(
    suffix: str, dtype: str, grid: tuple[int, ...], block: tuple[int, int], said: Any, kept: Any, dims: int
) -> None:
    codes, scales = Tensor("w", "float8_e4m3fn", (200, 270)), Tensor(f"w{suffix}", dtype, grid)
    found = treatments(needs(codes, scales, quantized=(Quantized(0, 1, block, said),)), None)
    assert list(found) == ["w"]
    assert found["w"].scales == scales
    assert found["w"].treatment == QuantizationSpec(
        E4M3, suffix, torch.bfloat16, block, scale_dtype=getattr(torch, dtype), scale_format=kept, scale_dims=dims
    )


@pytest.mark.parametrize(("suffix", "dtype", "grid", "block", "said", "kept", "dims"), CASES)
def test_codes_and_scales_by_the_definition_of_the_format(
    suffix: str, dtype: str, grid: tuple[int, ...], block: tuple[int, int], said: Any, kept: Any, dims: int
) -> None:
    """Each block on its own, in float64: scale = amax / 448, up to a power of two for ue8m0; codes to nearest even."""
    master = 3 * torch.randn(200, 270, generator=torch.Generator().manual_seed(2))
    codes, scales = Tensor("w", "float8_e4m3fn", (200, 270)), Tensor(f"w{suffix}", dtype, grid)
    treatment = treatments(needs(codes, scales, quantized=(Quantized(0, 1, block, said),)), None)["w"].treatment
    out, scale_out = (
        torch.empty(200, 270, dtype=E4M3),
        torch.empty(treatment.scale_shape((200, 270)), dtype=getattr(torch, dtype)),
    )
    treatment.apply(master, out, scale_out)
    value = master.bfloat16().float()
    for row in range(0, 200, block[0]):
        for column in range(0, 270, block[1]):
            part = value[row : row + block[0], column : column + block[1]]
            scale = part.abs().max() / torch.tensor(448.0)
            if said == "ue8m0":
                scale = torch.tensor(2.0) ** torch.ceil(torch.log2(scale.double())).float()
            place = (row // block[0], column // block[1])
            stored = scale_out.view(torch.uint8)[place] if dtype in ("uint8", "float8_e8m0fnu") else scale_out[place]
            if dtype in ("uint8", "float8_e8m0fnu"):
                assert int(stored) == int(torch.log2(scale)) + 127
            else:
                assert stored == scale
            got = out[row : row + block[0], column : column + block[1]]
            assert torch.equal(got.view(torch.uint8), (part / scale).to(E4M3).view(torch.uint8))
    assert treatment.stored(tuple(scale_out.shape)) == grid


@pytest.mark.parametrize(
    ("tensors", "quantized", "why"),
    [
        ((Tensor("q", "int32", (4, 4)),), (), r"'q' \(int32 \(4, 4\)\): int32 elements that are packed or quantised"),
        ((Tensor("q", "uint8", (4, 4)),), (), "uint8 elements that are packed or quantised"),
        ((Tensor("q", "int8", (4, 4)),), (), "int8 elements that are packed or quantised"),
        ((Tensor("q", "float8_e4m3fn", (4, 4)),), (), "codes without scales"),
        ((Tensor("q", "float8_e5m2", (4, 4)),), (), "float8_e5m2 elements"),
        (
            (Tensor("q", "float8_e4m3fn", (4, 4)), Tensor("q_scale", "bfloat16", ())),
            (Quantized(0, 1, (4, 4)),),
            "float32 scales as bfloat16",
        ),
        (
            (Tensor("q", "float8_e4m3fn", (4, 4)), Tensor("other", "float32", ())),
            (Quantized(0, 1, (4, 4)),),
            "scales are in 'other', a name that does not begin with the tensor's",
        ),
        (
            (Tensor("q", "float8_e4m3fn", (256, 4)), Tensor("q_scale", "float32", (7,))),
            (Quantized(0, 1, (128, 4)),),
            r"scales of shape \(7,\), for blocks of \(128, 4\)",
        ),
        (
            (Tensor("q", "float8_e4m3fn", (2, 4, 4)), Tensor("q_scale", "float32", (2,))),
            (Quantized(0, 1, (4, 4)),),
            "codes of 3 dimensions",
        ),
    ],
)
def test_other_formats_are_refused_by_name(
    tensors: tuple[Tensor, ...], quantized: tuple[Quantized, ...], why: str
) -> None:
    with pytest.raises(
        UnsupportedFormat, match=rf"1 tensors .*the engines' format: awq\): 'q' .*{why.split(': ')[-1]}"
    ):
        treatments(needs(*tensors, quantized=quantized, quantization="awq"), None)


def test_an_error_names_some_and_counts_the_others() -> None:
    packed = [Tensor(f"layers.{n}.qweight", "int32", (4, 4)) for n in range(30)]
    with pytest.raises(UnsupportedFormat, match=r"30 tensors .*'layers.4.qweight'.*and 25 more\. Serve the model unq"):
        treatments(needs(*packed), None)
