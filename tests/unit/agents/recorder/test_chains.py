"""From the casts and functions that a loader applies to the dtype that travels and the program that the engine runs."""

import pytest
import torch
from weightsync.agents.recorder.chains import Cast, Chain, Function, described, functional, run, step_of, travelling

aten = torch.ops.aten
F32, BF16, F64, U8, FP8 = torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.float8_e4m3fn
EXP = Function(F32, F32, aten.exp.default, (), ())
NEG = Function(F32, F32, aten.neg.default, (), ())


@pytest.mark.parametrize(
    ("source", "chain", "wire"),
    [
        (F32, (), F32),
        (F32, (Cast(F32, F32), Cast(F32, F32)), F32),
        (F32, (Cast(F32, BF16), Cast(BF16, BF16)), BF16),
        (U8, (Cast(FP8, FP8),), U8),
        (F64, (Cast(F64, BF16), Cast(BF16, F32)), None),
        (U8, (Cast(U8, U8), Cast(FP8, BF16)), None),
    ],
)
def test_what_travels(source: torch.dtype, chain: Chain, wire: torch.dtype | None) -> None:
    assert travelling(source, chain) == (None if wire is None else (wire, ()))


def test_a_program_begins_with_the_first_function() -> None:
    chain = (Cast(BF16, F32), EXP, NEG, Cast(F32, F32))
    assert travelling(BF16, chain) == (F32, chain[1:])
    assert described(chain[1:]) == "aten.exp to aten.neg to float32"
    assert torch.equal(run(chain[1:], torch.tensor([0.0, 1.0])), -torch.exp(torch.tensor([0.0, 1.0])))


def test_bytes_that_are_reinterpreted_have_no_program() -> None:
    assert travelling(torch.int32, (Cast(F32, F32), EXP)) is None
    assert travelling(F32, (EXP, Cast(torch.int32, torch.int32))) is None


def test_steps_take_numbers_only() -> None:
    tensor = torch.zeros(2)
    step = step_of(aten.mul.Tensor, (tensor, 3), {}, F32)
    assert step is not None
    assert torch.equal(run((step,), torch.ones(2)), torch.full((2,), 3.0))
    assert step_of(aten.mul.Tensor, (tensor, tensor), {}, F32) is None
    assert step_of(aten.cumsum.default, (tensor, 0), {}, F32) is None
    assert functional(aten.mul_.Tensor) is aten.mul.Tensor
    assert functional(aten.mul.Tensor) is None
    assert functional(aten.copy_.default) is None
