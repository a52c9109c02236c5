"""A dense Qwen3 at full size as layouts: FSDP ranks that hold rows, and tensor-parallel ranks that need the columns of
every row-parallel matrix. FP8 blocks with their scales; hidden 4096, as in Qwen3-8B."""

from collections.abc import Iterator

import numpy as np
from weightsync.orchestrator.planner import Party
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Lands, Layout, Region, Tensor, row
from weightsync.orchestrator.protocol.names import Member

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, WIDTH, VOCABULARY, BLOCK = 4096, 12288, 32, 8, 128, 151936, 128

LAYER = {
    "self_attn.q_proj": (HEADS * WIDTH, HIDDEN, 0),
    "self_attn.k_proj": (KV_HEADS * WIDTH, HIDDEN, 0),
    "self_attn.v_proj": (KV_HEADS * WIDTH, HIDDEN, 0),
    "self_attn.o_proj": (HIDDEN, HEADS * WIDTH, 1),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN, 0),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN, 0),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE, 1),
}
"""Rows, columns, and the dimension that tensor parallelism cuts."""

Shape = tuple[int, ...]


def tensors(layers: int) -> Iterator[tuple[Tensor, int | None]]:
    """Each tensor, and the dimension that tensor parallelism cuts; None: all of it is everywhere."""
    for layer in range(layers):
        for name, (rows, columns, cut) in LAYER.items():
            full = f"model.layers.{layer}.{name}.weight"
            yield Tensor(full, "float8_e4m3fn", (rows, columns)), cut
            yield Tensor(full + "_scale_inv", "float32", (rows // BLOCK, columns // BLOCK)), cut
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(f"model.layers.{layer}.{name}.weight", "bfloat16", (HIDDEN,)), None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield Tensor(name, "bfloat16", (VOCABULARY, HIDDEN)), 0
    yield Tensor("model.norm.weight", "bfloat16", (HIDDEN,)), None


SIZE = {"float8_e4m3fn": 1, "float32": 4, "bfloat16": 2}


def party(member: Member, parts: list[tuple[Tensor, Shape, Shape]], room: int, lands: Lands = "live") -> Party:
    """Boxes (corner, extent), one behind the other; ``room``: of the ring or landing, 0 for none. What is copied to has
    the landing that it takes."""
    rows, end = [], 0
    for number, (tensor, corner, extent) in enumerate(parts):
        size = SIZE[tensor.dtype]
        strides = (extent[1] * size, size) if len(extent) == 2 else (size,)
        rows.append(row(number, 0, end, corner, extent, strides))
        end += -(-int(np.prod(extent)) * size // 256) * 256
    layout = Layout(
        tuple(part[0] for part in parts), (Region(0, end, "VRAM"),), np.array(rows, "<i8").tobytes(), lands=lands
    )
    room = arena_bytes(layout) if lands == "copy" else room
    if room:
        regions = (*layout.regions, Region(0, room, "VRAM"))
        layout = Layout(layout.tensors, regions, layout.rows, 1, lands=lands)
    return Party(member, 1, layout)


def cut(tensor: Tensor, dim: int | None, rank: int, world: int) -> tuple[Tensor, Shape, Shape]:
    """The part of ``rank`` of ``world`` along ``dim``; all of it for None."""
    corner, extent = [0] * len(tensor.shape), list(tensor.shape)
    if dim is not None:
        extent[dim] //= world
        corner[dim] = rank * extent[dim]
    return tensor, tuple(corner), tuple(extent)


def trainer(layers: int, world: int, ring: int) -> list[Party]:
    """FSDP: each rank has the same share of every tensor's rows."""
    return [
        party(Member("trainer", "", rank), [cut(tensor, 0, rank, world) for tensor, _ in tensors(layers)], ring)
        for rank in range(world)
    ]


def engine(layers: int, world: int, landing: int, lands: Lands = "live") -> list[Party]:
    """Tensor parallelism."""
    return [
        party(
            Member("inference", "e", rank),
            [cut(tensor, dim, rank, world) for tensor, dim in tensors(layers)], landing, lands,
        )
        for rank in range(world)
    ]  # fmt: skip
