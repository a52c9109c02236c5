"""Trainers of other projects in ten lines each: a real model that learns, FSDP2 under gloo, and an adapter.

``ADAPTER`` in the environment names the loop. Rank 0 writes what each version would be as a checkpoint and says on its
standard output which one was published, as ``scripted_trainer.py`` does.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.demo import DemoTrainer, build_model, save_checkpoint, shard, training_tokens

TESTS = Path(__file__).resolve().parent.parent
sys.path.append(str(TESTS))
STEPS = (1, 2)
FORWARD = torch.bfloat16


class Job:
    """What every loop has: the model, a step of training that leaves a checkpoint, and where the daemon is."""

    def __init__(self) -> None:
        arguments = argparse.ArgumentParser()
        for name in ("hub-url", "token-file", "run-id", "run-dir", "model-config", "checkpoints", "device"):
            arguments.add_argument(f"--{name}", required=True)
        given = arguments.parse_args()
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if self.world > 1:
            dist.init_process_group("gloo")
        self.daemon = {
            "hub_url": given.hub_url, "token_file": given.token_file, "run_id": given.run_id,
            "run_dir": given.run_dir, "forward_dtype": "bfloat16", "publish_seconds": 120.0,
        }  # fmt: skip
        folder = Path(given.model_config).parent
        self.model, self._blank = build_model(folder, len(os.environ["ADAPTER"]), FORWARD)
        shard(self.model, self.world, FORWARD)
        tokens = training_tokens(self.model, None, 0, self.rank, self.world)
        self._trainer = DemoTrainer(self.model, FORWARD, tokens, 1e-2)
        self._checkpoints = Path(given.checkpoints) / os.environ["ADAPTER"]

    def train(self, step: int) -> None:
        self._trainer.step()
        save_checkpoint(self.model, self._blank, FORWARD, self._checkpoints / f"step_{step}", self.rank)

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As TRL's ``_streaming_iter`` and verl's ``get_per_tensor_param``."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()

    def say(self, step: int) -> None:
        if self.rank == 0:
            print(json.dumps({"published": step}), flush=True)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def trl(job: Job) -> None:
    """``AsyncGRPOTrainer._sync_weight_merged``."""
    from weightsync.agents.trainer.adapters.trl import WeightsyncTransfer

    transfer = WeightsyncTransfer(**job.daemon) if job.rank == 0 else None
    if transfer is not None:
        transfer.init_weight_transfer()
    for step in STEPS:
        job.train(step)
        if transfer is not None:
            transfer.pause()
        job.barrier()
        if transfer is not None:
            transfer.send_weights(job.gathered())
        else:
            for _ in job.gathered():
                pass
        job.barrier()
        if transfer is not None:
            transfer.resume()
        job.say(step)
    if transfer is not None:
        transfer.destroy()


def verl(job: Job) -> None:
    """An actor's ``update_weights`` on every rank; on rank 0 as the driver's manager has it done."""
    sys.path.append(str(TESTS / "verl_0_9_1"))
    from verl.checkpoint_engine.base import CheckpointEngineRegistry
    from weightsync.agents.trainer.adapters import verl as adapter

    engine = CheckpointEngineRegistry.new("weightsync", is_master=job.rank == 0, bucket_size=2**31, **job.daemon)

    actor = ThreadPoolExecutor(1)  # in the place of Ray's actor, which has an event loop of its own

    def update_weights(global_steps: int, mode: str) -> list["Future[Any]"]:
        assert mode == "weightsync"
        return [actor.submit(asyncio.run, engine.send_weights(job.gathered(), global_steps))]

    config = SimpleNamespace(backend="weightsync", custom_backend_module=adapter.__name__)
    manager = adapter.WeightsyncManager(config, SimpleNamespace(update_weights=update_weights), [])
    for step in STEPS:
        job.train(step)
        if job.rank == 0:
            assert manager.update_weights(step)["weightsync/sequence"] >= step
        else:
            assert update_weights(step, "weightsync")[0].result() == {}
        job.say(step)
    engine.finalize()


def vllm(job: Job, source: Any) -> None:
    """As vLLM's own examples: ``trainer_init`` once, ``send_weights`` for each version, on every rank."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from weightsync.agents.trainer.adapters.vllm import WeightsyncTrainerInitInfo

    engine = WeightTransferTrainerFactory.trainer_init(
        WeightsyncTrainerInitInfo(rank=job.rank, **job.daemon),
        client=HTTPVLLMWeightSyncClient("http://127.0.0.1:9"),
        source=source,
    )
    for step in STEPS:
        job.train(step)
        engine.send_weights()
        job.say(step)
    engine.shutdown()


def main() -> None:
    job = Job()
    match os.environ["ADAPTER"]:
        case "trl":
            trl(job)
        case "verl":
            verl(job)
        case "vllm 0.32":
            from vllm.distributed.weight_transfer.base import ModuleSource

            vllm(job, ModuleSource(job.model))
        case "vllm 0.33 pieces" | "vllm 0.33 whole" as name:
            from vllm_0_33_source import ModuleSource as Source

            vllm(job, Source(job.model, local=name.endswith("pieces")))
    if job.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
