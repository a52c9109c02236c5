"""What engines need together: each tensor once, in one way, and who does not agree is told by tensor."""

import re

import msgspec
import pytest
from weightsync.orchestrator.planner.inputs import Party
from weightsync.orchestrator.planner.needs import union_of_needs
from weightsync.orchestrator.protocol.codec import decode_from_daemon, encode
from weightsync.orchestrator.protocol.layout import Layout, Quantized, Tensor
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES
from weightsync.orchestrator.protocol.names import Member

NORM = Tensor("norm.weight", "bfloat16", (8,))
CODES = Tensor("up.weight", "float8_e4m3fn", (256, 256))
SCALES = Tensor("up.weight_scale_inv", "float32", (2, 2))
BLOCKS = Quantized(1, 2, (128, 128))


def party(engine: str, rank: int, *tensors: Tensor, quantized: tuple[Quantized, ...] = ()) -> Party:
    return Party(Member("inference", engine, rank), 1, Layout(tensors, (), b"", quantized=quantized))


def test_ranks_and_engines_are_joined_by_name() -> None:
    first = party("a", 0, NORM)
    second = party("a", 1, NORM, CODES, SCALES, quantized=(BLOCKS,))
    head = Tensor("head.weight", "bfloat16", (4, 8))
    other = party("b", 0, head, CODES, SCALES, quantized=(Quantized(1, 2, (128, 128)),))
    found = union_of_needs([first, second, other])
    assert found.misfits == {}
    assert found.needs.tensors == (head, NORM, CODES, SCALES)
    assert found.needs.quantized == (Quantized(2, 3, (128, 128)),)


def test_the_fingerprint_is_of_what_is_needed_and_not_of_who_said_it() -> None:
    one, other = party("a", 0, NORM, CODES, SCALES, quantized=(BLOCKS,)), party("b", 0, SCALES, CODES, NORM)
    said = union_of_needs([one]).needs
    turned = party("b", 0, SCALES, CODES, NORM, quantized=(Quantized(1, 0, (128, 128)),))
    assert union_of_needs([turned]).needs == said
    assert union_of_needs([other]).needs.fingerprint != said.fingerprint
    powers = msgspec.structs.replace(BLOCKS, scale_format="ue8m0")
    assert union_of_needs([party("a", 0, NORM, CODES, SCALES, quantized=(powers,))]).needs != said


@pytest.mark.parametrize(
    ("needed", "quantized", "why"),
    [
        ((Tensor("norm.weight", "float32", (8,)),), (), "'norm.weight' has dtype bfloat16 at a/0 but float32 at b/0"),
        ((Tensor("norm.weight", "bfloat16", (9,)),), (), r"'norm.weight' has shape \(8,\) at a/0 but \(9,\) at b/0"),
        (
            (NORM, CODES, SCALES),
            (Quantized(1, 2, (1, 256)),),
            r"'up.weight' has treatment codes in blocks of \(128, 128\) .* at a/0 but codes in blocks of \(1, 256\)",
        ),
        ((CODES, SCALES), (), "'up.weight' has treatment codes .* at a/0 but plain values at b/0"),
        ((NORM,), (Quantized(0, 7, (128, 128)),), "does not fit its 2 tensors"),
        ((Tensor("x", "int4", (1,)),), (), "dtype 'int4' is not one that may travel"),
    ],
)  # fmt: skip
def test_a_later_engine_that_disagrees_is_left_out(
    needed: tuple[Tensor, ...], quantized: tuple[Quantized, ...], why: str
) -> None:
    first = party("a", 0, NORM, CODES, SCALES, quantized=(BLOCKS,))
    extra = Tensor("only.b", "bfloat16", (1,))
    found = union_of_needs([first, party("b", 0, *needed, extra, quantized=quantized), party("c", 0, NORM)])
    assert list(found.misfits) == ["b"]
    assert re.search(why, found.misfits["b"])
    assert found.needs.tensors == (NORM, CODES, SCALES), "nothing of an engine that is left out is needed"


def test_the_needs_of_a_trillion_parameters_fit_into_one_message() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        for layer in range(61)
        for expert in range(384)
        for projection in ("gate_proj", "up_proj", "down_proj")
    ]
    tensors = [Tensor(name, "float8_e4m3fn", (7168, 2048)) for name in names]
    tensors += [Tensor(f"{name}_scale_inv", "float32", (56, 16)) for name in names]
    codes = tuple(Quantized(i, i + len(names), (128, 128)) for i in range(len(names)))
    needs = union_of_needs([party("a", 0, *tensors, quantized=codes)]).needs
    frame = encode(needs)
    assert len(frame) < MAX_FRAME_BYTES / 2
    assert decode_from_daemon(frame) == needs
