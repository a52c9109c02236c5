"""What is around a trainer rank: where it sends from, and for the first rank the run directory that it marks."""

from collections.abc import Iterator
from pathlib import Path

import torch
from weightsync.agents.environment.directory import run_directory
from weightsync.agents.environment.preflight import preflight
from weightsync.agents.link.examination import Look
from weightsync.agents.transport.interface import SourceMemory
from weightsync.orchestrator.protocol.findings import Finding, examined
from weightsync.orchestrator.protocol.messages import TransportSettings


def trainer_look(memory: SourceMemory | None, marks: Path | None) -> Look:
    """A look at what is around this process. ``memory``: that it sends from, None: it is not known yet, and will be on
    the current device; ``marks``: the run directory, where this rank puts markers. On the trainer's own thread."""
    device = _cuda_device(memory)

    def look(transport: TransportSettings) -> Iterator[Finding]:
        yield from preflight("trainer", device, transport)
        if marks is not None:
            yield from examined("run directory", lambda: run_directory(marks))

    return look


def _cuda_device(memory: SourceMemory | None) -> int | None:
    if memory is not None and memory.arenas:
        device = memory.arenas[0].device
        return device.index if device.type == "cuda" else None
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
