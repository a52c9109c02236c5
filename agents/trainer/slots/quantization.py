"""How a trainer's value becomes the byte that engines serve: one entry point for casts and FP8 of any grid."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from weightsync.kernels.fp8 import prepare_quantize
from weightsync.kernels.fp8_jobs import BLOCKS, QuantizeJob
from weightsync.kernels.fp8_reference import ScaleFormat, quantize_reference
from weightsync.kernels.warm import warm_up_quantize

BLOCK: Final = (128, 128)
"""Rows and columns of one FP8 block of a DeepSeek-style checkpoint (``weight_block_size``)."""

SCALE_DTYPE: Final = torch.float32
"""Of the scales on the wire in DeepSeek-style checkpoints."""

BESIDE: Final = "wire"
"""What is converted goes out while the rest is."""

ROUNDING_BYTES: Final = 64 * 1024 * 1024
"""Of the buffer that values are rounded in on their way to another dtype, unless a single tensor needs more."""

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
    values are quantised in blocks of ``block`` and their scales form a tensor of their own, named by the suffix, of
    dtype ``scale_dtype``; ``scale_format`` ``ue8m0`` rounds each scale up to a power of two. ``scale_dims``: how many
    of the two dimensions of the grid of blocks that tensor has; those left out, from the last, have extent 1.
    ``keeps_master``: the model declares the tensor in its own precision, and masters are not rounded to the forward
    dtype first. (A float32 destination without it is a tensor that engines widen: they load bfloat16 into it.)
    """

    destination_dtype: torch.dtype | None = None
    scale_suffix: str = ""
    forward_dtype: torch.dtype = torch.bfloat16
    block: tuple[int, int] = BLOCK
    keeps_master: bool = False
    scale_dtype: torch.dtype = SCALE_DTYPE
    scale_format: ScaleFormat = "fp32"
    scale_dims: int = 2

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
        return self.dtype if self.keeps_master and not self.quantizes else self.forward_dtype

    @property
    def unchanged(self) -> frozenset[torch.dtype]:
        """Dtypes whose elements travel as they are, whatever they stand for."""
        return frozenset() if self.quantizes or self.gather_dtype != self.dtype else frozenset({self.dtype})

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

    def stored(self, of_grid: tuple[int, ...]) -> tuple[int, ...]:
        """One value per dimension of the grid of blocks, without those that the scales' tensor leaves out."""
        return of_grid[: len(of_grid) - 2 + self.scale_dims]

    def apply(self, src: torch.Tensor, out: torch.Tensor, scale_out: torch.Tensor | None = None) -> None:
        """Write ``src`` into ``out`` (and its scales into ``scale_out``), on their device, without waiting for it.

        Masters are cast to ``forward_dtype`` first, so that the engine serves what the trainer's forward uses; a
        tensor declared float32 stays as it is. Quantised: scale = max(amax / 448, 1e-12), saturating, ties to even.

        Args:
            src: [rows, columns] or [n, rows, columns] when quantised, any shape when cast.
            out: ``src``'s shape, dtype ``self.dtype``.
            scale_out: ``scale_shape(src.shape)``, ``self.scale_dtype``; None without scales.

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
        if not self.quantizes:
            # Through the forward dtype also on the way to a wider one: engines are to have what the forward pass used.
            via = self.gather_dtype
            detours = [n for n, c in enumerate(conversions) if c.out.dtype != via and c.src.dtype != via]
            return InTurns(detours, via, conversions, Casts)
        # The kernels do not read float64; quantised values are rounded to the forward dtype first in any case.
        detours = [n for n, c in enumerate(conversions) if c.src.dtype != self._dtype_read(c.src.dtype)]
        return InTurns(detours, self.forward_dtype, conversions, self._quantize)

    def _quantize(self, conversions: Sequence[Conversion]) -> Prepared:
        jobs = [QuantizeJob(c.src, c.out, c.scale_out) for c in conversions if c.scale_out is not None]
        if self.block in BLOCKS:
            return prepare_quantize(
                jobs,
                block=self.block,
                forward_dtype=self.forward_dtype,
                scale_format=self.scale_format,
                beside=BESIDE,
            )
        outs = [(job.out, job.scale_out) for job in jobs]  # without the sources, which are not ours to keep
        return lambda sources: self._in_whole_rows(sources, outs)

    def _dtype_read(self, dtype: torch.dtype) -> torch.dtype:
        return self.forward_dtype if dtype == torch.float64 else dtype

    def warm_up(self, device: torch.device, source_dtypes: Iterable[torch.dtype]) -> None:
        """Compile what converting sources of these dtypes on ``device`` needs; a plain cast needs nothing."""
        if self.quantizes and self.block in BLOCKS:
            warm_up_quantize(
                device,
                {self._dtype_read(dtype) for dtype in source_dtypes},
                block=self.block,
                forward_dtype=self.forward_dtype,
                scale_dtype=self.scale_dtype,
                scale_format=self.scale_format,
                beside=BESIDE,
            )

    def _check(self, conversion: Conversion) -> None:
        src, out, scale_out = conversion.src, conversion.out, conversion.scale_out
        if out.shape != src.shape or out.dtype != self.dtype:
            raise ValueError(f"{tuple(src.shape)} → {out.dtype} {tuple(out.shape)}: expected {self.dtype} of one shape")
        if self.quantizes != (scale_out is not None):
            raise ValueError("scales are written if and only if the specification has a scale suffix")
        if scale_out is None:
            return
        if scale_out.dtype != self.scale_dtype or tuple(scale_out.shape) != self.scale_shape(tuple(src.shape)):
            raise ValueError(f"scales of {tuple(src.shape)} are not {scale_out.dtype} {tuple(scale_out.shape)}")

    def _in_whole_rows(
        self, sources: Sequence[torch.Tensor], outs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """One scale per row or per tensor: by the definition itself; the kernel knows small blocks only."""
        for source, (out, scale_out) in zip(sources, outs, strict=True):
            if source.numel():
                quantize_reference(
                    source,
                    out,
                    scale_out,
                    block=self.block,
                    forward_dtype=self.forward_dtype,
                    scale_format=self.scale_format,
                )


class Casts:
    """Plain casts of many tensors, in few launches where the device can."""

    def __init__(self, conversions: Sequence[Conversion]) -> None:
        self._outs = [conversion.out for conversion in conversions]

    def __call__(self, sources: Sequence[torch.Tensor]) -> None:
        """Cast ``sources``, which stand in for those of the conversions."""
        torch._foreach_copy_(self._outs, list(sources))


class InTurns:
    """Conversions of which some go by way of another dtype, through one buffer that is kept.

    As many as fit into the buffer take it in turns: what is rounded on its way may be the whole model.

    Args:
        detours: numbers of those that do.
        via: the dtype.
        conversions: all.
        prepare: makes what converts many sources at a time. It keeps none of those that it is shown.
    """

    def __init__(
        self,
        detours: Sequence[int],
        via: torch.dtype,
        conversions: Sequence[Conversion],
        prepare: Callable[[Sequence[Conversion]], Prepared],
    ) -> None:
        self._straight = sorted(set(range(len(conversions))) - set(detours))
        self._convert = prepare([conversions[number] for number in self._straight]) if self._straight else None
        self._turns: list[tuple[list[int], list[torch.Tensor], Prepared]] = []
        waiting = iter(detours)
        for rounded in _turns([conversions[number].src for number in detours], via):
            numbers = [next(waiting) for _ in rounded]
            own = [replace(conversions[n], src=src) for n, src in zip(numbers, rounded, strict=True)]
            self._turns.append((numbers, rounded, prepare(own)))

    def __call__(self, sources: Sequence[torch.Tensor]) -> None:
        """Convert ``sources``, which stand in for those of the conversions. Allocates nothing for the detours."""
        for numbers, rounded, convert in self._turns:
            torch._foreach_copy_(rounded, [sources[number] for number in numbers])
            convert(rounded)
        if self._convert is not None:
            self._convert([sources[number] for number in self._straight] if self._turns else sources)


def _turns(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Tensors of the sources' shapes in ``dtype``, in lists that share one buffer, of one device each."""
    sizes = [source.numel() for source in sources]
    most = (
        max([ROUNDING_BYTES // dtype.itemsize, *sizes]) if sum(sizes) * dtype.itemsize > ROUNDING_BYTES else sum(sizes)
    )
    buffers: dict[torch.device, torch.Tensor] = {}
    turn: list[torch.Tensor] = []
    used = 0
    for source, size in zip(sources, sizes, strict=True):
        buffer = buffers.get(source.device)
        if buffer is None:
            buffer = buffers[source.device] = torch.empty(most, dtype=dtype, device=source.device)
        if turn and (used + size > most or turn[-1].device != source.device):
            yield turn
            turn, used = [], 0
        turn.append(buffer.narrow(0, used, size).view(source.shape))
        used += size
    if turn:
        yield turn


PLAIN: Final = QuantizationSpec()
"""A cast to bfloat16."""

FP8_SUFFIX: Final = "_scale_inv"
"""Of DeepSeek-style FP8 checkpoints: ``x.weight`` and ``x.weight_scale_inv``."""
