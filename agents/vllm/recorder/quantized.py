"""Which tensors of a recorded layout are codes, and which blocks share a scale: from names, shapes and vLLM's settings.

A checkpoint keeps the scales of ``x.weight`` in ``x.weight_scale_inv`` (blocks, as DeepSeek's) or ``x.weight_scale``
(ModelOpt, compressed-tensors, llm-compressor). A tensor of codes whose scales are not found stays out of the list, and
a trainer that has only values refuses it by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from weightsync.orchestrator.protocol.layout import Quantized, ScaleFormat, Tensor

CODES: Final = "float8_e4m3fn"
SUFFIXES: Final = ("_scale_inv", "_scale")
EXPONENTS: Final = ("float8_e8m0fnu", "uint8")
"""Dtypes of scales that hold nothing but an exponent."""
MX_BLOCK: Final = (1, 32)
"""Of the OCP microscaling formats (2023, section 5.2): 32 elements along the columns share a scale."""


def quantized_of(tensors: Sequence[Tensor], vllm_config: Any) -> tuple[Quantized, ...]:
    """Of each tensor of codes among ``tensors``: its scales and its blocks."""
    declared = _declared_block(vllm_config)
    powers = _powers_of_two(vllm_config)
    return tuple(_found(tensors, declared, powers))


def quantization_name(vllm_config: Any) -> str:
    """vLLM's name of the engine's format; empty for one that is not quantised."""
    model = getattr(vllm_config, "model_config", None)
    return str(getattr(model, "quantization", None) or "")


def _found(tensors: Sequence[Tensor], declared: tuple[int, int] | None, powers: bool) -> Iterator[Quantized]:
    index = {tensor.name: number for number, tensor in enumerate(tensors)}
    for number, codes in enumerate(tensors):
        if codes.dtype != CODES:
            continue
        scales = next((index[codes.name + suffix] for suffix in SUFFIXES if codes.name + suffix in index), None)
        if scales is None:
            continue
        block = block_of(codes.shape, tensors[scales], declared)
        if block is not None:
            exponents = tensors[scales].dtype in EXPONENTS
            scale_format: ScaleFormat = "ue8m0" if exponents or powers else "float32"
            yield Quantized(number, scales, block, scale_format)


def block_of(codes: tuple[int, ...], scales: Tensor, declared: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of codes of shape ``codes`` [(experts,) rows, columns] that share one of ``scales``.

    ``declared``: what the engine's settings say. None: the shapes belong to no kind of scale that is known here.
    """
    if len(codes) < 2:
        return None
    *leading, rows, columns = codes
    grid = scales.shape
    kinds = [declared, MX_BLOCK if scales.dtype in EXPONENTS else None, (1, columns), (rows, columns)]
    for block in kinds:
        if block is None:
            continue
        whole = (*leading, -(-rows // block[0]), -(-columns // block[1]))
        # One scale per row or tensor is stored with its last dimensions or without them.
        if grid == whole or (math.prod(whole) == math.prod(grid) and _squeezed(grid) == _squeezed(whole)):
            return block
    return None


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(extent for extent in shape if extent != 1)


def _declared_block(vllm_config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(vllm_config, "quant_config", None), "weight_block_size", None)
    return (int(size[0]), int(size[1])) if size is not None and len(size) == 2 else None


def _powers_of_two(vllm_config: Any) -> bool:
    """Whether the checkpoint's configuration says that its scales are powers of two, whatever their dtype."""
    config = getattr(getattr(vllm_config, "model_config", None), "hf_config", None)
    settings: Any = getattr(config, "quantization_config", None)
    if hasattr(settings, "to_dict"):
        settings = settings.to_dict()
    if not isinstance(settings, Mapping):
        return False
    return "ue8m0" in (settings.get("scale_fmt"), settings.get("scale_format"))
