"""How an agent introduces itself: who it is, where its process runs, what it obeyed, what its memory holds."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightsync.agents.link.obedience import Obedience
from weightsync.orchestrator.protocol.limits import MAX_NAME_CHARS, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import EngineStatus, Hello, TrainerStatus
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.release import release

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
"""Drawn by the Linux kernel at each of its starts (random(4)), and the same in all containers of a host."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this agent is. ``generation`` is 0 for inference ranks."""

    run_id: str
    member: Member
    world: int
    generation: int = 0


def hello(identity: Identity, obedience: Obedience, status: TrainerStatus | EngineStatus) -> Hello:
    """The first frame of a connection."""
    return Hello(
        schema=SCHEMA_VERSION,
        run_id=identity.run_id,
        member=identity.member,
        world=identity.world,
        incarnation=obedience.incarnation,
        generation=identity.generation,
        epoch_seen=obedience.epoch,
        journal_id=obedience.journal_id,
        life_seen=obedience.life,
        host=socket.gethostname(),
        boot=boot(),
        pid=os.getpid(),
        release=release()[:MAX_NAME_CHARS],
        trainer=status if isinstance(status, TrainerStatus) else None,
        engine=status if isinstance(status, EngineStatus) else None,
    )


def boot(path: Path = BOOT_ID) -> str:
    """Name of this start of the host; empty where nobody tells it."""
    try:
        return path.read_text().strip()[:MAX_NAME_CHARS]
    except (OSError, UnicodeDecodeError):
        return ""
