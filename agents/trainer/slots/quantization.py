"""How a trainer's value becomes the byte that engines serve: one entry point for casts and FP8 blocks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.kernels.fp8 import prepare_quantize
from weightsync.kernels.fp8_jobs import QuantizeJob
from weightsync.kernels.warm import warm_up_quantize

BLOCK: Final = (128, 128)
"""Rows and columns of one FP8 block of a DeepSeek-style checkpoint (``weight_block_size``)."""

SCALE_DTYPE: Final = torch.float32
"""Of the scales on the wire; DeepSeek-style checkpoints have no other."""

Prepared = Callable[[Sequence[torch.Tensor]], None]
"""Converts sources that look like those that it was prepared with (dtype, shape, strides, device)."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One tensor to convert; see ``QuantizationSpec.apply`` for shapes and dtypes."""

    src: torch.Tensor
    out: torch.Tensor
    scale_out: torch.Tensor | None = None


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
        self.prepare([Conversion(src, out, scale_out)])([src])

    def prepare(self, conversions: Sequence[Conversion]) -> Prepared:
        """``apply`` to many tensors in few launches, to be called again and again with the sources of the moment.

        Raises:
            ValueError: as ``apply``.
        """
        for conversion in conversions:
            self._check(conversion)
        outs = [conversion.out for conversion in conversions]
        if not self.quantizes:
            return lambda sources: self._cast(sources, outs)
        jobs = [QuantizeJob(self._readable(c.src), c.out, c.scale_out) for c in conversions if c.scale_out is not None]
        quantize = prepare_quantize(jobs, block=self.block, forward_dtype=self.forward_dtype)
        return lambda sources: quantize([self._readable(src) for src in sources])

    def _readable(self, src: torch.Tensor) -> torch.Tensor:
        """``src`` in a dtype that the kernels read; itself unless it is float64."""
        return src.to(self._dtype_read(src.dtype))

    def _dtype_read(self, dtype: torch.dtype) -> torch.dtype:
        # Quantised values are rounded to the forward dtype first in any case.
        return self.forward_dtype if dtype == torch.float64 else dtype

    def warm_up(self, device: torch.device, source_dtypes: Iterable[torch.dtype]) -> None:
        """Compile what converting sources of these dtypes on ``device`` needs; a plain cast needs nothing."""
        if self.quantizes:
            warm_up_quantize(
                device,
                {self._dtype_read(dtype) for dtype in source_dtypes},
                block=self.block,
                forward_dtype=self.forward_dtype,
                scale_dtype=SCALE_DTYPE,
            )

    def _check(self, conversion: Conversion) -> None:
        src, out, scale_out = conversion.src, conversion.out, conversion.scale_out
        if out.shape != src.shape or out.dtype != self.dtype:
            raise ValueError(f"{tuple(src.shape)} → {out.dtype} {tuple(out.shape)}: expected {self.dtype} of one shape")
        if self.quantizes != (scale_out is not None):
            raise ValueError("scales are written if and only if the specification has a scale suffix")
        if scale_out is None:
            return
        if scale_out.dtype != SCALE_DTYPE or tuple(scale_out.shape) != self.scale_shape(tuple(src.shape)):
            raise ValueError(f"scales of {tuple(src.shape)} are not {scale_out.dtype} {tuple(scale_out.shape)}")

    def _cast(self, sources: Sequence[torch.Tensor], outs: list[torch.Tensor]) -> None:
        through = self.gather_dtype
        # Through the forward dtype also on the way to a wider one: engines are to have what the forward pass used.
        rounded = [
            src.to(through) if out.dtype != through and src.dtype != through else src
            for src, out in zip(sources, outs, strict=True)
        ]
        torch._foreach_copy_(outs, rounded)  # casts too, in few launches where the device can


PLAIN: Final = QuantizationSpec()
"""A cast to bfloat16."""

FP8_SUFFIX: Final = "_scale_inv"
"""Of DeepSeek-style FP8 checkpoints: ``x.weight`` and ``x.weight_scale_inv``."""
