"""A transformers model on one rank or under FSDP2, published without a table; told what to do as ``scripted_trainer``.

Masters are fp32. What ``save_pretrained`` writes of their cast to bfloat16 is what a fresh engine loads.
"""

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scripted_trainer import answer, told
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from weightsync.agents.trainer.agent import PublishError, TrainerAgent


def drawn(config: Any, seed: int) -> Any:
    """A model of 0.15·randn, norms and biases around 1; the same on every rank."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def take(model: nn.Module, whole: nn.Module) -> None:
    """``whole``'s weights into ``model``, which may be sharded."""
    values = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = values[name].detach()
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("hub-url", "token-file", "run-id", "run-dir", "model-config", "checkpoints", "device"):
        arguments.add_argument(f"--{name}", required=True)
    given = arguments.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    config = AutoConfig.from_pretrained(Path(given.model_config).parent)
    model = drawn(config, 0)
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    agent = TrainerAgent(
        model, hub_url=given.hub_url, token_file=Path(given.token_file), run_id=given.run_id,
        run_dir=Path(given.run_dir), rank=rank, world=world, publish_seconds=120.0,
    )  # fmt: skip
    answer(rank, ready=True, generation=agent.generation)
    while (order := told(rank, world))["do"] != "close":
        step = order["step"]
        whole = drawn(config, step)
        if rank == 0:
            copy.deepcopy(whole).to(torch.bfloat16).save_pretrained(Path(given.checkpoints) / f"step_{step}")
        take(model, whole)
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
