"""Whether post-load processing left a parameter's bytes as the loader put them: an order-sensitive digest of each."""

from __future__ import annotations

from typing import Final

import torch

CHUNK_ELEMENTS: Final = 1 << 22
"""Elements digested at once: bounds the temporary memory to 64 MiB whatever the parameter's size."""

_GOLDEN: Final = -7046029254386353131
"""2**64 divided by the golden ratio, as a signed number: an odd multiplier that spreads consecutive positions."""
_ODD: Final = -4417276706812531889
"""0xC2B2AE3D27D4EB4F as a signed number (the second prime of xxHash64)."""

_INTEGER_OF_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def order_sensitive_digest(tensor: torch.Tensor) -> int:
    """A 64-bit digest of the elements' bytes in logical (row-major) order, whatever the strides.

    Each element's bits are mixed with its position before they are added up, so that moving elements changes the sum.
    """
    bits = tensor.detach()
    if bits.is_complex() or bits.element_size() not in _INTEGER_OF_SIZE:
        raise TypeError(f"no digest for {tensor.dtype}")
    bits = (
        bits.view(_INTEGER_OF_SIZE[bits.element_size()])
        if bits.dim()
        else bits.reshape(1).view(_INTEGER_OF_SIZE[bits.element_size()])
    )
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    position = 0
    for part in _parts(bits):
        flat = part.reshape(-1).to(torch.int64)
        index = torch.arange(position, position + flat.numel(), dtype=torch.int64, device=tensor.device)
        mixed = (flat + 1) * _ODD ^ (index + 1) * _GOLDEN
        mixed = (mixed ^ (mixed >> 29)) * _GOLDEN
        total += (mixed ^ (mixed >> 32)).sum()
        position += flat.numel()
    return int(total.item())


def _parts(bits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Consecutive pieces in logical order, each of at most CHUNK_ELEMENTS where the leading dimension allows it."""
    if bits.numel() <= CHUNK_ELEMENTS or bits.dim() == 0:
        return (bits,)
    if bits.is_contiguous():
        return torch.split(bits.view(-1), CHUNK_ELEMENTS)
    rows = max(1, CHUNK_ELEMENTS // max(1, bits[0].numel()))
    return torch.split(bits, rows)
