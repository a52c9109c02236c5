"""A trainer of a model and its drafter, without a table; told what to do as ``scripted_trainer``.

``DRAFT`` names the drafter's directory, whose tensors it has below ``draft.``; without one they are the model's own. It
lacks tensors with ``LACKS`` in their names, which then stay those of the model's directory.
The values of the model's and the drafter's tensors of one name are the same, so that a drafter that is the model's
beginning guesses well, and one of another version badly.
"""

import argparse
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripted_trainer import answer, told
from weightsync.agents.trainer.agent import PublishError, TrainerAgent

PREFIX = "draft."


def drawn(shapes: Mapping[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """fp32 weights of 0.15·randn, norms around 1, each by its name and the seed."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        state[name] = 0.15 * torch.randn(shape, generator=generator) + (len(shape) == 1)
    return state


def shapes_of(model: Path) -> dict[str, list[int]]:
    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in list(file.keys())}


def saved(like: Path, state: Mapping[str, torch.Tensor], directory: Path) -> None:
    """A model directory beside ``like`` with the bfloat16 of ``state``."""
    shutil.copytree(like, directory)
    save_file({name: value.to(torch.bfloat16) for name, value in state.items()}, directory / "model.safetensors")


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("hub-url", "token-file", "run-id", "run-dir", "model-config", "checkpoints", "device"):
        arguments.add_argument(f"--{name}", required=True)
    given = arguments.parse_args()
    model, checkpoints = Path(given.model_config).parent, Path(given.checkpoints)
    draft = Path(os.environ["DRAFT"]) if "DRAFT" in os.environ else None
    state: dict[str, torch.Tensor] = {}

    def take(step: int) -> None:
        own = drawn(shapes_of(model), step)
        kept = {name for name in own if "LACKS" in os.environ and os.environ["LACKS"] in name}
        drafted = {} if draft is None else drawn(shapes_of(draft), step)
        held = {name: value for name, value in own.items() if name not in kept}
        state.update(held | {PREFIX + name: value for name, value in drafted.items()})
        if step:
            first = load_file(model / "model.safetensors")
            saved(model, held | {name: first[name] for name in kept}, checkpoints / f"step_{step}")
        if step and draft is not None:
            saved(draft, drafted, checkpoints / f"draft_{step}")

    take(0)
    agent = TrainerAgent(
        lambda: state, hub_url=given.hub_url, token_file=given.token_file, run_id=given.run_id, run_dir=given.run_dir,
        publish_seconds=120.0,
    )  # fmt: skip
    answer(0, ready=True)
    while (order := told(0, 1))["do"] != "close":
        take(order["step"])
        began = time.monotonic()
        try:
            answer(0, sequence=agent.publish(order["step"]), seconds=time.monotonic() - began)
        except PublishError as error:
            answer(0, error=str(error))
    agent.close()


if __name__ == "__main__":
    main()
