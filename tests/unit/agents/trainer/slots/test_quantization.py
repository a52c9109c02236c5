"""Casts and FP8 blocks, against plain arithmetic."""

import contextlib
import weakref

import pytest
import torch
from weightsync.agents.trainer.slots import quantization
from weightsync.agents.trainer.slots.quantization import Conversion, QuantizationSpec

FP8 = QuantizationSpec(torch.float8_e4m3fn, "_scale_inv")
THIRD = torch.tensor([1 / 3, 1e-3, -2.7182817])


def applied(spec, src):
    out = torch.empty(src.shape, dtype=spec.dtype)
    scales = torch.empty(spec.scale_shape(tuple(src.shape))) if spec.quantizes else None
    spec.apply(src, out, scales)
    return (out, scales) if spec.quantizes else out


def test_masters_are_rounded_to_the_forward_dtype_first():
    assert torch.equal(applied(QuantizationSpec(), THIRD), THIRD.to(torch.bfloat16))
    half = applied(QuantizationSpec(torch.float16), THIRD)
    assert torch.equal(half, THIRD.to(torch.bfloat16).to(torch.float16))
    assert not torch.equal(half, THIRD.to(torch.float16))


def test_tensors_declared_float32_are_not_rounded():
    assert torch.equal(applied(QuantizationSpec(torch.float32, keeps_master=True), THIRD), THIRD)


def test_tensors_that_engines_widen_are_rounded_and_widened():
    assert torch.equal(applied(QuantizationSpec(torch.float32), THIRD), THIRD.to(torch.bfloat16).float())


def test_a_float32_forward_keeps_float32():
    spec = QuantizationSpec(forward_dtype=torch.float32)
    assert spec.dtype == torch.float32
    assert torch.equal(applied(spec, THIRD), THIRD)


def left_as_it_was(change, read, value):
    """``change(value)`` for as long as the context lasts."""

    @contextlib.contextmanager
    def context():
        before = read()
        change(value)
        try:
            yield
        finally:
            change(before)

    return context


SETTINGS = {
    "default dtype": left_as_it_was(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": left_as_it_was(
        torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "spec",
    [
        FP8,
        QuantizationSpec(torch.float8_e4m3fn, "_scale", block=(1, 300), scale_dims=1),
        QuantizationSpec(torch.float8_e4m3fn, "_scale", block=(128, 128), scale_format="ue8m0"),
        QuantizationSpec(torch.float16, forward_dtype=torch.float16),
        QuantizationSpec(torch.float32, forward_dtype=torch.bfloat16),
    ],
)
def test_settings_of_the_training_script_change_no_byte(weights, spec, setting):
    src = weights("a", 200, 300).clone()
    src[:128, :128] = 0  # has the smallest scale that there is
    src[128:, :128] *= 1e-20

    def made():
        out = torch.empty(src.shape, dtype=spec.dtype, device="cpu")
        scales = (
            torch.empty(spec.scale_shape((200, 300)), dtype=torch.float32, device="cpu") if spec.quantizes else None
        )
        spec.apply(src, out, scales)
        return [part.clone().flatten().view(torch.uint8) for part in (out, scales) if part is not None]

    expected = made()
    with SETTINGS[setting]():
        found = made()
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 1), (576, 130)])
def test_blocks_in_two_dimensions(weights, fp8_reference, shape):
    master = weights("w", *shape) * 3
    values, scales = applied(FP8, master)
    expected, expected_scales = fp8_reference(master)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    rounding = (
        values.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    ) - master
    assert rounding.abs().max() <= master.abs().max() / 16, "e4m3 keeps three bits of mantissa"


def test_blocks_in_three_dimensions_are_each_experts_own(weights, fp8_reference):
    master = weights("w", 3, 200, 130)
    values, scales = applied(FP8, master)
    for expert in range(3):
        expected, expected_scales = fp8_reference(master[expert])
        assert torch.equal(values[expert].view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales[expert], expected_scales)


def test_tiny_blocks_keep_their_values_and_zero_blocks_stay_zero():
    values, scales = applied(FP8, torch.full((128, 128), 1e-9))
    assert scales.item() == pytest.approx(1e-9 / 448, rel=1e-2) or scales.item() == pytest.approx(1e-12, rel=1e-6)
    assert values.float().min() > 0
    values, scales = applied(FP8, torch.zeros(128, 128))
    assert scales.item() == pytest.approx(1e-12, rel=1e-6)
    assert (values.float() == 0).all()


def test_names_and_shapes_of_scales():
    assert FP8.scale_name("a.weight") == "a.weight_scale_inv"
    assert FP8.scale_shape((28672, 512)) == (224, 4)
    assert FP8.scale_shape((8, 576, 6144)) == (8, 5, 48)
    with pytest.raises(ValueError, match="no scales"):
        QuantizationSpec().scale_name("a.weight")


def test_outputs_that_do_not_belong_are_refused():
    src = torch.zeros(128, 128)
    with pytest.raises(ValueError, match="one shape"):
        QuantizationSpec().apply(src, torch.zeros(128, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="one shape"):
        QuantizationSpec().apply(src, torch.zeros(128, 128))
    with pytest.raises(ValueError, match="scale suffix"):
        FP8.apply(src, torch.zeros(128, 128, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="scales of"):
        FP8.apply(src, torch.zeros(128, 128, dtype=torch.float8_e4m3fn), torch.zeros(2, 1))


def test_what_is_widened_is_rounded_through_one_small_buffer_in_turns(monkeypatch):
    """Among tensors that need no rounding, and with one that is larger than the buffer."""
    monkeypatch.setattr(quantization, "ROUNDING_BYTES", 64)
    spec = QuantizationSpec(torch.float32)
    shapes = [(5, 3), (4,), (90,), (2, 7), (), (3,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float32, torch.float16]
    sources = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    outs = [torch.empty(shape) for shape in shapes]
    cast = spec.prepare([Conversion(src, out) for src, out in zip(sources, outs, strict=True)])
    for offset in (0, 1):
        moved = [source + offset for source in sources]
        cast(moved)
        for out, source in zip(outs, moved, strict=True):
            assert torch.equal(out, source.to(torch.bfloat16).float())


@pytest.mark.parametrize("block", [(128, 128), (1, -1)], ids=["blocks", "whole rows"])
def test_float64_is_rounded_through_the_buffer_before_it_is_quantised(monkeypatch, block):
    monkeypatch.setattr(quantization, "ROUNDING_BYTES", 2 * 130 * 140)
    columns = 140
    spec = QuantizationSpec(torch.float8_e4m3fn, "_scale", block=(1, columns) if block[0] == 1 else block)
    dtypes = [torch.float64, torch.float32, torch.float64, torch.float64]
    sources = [torch.randn(rows, columns).to(dtype) for rows, dtype in zip((130, 5, 100, 60), dtypes, strict=True)]

    def places():
        return [torch.empty(source.shape, dtype=torch.float8_e4m3fn) for source in sources], [
            torch.empty(spec.scale_shape(tuple(source.shape))) for source in sources
        ]

    (outs, scales), (alone, alone_scales) = places(), places()
    quantize = spec.prepare([Conversion(*each) for each in zip(sources, outs, scales, strict=True)])
    for offset in (0, 1):
        moved = [source + offset for source in sources]
        quantize(moved)
        for number, source in enumerate(moved):
            spec.apply(source.to(torch.bfloat16), alone[number], alone_scales[number])
            assert torch.equal(outs[number].view(torch.uint8), alone[number].view(torch.uint8))
            assert torch.equal(scales[number], alone_scales[number])


@pytest.mark.parametrize(
    "spec", [QuantizationSpec(torch.float32), FP8, QuantizationSpec(FP8.dtype, "_s", block=(1, 8))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_it_is_prepared_with_is_not_kept(spec, dtype):
    source, out = torch.randn(4, 8).to(dtype), torch.empty(4, 8, dtype=spec.dtype)
    scales = torch.empty(spec.scale_shape((4, 8))) if spec.quantizes else None
    kept = weakref.ref(source)
    prepared = spec.prepare([Conversion(source, out, scales)])
    del source
    assert kept() is None
    prepared([torch.ones(4, 8, dtype=dtype)])
    assert out.float().abs().min() > 0


def test_a_conversion_leaves_a_wire_its_turn(monkeypatch):
    asked = []

    def prepare(jobs, **options):
        asked.append(options["beside"])
        return lambda sources: None

    monkeypatch.setattr(quantization, "prepare_quantize", prepare)
    monkeypatch.setattr(quantization, "warm_up_quantize", lambda *given, **options: asked.append(options["beside"]))
    codes, scales = torch.empty(4, 8, dtype=FP8.dtype), torch.empty(FP8.scale_shape((4, 8)))
    FP8.prepare([Conversion(torch.ones(4, 8), codes, scales)])
    FP8.warm_up(torch.device("cpu"), [torch.float32])
    assert asked == ["wire", "wire"]
