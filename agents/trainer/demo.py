"""A reference trainer: trains a small Hugging Face model for real with FSDP2 and publishes versions as it goes.

    torchrun --nproc-per-node 2 -m weightsync.agents.trainer.demo --hub ws://127.0.0.1:8470/agents …

Masters are float32, the forward pass uses ``--forward-dtype``. The token set is fixed, so the loss goes down. Works
with any causal model that transformers and the conversion tables know; alone (without torchrun) it does not shard.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.agent import PublishError, TrainerAgent
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots import SlotOptions
from weightsync.agents.trainer.state import current_state

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BATCH, LENGTH = 4, 32
LEARNING_RATE: Final = 3e-3
"""Of a tiny model: a few steps change the tokens that an engine chooses. A wider one needs a lower rate."""

ALWAYS_FLOAT32: Final = ("e_score_correction_bias",)
"""What checkpoints of the known models store in float32 whatever their dtype."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank. Returns 0 if the last version was committed (or none was published), else 1."""
    options = _parser().parse_args(arguments)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo", init_method=options.rendezvous, rank=rank, world_size=world)
    try:
        return _run(options, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def _run(options: argparse.Namespace, rank: int, world: int) -> int:
    forward = DTYPES[options.forward_dtype]
    model, blank = build_model(options.model_config, options.seed, forward)
    shard(model, world, forward)
    agent = TrainerAgent(
        lambda: current_state(model),
        model_table(options.model_config, forward_dtype=forward),
        hub_url=options.hub,
        token_file=options.token_file,
        run_id=options.run_id,
        run_dir=options.run_dir,
        options=SlotOptions(min_sharded_bytes=options.min_sharded_bytes, staging_bytes=options.staging_bytes),
    )
    failed = False
    try:
        tokens = training_tokens(model, options.tokens, options.seed, rank, world)
        trainer = DemoTrainer(model, forward, tokens, options.learning_rate)
        for step in range(1, options.steps + 1):
            loss = trainer.step()
            _say(rank, f"step {step} loss {loss:.4f}")
            if step % options.publish_every:
                continue
            if options.save_checkpoints:
                save_checkpoint(model, blank, forward, options.save_checkpoints / f"step_{step}", rank)
            failed = not _publish(agent, step, rank)
        if options.stay:
            _wait_for_the_end(rank)
    finally:
        agent.close()
    return int(failed)


def build_model(folder: Path, seed: int, forward: torch.dtype) -> tuple[nn.Module, Any]:
    """The model of ``folder/config.json`` with float32 masters, the same on every rank, and an empty twin.

    The twin has the forward dtype and no storage; it knows how the model's tensors are named in a checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    config.architectures = json.loads((folder / "config.json").read_text())["architectures"]
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config, dtype=forward)
    return model, blank


def shard(model: nn.Module, world: int, forward: torch.dtype) -> None:
    """FSDP2 over all ranks, layer by layer; a single rank keeps plain tensors."""
    if world == 1:
        return
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=forward, reduce_dtype=torch.float32)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def training_tokens(model: nn.Module, file: Path | None, seed: int, rank: int, world: int) -> torch.Tensor:
    """This rank's rows, int64[rows, length]: every ``world``-th of ``file``'s (JSON, rows of one length), or random."""
    if file is not None:
        return torch.tensor(json.loads(file.read_text())[rank::world])
    generator = torch.Generator().manual_seed(seed + 1000 + rank)
    return torch.randint(0, int(model.config.vocab_size), (BATCH, LENGTH), generator=generator)  # type: ignore[union-attr,arg-type]


class DemoTrainer:
    """Next-token prediction on a fixed batch: ``tokens`` are this rank's rows of it."""

    def __init__(self, model: nn.Module, forward: torch.dtype, tokens: torch.Tensor, learning_rate: float) -> None:
        self._model = model
        self._forward = forward
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, foreach=False)
        self._tokens = tokens

    def step(self) -> float:
        """One optimiser step; the mean loss over all ranks before it."""
        alone = not dist.is_initialized()
        with torch.autocast("cpu", self._forward, enabled=alone and self._forward is not torch.float32):
            loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        mean = loss.detach().float()
        if not alone:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return float(mean)


def save_checkpoint(model: nn.Module, blank: Any, forward: torch.dtype, folder: Path, rank: int) -> None:
    """What the trainer's forward pass uses, as an ordinary Hugging Face checkpoint from rank 0. Collective."""
    whole = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            whole[name] = full if name.endswith(ALWAYS_FLOAT32) else full.to(forward)
    if rank == 0:
        blank.save_pretrained(folder, state_dict=whole)


def _publish(agent: TrainerAgent, step: int, rank: int) -> bool:
    try:
        sequence = agent.publish(step)
    except PublishError as error:
        _say(rank, f"step {step} was not published: {error}")
        return False
    _say(rank, f"step {step} serves as commit {sequence}")
    return True


def _wait_for_the_end(rank: int) -> None:
    """Keep the slots for engines that join or come back, until SIGTERM or SIGINT."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    _say(rank, "trained; the slots stay for late engines")
    ended.wait()


def _say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightsync.agents.trainer.demo", description=__doc__)
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, help="directory of the run, with broadcasts/")
    add("--run-id", required=True)
    add("--hub", required=True, metavar="URL", help="ws://HOST:PORT/agents of the daemon")
    add("--token-file", type=Path, required=True)
    add("--model-config", type=Path, required=True, metavar="DIR", help="directory with a Hugging Face config.json")
    add("--rendezvous", default="env://", metavar="URL", help="of the ranks among themselves (default: env://)")
    add("--steps", type=int, default=5)
    add("--publish-every", type=int, default=1, metavar="STEPS")
    add("--tokens", type=Path, metavar="PATH", help="JSON file with rows of token ids to train on (default: random)")
    add("--learning-rate", type=float, default=LEARNING_RATE)
    add("--save-checkpoints", type=Path, metavar="DIR", help="save each published version as a checkpoint below DIR")
    add("--forward-dtype", choices=sorted(DTYPES), default="bfloat16")
    add("--min-sharded-bytes", type=int, default=SlotOptions().min_sharded_bytes)
    add("--staging-bytes", type=int)
    add("--seed", type=int, default=0)
    add("--stay", action="store_true", help="after the last step, keep serving the slots until SIGTERM")
    return parser


if __name__ == "__main__":
    sys.exit(main())
