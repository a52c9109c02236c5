"""What an ordinary vLLM answers with given checkpoints: the other side of every comparison bit for bit."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import preloaded
from serving import Answer, environment

IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
SECONDS = 300.0


def reference_answers(model: Path, checkpoints: Sequence[Path], shim: Path) -> list[list[Any]]:
    """For each checkpoint and each of DEFAULT_PROMPTS: the tokens and their log-probabilities.

    One process for all of them, which loads one after the other with vLLM's own loader; ``test_serving`` shows that its
    answers are those of a process that had started with that checkpoint. ``shim`` as in ``serving.environment``.
    """
    script = Path(__file__).with_name("offline.py")
    command = [sys.executable, str(script), str(model), *map(str, checkpoints)]
    said = preloaded.run("vllm", command, environment(shim, IN_ONE_PROCESS), SECONDS)
    found: list[list[Any]] = json.loads(said.splitlines()[-1])[1:]
    return found


def plain(said: Sequence[Answer]) -> list[Any]:
    """A server's answers in the form of ``reference_answers``."""
    return [[list(answer.tokens), list(answer.logprobs)] for answer in said]
