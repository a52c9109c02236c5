"""A trainer of models that are too large to draw on a CPU: bf16 masters made on its GPU, every eighth layer the same.

Takes the arguments of ``scripted_trainer.py``. Each line of its standard input, ``{"do": "publish", "step": n}``, is
one push of other values; ``{"do": "save", "step": n}`` writes what was pushed last as a checkpoint. Several ranks hold
rows as FSDP2 does, or as HSDP where WEIGHTSYNC_BENCH_REPLICAS says how many replicas there are. The experts of a layer
are two tensors, as transformers has them; with WEIGHTSYNC_BENCH_APART each has tensors of its own, as checkpoints do.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scripted_trainer import answer, told
from tiny_models import checkpoint_state, model_shapes, save_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, ones
from transformers import AutoConfig
from weightsync.agents.trainer.agent import PublishError, TrainerAgent
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots.routing import SlotOptions

REPLICAS, APART, RING = "WEIGHTSYNC_BENCH_REPLICAS", "WEIGHTSYNC_BENCH_APART", "WEIGHTSYNC_BENCH_RING_MIB"
DIFFERENT_LAYERS = 8
LAYER = re.compile(r"(?<=model\.layers\.)\d+")
SHARD_BYTES = 4 << 30
SAVING_THREADS = min(16, os.cpu_count() or 1)
EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.weight")


def stacked(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint with the experts of a layer as transformers holds them: gate over up, and down."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if (expert := EXPERT.fullmatch(name)) is None:
            found[name] = shape
        elif expert["part"] != "up_proj":
            gate = expert["part"] == "gate_proj"
            key = f"{expert['stack']}.{'gate_up_proj' if gate else 'down_proj'}"
            found[key] = (int(expert["number"]) + 1, shape[0] * (1 + gate), shape[1])
    return found


def apart(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that a trainer's ``value`` of this name is."""
    stack, _, part = name.rpartition(".")
    if not stack.endswith(".experts"):
        return {name: value}
    parts = {"down_proj": value}
    if part == "gate_up_proj":
        parts = dict(zip(("gate_proj", "up_proj"), value.chunk(2, 1), strict=True))
    return {f"{stack}.{n}.{key}.weight": each for key, values in parts.items() for n, each in enumerate(values)}


def masters(shapes: dict[str, tuple[int, ...]], device: str, world: int) -> dict[str, torch.Tensor]:
    """0.02·randn, norms of ones."""
    replicas = int(os.environ.get(REPLICAS, "1"))
    sizes, names = (replicas, world // replicas), ("dp_replicate", "dp_shard")
    mesh = init_device_mesh(device, sizes, mesh_dim_names=names) if world > 1 else None
    # Replicas draw the same.
    generator = torch.Generator(device).manual_seed(1 if mesh is None else 1 + mesh.get_local_rank("dp_shard"))
    drawn: dict[str, torch.Tensor] = {}
    state = {}
    for name, shape in shapes.items():
        key = LAYER.sub(lambda found: str(int(found[0]) % DIFFERENT_LAYERS), name)
        if key not in drawn:
            drawn[key] = _ones(shape, device, mesh)
            if len(shape) > 1:
                local = drawn[key].to_local() if isinstance(drawn[key], DTensor) else drawn[key]
                local.normal_(0.0, 0.02, generator=generator)
        state[name] = drawn[key]
    return state


def _ones(shape: tuple[int, ...], device: str, mesh: DeviceMesh | None) -> torch.Tensor:
    if mesh is None:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    lying = (mesh, [Replicate(), Shard(0)]) if mesh.size(0) > 1 else (mesh["dp_shard"], [Shard(0)])
    return ones(shape, dtype=torch.bfloat16, device_mesh=lying[0], placements=lying[1])


def save(directory: Path, config: dict[str, Any], state: dict[str, torch.Tensor], rank: int) -> None:
    """As a trainer would save it, from rank 0; every rank takes part."""

    def whole() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in state.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if rank == 0:
                yield from checkpoint_state(config, apart(name, full.cpu())).items()

    if rank == 0:
        torch.set_num_threads(SAVING_THREADS)  # FP8 of tens of GB on one would take minutes
        save_shards(directory, config, whole(), SHARD_BYTES)
        torch.set_num_threads(1)
    else:
        for _ in whole():
            pass


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("hub-url", "token-file", "run-id", "run-dir", "model-config", "checkpoints", "device"):
        arguments.add_argument(f"--{name}", required=True)
    given = arguments.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if given.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())  # ranks may share one
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if given.device == "cuda" else "gloo")
    config = json.loads(Path(given.model_config).read_text())
    shapes, together = model_shapes(config), "num_experts" in config and APART not in os.environ
    state = masters(stacked(shapes) if together else shapes, given.device, world)
    ring = int(os.environ[RING]) << 20 if RING in os.environ else None
    different = {id(tensor): tensor for tensor in state.values() if tensor.ndim > 1}
    agent = TrainerAgent(
        lambda: state, None if together else model_table(config), hub_url=given.hub_url, token_file=given.token_file,
        run_id=given.run_id, run_dir=given.run_dir, options=SlotOptions(staging_bytes=ring),
        config=AutoConfig.from_pretrained(Path(given.model_config).parent) if together else None,
    )  # fmt: skip
    answer(rank, ready=True)
    while (order := told(rank, world))["do"] != "close":
        step = order["step"]
        if order["do"] == "save":
            save(Path(given.checkpoints) / f"step_{step}", config, state, rank)
            answer(rank, saved=step)
            continue
        for tensor in different.values():
            tensor.neg_()
        torch.get_device_module(given.device).synchronize()
        began = time.monotonic()
        try:
            said = {"sequence": agent.publish(step)}
        except PublishError as error:
            said = {"error": str(error)}
        answer(rank, step=step, seconds=time.monotonic() - began, **said)
    agent.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
