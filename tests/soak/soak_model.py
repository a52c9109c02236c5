"""The weights of each step of the soak, the same in every process: ``tiny_fleet``'s Llama."""

import functools

import torch
from tiny_fleet import SHAPES


@functools.cache
def _noise() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def masters(step: int) -> dict[str, torch.Tensor]:
    """fp32; of any 64 steps in a row, no two share a value, also not in bfloat16: it tells 1/128 of a value apart."""
    factor = 1.0 + step % 64 / 64
    return {name: factor * noise for name, noise in _noise().items()}
