"""How a trainer's value becomes the byte that engines serve: one entry point for casts and FP8 blocks."""

from dataclasses import dataclass
from typing import Final

import torch
from weightsync.kernels.fp8 import quantize_blocks

BLOCK: Final = (128, 128)
"""Rows and columns of one FP8 block of a DeepSeek-style checkpoint (``weight_block_size``)."""

SCALE_DTYPE: Final = torch.float32


@dataclass(frozen=True, slots=True)
class QuantizationSpec:
    """What one logical tensor is on the wire.

    ``destination_dtype`` None means ``forward_dtype``. An empty ``scale_suffix`` is a plain cast copy; otherwise
    values are quantised in blocks of ``block`` and their scales form a tensor of their own, named by the suffix.
    ``keeps_master``: the model declares the tensor in its own precision, and masters are not rounded to the forward
    dtype first. (A float32 destination without it is a tensor that engines widen: they load bfloat16 into it.)
    """

    destination_dtype: torch.dtype | None = None
    scale_suffix: str = ""
    forward_dtype: torch.dtype = torch.bfloat16
    block: tuple[int, int] = BLOCK
    keeps_master: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values on the wire."""
        return self.destination_dtype or self.forward_dtype

    @property
    def quantizes(self) -> bool:
        """Whether there are scales."""
        return bool(self.scale_suffix)

    @property
    def gather_dtype(self) -> torch.dtype:
        """The narrowest dtype that masters may be cast to before they are gathered, with the same bytes at the end."""
        return self.dtype if self.keeps_master else self.forward_dtype

    def scale_name(self, name: str) -> str:
        """Name of the scales of the tensor ``name``.

        Raises:
            ValueError: there are none.
        """
        if not self.quantizes:
            raise ValueError(f"{name!r} is cast, not quantised: it has no scales")
        return name + self.scale_suffix

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of values of ``shape`` [..., rows, columns]: one per block, the last ones partial."""
        *leading, rows, columns = shape
        return (*leading, -(-rows // self.block[0]), -(-columns // self.block[1]))

    def apply(self, src: torch.Tensor, out: torch.Tensor, scale_out: torch.Tensor | None = None) -> None:
        """Write ``src`` into ``out`` (and its scales into ``scale_out``), on their device, without waiting for it.

        Masters are cast to ``forward_dtype`` first, so that the engine serves what the trainer's forward uses; a
        tensor declared float32 stays as it is. Quantised: scale = max(amax / 448, 1e-12), saturating, ties to even.

        Args:
            src: [rows, columns] or [n, rows, columns] when quantised, any shape when cast.
            out: ``src``'s shape, dtype ``self.dtype``.
            scale_out: ``scale_shape(src.shape)``, float32; None without scales.

        Raises:
            ValueError: shapes or dtypes that do not belong together, or scales given or lacking against the spec.
        """
        if out.shape != src.shape or out.dtype != self.dtype:
            raise ValueError(f"{tuple(src.shape)} → {out.dtype} {tuple(out.shape)}: expected {self.dtype} of one shape")
        if self.quantizes != (scale_out is not None):
            raise ValueError("scales are written if and only if the specification has a scale suffix")
        if scale_out is None:
            self._cast(src, out)
            return
        if scale_out.dtype != SCALE_DTYPE or tuple(scale_out.shape) != self.scale_shape(tuple(src.shape)):
            raise ValueError(f"scales of {tuple(src.shape)} are not {scale_out.dtype} {tuple(scale_out.shape)}")
        quantize_blocks(src, out, scale_out, block=self.block, forward_dtype=self.forward_dtype)

    def _cast(self, src: torch.Tensor, out: torch.Tensor) -> None:
        if src.dtype != self.gather_dtype and out.dtype != self.gather_dtype:
            src = src.to(self.gather_dtype)
        out.copy_(src)


PLAIN: Final = QuantizationSpec()
"""A cast to bfloat16."""

FP8_SUFFIX: Final = "_scale_inv"
"""Of DeepSeek-style FP8 checkpoints: ``x.weight`` and ``x.weight_scale_inv``."""
