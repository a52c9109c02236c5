"""The trainer of a SLURM job: publishes, kills the vLLM, publishes, kills the daemon, publishes, and asks the vLLM."""

import json
import os
import signal
from pathlib import Path

import serving
from reference import plain
from transformers import AutoModelForCausalLM
from weightsync.agents.trainer.agent import TrainerAgent


def kill(*words: str) -> None:
    """SIGKILL for the one process that has these words as arguments."""
    wanted = {word.encode() for word in words}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        found += [int(process.name)] if wanted <= set(arguments) else []
    (one,) = found
    os.kill(one, signal.SIGKILL)


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(os.environ["TRAINED"])
    with TrainerAgent(model) as agent:
        agent.publish(0)
        kill("serve", "--weight-transfer-config")
        agent.publish(1)
        kill("run", "--config")
        agent.publish(2)
    serving.HOST = "n1"  # the server is not on this node
    server = serving.VllmServer(Path(os.environ["MODEL"]), port=int(os.environ["ENGINE_PORT"]))
    Path(os.environ["ANSWERS"]).write_text(json.dumps(plain(serving.answers(server))))


if __name__ == "__main__":
    main()
