"""A trainer rank of the soak: publishes step after step, and says on its standard output what became of each.

As ``scripted_trainer``: an order is a JSON object on a line of standard input, here ``{"step": N}``.
"""

import argparse
import json
import sys
import time

import counts
import torch
from soak_model import masters
from tiny_fleet import CONFIG
from weightsync.agents.trainer.agent import PublishError, TrainerAgent
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots.slots import SlotOptions

PUBLISH_SECONDS = 120.0


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name in ("hub-url", "token-file", "run-id", "run-dir"):
        arguments.add_argument(f"--{name}", required=True)
    given, _ = arguments.parse_known_args()
    counts.install()
    torch.set_num_threads(1)
    state = masters(0)
    with TrainerAgent(
        lambda: state, model_table(CONFIG), hub_url=given.hub_url, token_file=given.token_file, run_id=given.run_id,
        run_dir=given.run_dir, options=SlotOptions(staging_bytes=1 << 16), publish_seconds=PUBLISH_SECONDS,
    ) as agent:  # fmt: skip
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            step = json.loads(line)["step"]
            state = masters(step)
            began = time.monotonic()
            try:
                said: dict[str, object] = {"sequence": agent.publish(step)}
            except PublishError as error:
                said = {"error": str(error)}
            print(json.dumps({"step": step, "seconds": time.monotonic() - began, **said}), flush=True)


if __name__ == "__main__":
    main()
