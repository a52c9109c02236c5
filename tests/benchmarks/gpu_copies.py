"""How fast bytes are copied between the GPUs of this host, and within one: what wires over NVLink are measured by."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

COPY_BYTES, COPIES = 1 << 30, 20


def measured(pairs: Sequence[tuple[int, int]]) -> float:
    """GB/s of the slowest of these pairs of GPUs (from, to), all at once; in a process of its own, whose memory and
    contexts are gone afterwards."""
    script = f"from gpu_copies import copy_rate; print(copy_rate({list(pairs)!r}))"
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=120)
    return float(done.stdout.split()[-1])


def copy_rate(pairs: Sequence[tuple[int, int]]) -> float:
    """GB/s of the slowest pair (from, to), all at once."""
    ends = []
    for source, target in pairs:
        here = torch.ones(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
        there = torch.empty_like(here, device=f"cuda:{target}")
        there.copy_(here)
        ends.append((here, there))
    _synchronise()
    began = time.monotonic()
    for _ in range(COPIES):
        for here, there in ends:
            there.copy_(here, non_blocking=True)
    _synchronise()
    return COPIES * COPY_BYTES / (time.monotonic() - began) / 1e9


def _synchronise() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
