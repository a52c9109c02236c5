"""A trainer of models that are too large to draw on a CPU: bf16 masters made on its GPU, every eighth layer the same.

Takes the arguments of ``scripted_trainer.py``, and each line of its standard input, ``{"do": "publish", "step": n}``,
is one push of other values.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
from tiny_models import model_shapes
from weightsync.agents.trainer.agent import PublishError, TrainerAgent
from weightsync.agents.trainer.models import model_table

DIFFERENT_LAYERS = 8
LAYER = re.compile(r"(?<=model\.layers\.)\d+")


def masters(shapes: dict[str, tuple[int, ...]], device: str) -> dict[str, torch.Tensor]:
    """0.02·randn, norms of ones."""
    generator = torch.Generator(device).manual_seed(1)
    drawn: dict[str, torch.Tensor] = {}
    state = {}
    for name, shape in shapes.items():
        key = LAYER.sub(lambda found: str(int(found[0]) % DIFFERENT_LAYERS), name)
        if key not in drawn:
            noise = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            drawn[key] = 0.02 * noise if len(shape) > 1 else torch.ones_like(noise)
        state[name] = drawn[key]
    return state


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("hub-url", "token-file", "run-id", "run-dir", "model-config", "checkpoints", "device"):
        arguments.add_argument(f"--{name}", required=True)
    given = arguments.parse_args()
    config = json.loads(Path(given.model_config).read_text())
    state = masters(model_shapes(config), given.device)
    different = {tensor.data_ptr(): tensor for tensor in state.values() if tensor.ndim > 1}
    agent = TrainerAgent(
        lambda: state, model_table(config), hub_url=given.hub_url, token_file=given.token_file, run_id=given.run_id,
        run_dir=given.run_dir,
    )  # fmt: skip
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        step = json.loads(line)["step"]
        for tensor in different.values():
            tensor.neg_()
        torch.get_device_module(given.device).synchronize()
        began = time.monotonic()
        try:
            said = {"sequence": agent.publish(step)}
        except PublishError as error:
            said = {"error": str(error)}
        print(json.dumps({"step": step, "seconds": time.monotonic() - began} | said), flush=True)
    agent.close()


if __name__ == "__main__":
    main()
