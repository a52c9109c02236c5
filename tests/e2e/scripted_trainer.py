"""A trainer that publishes what it is told, for the e2e tests: one rank, or several FSDP2-like ones (gloo or NCCL).

Its masters are fp32 with bits that bf16 cannot hold, so that the cast to the forward dtype is part of what is tested.
They are drawn on the CPU, wherever they live, and so are the checkpoints: one seed, one model, on every device.
Commands arrive on rank 0's standard input, one JSON object a line; so do the answers on its standard output.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import FP8_BLOCKS, checkpoint_state, model_shapes, save_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from weightsync.agents.trainer.agent import PublishError, TrainerAgent
from weightsync.agents.trainer.models import model_table


def masters(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """fp32 weights of 0.15·randn, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value + (value.ndim == 1) for name, value in noise.items()}


def sharded(state: dict[str, torch.Tensor], world: int, device: str) -> dict[str, torch.Tensor]:
    """On ``device``, rows over the ranks as FSDP2 does."""
    if world == 1:
        return {name: value.to(device) for name, value in state.items()}
    mesh = init_device_mesh(device, (world,), mesh_dim_names=("dp_shard",))
    return {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in state.items()}


def told(rank: int, world: int) -> dict[str, Any]:
    """The next command, the same on every rank."""
    line = [sys.stdin.readline() if rank == 0 else ""]
    if world > 1:
        dist.broadcast_object_list(line, src=0)
    return json.loads(line[0]) if line[0] else {"do": "close"}


def answer(rank: int, **fields: Any) -> None:
    if rank == 0:
        print(json.dumps(fields), flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("hub-url", "token-file", "run-id", "run-dir", "model-config", "checkpoints"):
        arguments.add_argument(f"--{name}", required=True)
    arguments.add_argument("--publish-seconds", type=float, default=120.0)
    arguments.add_argument("--device", default="cpu")
    given = arguments.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and given.device == "cuda":
        torch.cuda.set_device(rank)
    if world > 1:  # what is told travels as bytes on the host, weights on the device
        dist.init_process_group("cpu:gloo,cuda:nccl" if given.device == "cuda" else "gloo")
    config = json.loads(Path(given.model_config).read_text())
    shapes = model_shapes(config)
    state = sharded(masters(shapes, 0), world, given.device)
    # Tables know FP8 by blocks only; of other formats the engines say what they need.
    quantised = config.get("quantization_config", FP8_BLOCKS["quantization_config"])
    table = model_table(config) if "weight_block_size" in quantised else None
    agent = TrainerAgent(
        lambda: state, table, hub_url=given.hub_url, token_file=given.token_file,
        run_id=given.run_id, run_dir=given.run_dir,
        publish_seconds=given.publish_seconds,
    )  # fmt: skip
    answer(rank, ready=True, generation=agent.generation)
    while (order := told(rank, world))["do"] != "close":
        step = order["step"]
        if not order.get("again", False):  # else the same weights once more
            full = masters(shapes, order.get("seed", step))
            if rank == 0 and order.get("save", True):
                save_model(Path(given.checkpoints) / f"step_{step}", config, checkpoint_state(config, full))
            if order["do"] == "save":
                answer(rank, saved=step)
                continue
            state = sharded(full, world, given.device)
        began = time.monotonic()
        try:
            sequence = agent.publish(step)
            answer(rank, step=step, sequence=sequence, seconds=time.monotonic() - began)
        except PublishError as error:
            answer(rank, step=step, error=str(error))
    agent.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
