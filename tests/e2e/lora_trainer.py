"""A peft model whose adapter alone is published, on one rank or under FSDP2; told what to do as ``scripted_trainer``.

What ``save_pretrained`` writes of the adapter, in float32, is what a fresh engine loads.
"""

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_trainer import take
from peft import LoraConfig, PeftModel
from scripted_trainer import answer, told
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from weightsync.agents.trainer.agent import PublishError, TrainerAgent


def adapted(model: Path, **settings: Any) -> PeftModel:
    """The model of a directory with an adapter on attention and MLP."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    return PeftModel(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": modules, **settings}))


def draw(model: PeftModel, seed: int) -> PeftModel:
    """0.3·randn for every factor, by the seed; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("hub-url", "token-file", "run-id", "run-dir", "model-config", "checkpoints", "device"):
        arguments.add_argument(f"--{name}", required=True)
    given = arguments.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    whole = adapted(Path(given.model_config).parent)
    model = copy.deepcopy(whole)
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    agent = TrainerAgent(
        model, hub_url=given.hub_url, token_file=given.token_file, run_id=given.run_id, run_dir=given.run_dir,
        publish_seconds=120.0, adapter="default",
    )  # fmt: skip
    answer(rank, ready=True)
    while (order := told(rank, world))["do"] != "close":
        step = order["step"]
        take(model, draw(whole, step))
        # Another scaling than the engine's adapter began with, so that it has to travel.
        for part in (whole, model):
            part.peft_config["default"].lora_alpha = order.get("alpha", 6)
        if rank == 0:
            whole.save_pretrained(Path(given.checkpoints) / f"step_{step}")
        began = time.monotonic()
        try:
            sequence = agent.publish(step)
            answer(rank, sequence=sequence, seconds=time.monotonic() - began)
        except PublishError as error:
            answer(rank, error=str(error))
    agent.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
