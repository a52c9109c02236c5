"""Trainer ranks as real gloo processes beside a real daemon, whose one engine does not exist."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from ports import HOST, free_port
from torch import multiprocessing
from weightsync.agents.trainer.agent import TrainerAgent
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots.slots import SlotOptions
from weightsync.orchestrator.settings.credentials import make_tokens

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
}  # fmt: skip
READY_SECONDS, RANKS_SECONDS = 20.0, 90.0


def shapes() -> dict[str, tuple[int, ...]]:
    """Of CONFIG's checkpoint."""
    layer = "model.layers.0."
    square = {f"{layer}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
    norms = (f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight")
    up = {f"{layer}mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
    ends = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16)}
    return square | up | ends | dict.fromkeys(norms, (16,)) | {f"{layer}mlp.down_proj.weight": (16, 24)}


def weights() -> dict[str, torch.Tensor]:
    """Full float32 masters, of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}


@dataclass(frozen=True)
class Run:
    """A daemon with its run directory; everything in it can be sent to another process."""

    directory: Path
    port: int

    @property
    def token(self) -> Path:
        return self.directory / "credentials" / "trainer.token"

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def environment(self) -> dict[str, str]:
        return {
            "WEIGHTSYNC_HUB_URL": f"ws://{HOST}:{self.port}/agents", "WEIGHTSYNC_TOKEN_FILE": str(self.token),
            "WEIGHTSYNC_RUN_ID": "doors", "WEIGHTSYNC_RUN_DIR": str(self.run_dir),
        }  # fmt: skip

    def agent(self, state: dict[str, torch.Tensor] | None = None, **others: Any) -> TrainerAgent:
        """A TrainerAgent of this process, by the environment."""
        os.environ.update(self.environment())
        state = weights() if state is None else state
        given: dict[str, Any] = {"options": SlotOptions(staging_bytes=0), "connect_seconds": 20.0, **others}
        return TrainerAgent(lambda: state, model_table(CONFIG), **given)


@contextlib.contextmanager
def daemon(directory: Path, **deadlines: float) -> Iterator[Run]:
    """A real daemon in a process of its own. Trainers are FAILED after ``join_seconds``, since no engine comes."""
    run = Run(directory, free_port())
    run.run_dir.mkdir(parents=True)
    make_tokens(run.token.parent)
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump({
        "run": {"id": "doors", "directory": str(run.run_dir)},
        "state_directory": str(directory / "state"),
        "listen": {"host": HOST, "port": run.port},
        "credentials": str(run.token.parent),
        "engines": [{"name": "nobody", "url": f"http://{HOST}:{free_port()}"}],
        "deadlines": {"probe_interval_seconds": 0.5, **deadlines},
        "rescan_seconds": 0.5,
    }))  # fmt: skip
    command = [sys.executable, "-m", "weightsync.orchestrator.cli.main", "run", "--config", str(config)]
    with (directory / "daemon.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _until_it_listens(run, child)
        yield run
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(20)


def _until_it_listens(run: Run, child: "subprocess.Popen[bytes]") -> None:
    ends = time.monotonic() + READY_SECONDS
    while time.monotonic() < ends:
        assert child.poll() is None, (run.directory / "daemon.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection((HOST, run.port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the daemon does not listen")


@dataclass(frozen=True)
class Said:
    """How one rank ended: what its body returned, or the name and text of what it raised; when, on one clock."""

    value: Any
    error: str
    text: str
    at: float


def in_processes(world: int, body: Callable[..., Any], *arguments: Any) -> list[Said]:
    """``body(rank, *arguments)`` in ``world`` processes that form a gloo group; how each ended, by rank."""
    # Forked from a process that has imported torch, without threads: a spawned rank would import it anew.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_ranks"])
    results, port = context.Queue(), free_port()
    children = [
        context.Process(target=_rank_main, args=(rank, world, port, results, body, arguments)) for rank in range(world)
    ]
    for child in children:
        child.start()
    try:
        found = dict(results.get(timeout=RANKS_SECONDS) for _ in range(world))
    finally:
        for child in children:
            child.join(10)
            child.kill()
    return [found[rank] for rank in range(world)]


def _rank_main(rank: int, world: int, port: int, results: Any, body: Callable[..., Any], arguments: Any) -> None:
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["UCX_TLS"] = "tcp,self,sm"
    try:
        dist.init_process_group("gloo")
        said = Said(body(rank, *arguments), "", "", time.monotonic())
    except BaseException as error:
        traceback.print_exc()
        said = Said(None, type(error).__name__, str(error), time.monotonic())
    results.put((rank, said))
    results.close()
    results.join_thread()
    if not dist.is_initialized():
        return
    # Whoever keeps the group's store ends last, as under a launcher.
    with contextlib.suppress(RuntimeError):
        dist.distributed_c10d._get_default_store().wait([f"gone/{r}" for r in range(1, world)]) if rank == 0 else (
            dist.distributed_c10d._get_default_store().set(f"gone/{rank}", "")
        )
