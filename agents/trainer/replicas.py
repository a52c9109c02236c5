"""What ranks tell each other around a publish. Texts and numbers travel as tensors: nothing here is pickled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, TypeGuard

import torch
import torch.distributed as dist
from weightsync.agents.trainer.errors import ReplicaFailed

ALONE: Final = "alone"
"""In the place of a group: one rank that has an agent by itself, whatever job it is a part of."""

Group = dist.ProcessGroup | Literal["alone"] | None
"""Who enters a collective together; None: all ranks of the default group, or nobody else without torch.distributed."""

TEXT_BYTES: Final = 1024
"""Of one rank's reason in UTF-8; longer ones are cut. They end in one line of a log."""


@contextmanager
def leave_together(group: Group = None) -> Iterator[None]:
    """A section that all ranks of ``group`` leave through one closing barrier, whether they succeed or fail.

    Without it a replica that does nothing in a publish (or fails early) would run ahead into the next collective of
    training, while the primary is still in this one. A rank's own error leaves as it is; the others raise.

    Collective: every rank of the group enters it. Alone, or without torch.distributed, it does nothing. It waits as
    long as the group's own timeout.

    Raises:
        ReplicaFailed: on ranks that succeeded, if another did not; with that rank and its reason.
    """
    trouble = ""
    try:
        yield
    except BaseException as error:
        trouble = f"{type(error).__name__}: {error}"
        raise
    finally:
        reasons = gather_texts(trouble, group)
        first = next((rank for rank, reason in enumerate(reasons) if reason), None)
        if first is not None and not trouble:
            raise ReplicaFailed(first, reasons[first])


def gather_texts(text: str, group: Group = None) -> list[str]:
    """Every rank's text, by rank within ``group``; cut to TEXT_BYTES. Collective."""
    if not _together(group):
        return [text]
    encoded = text.encode()[:TEXT_BYTES]
    mine = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
    mine[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else mine[:0]
    device = _device_of(group)
    everyone = [torch.zeros(TEXT_BYTES, dtype=torch.uint8, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine.to(device), group=group)
    return [bytes(each.cpu().numpy()).rstrip(b"\0").decode(errors="ignore") for each in everyone]


def agree_on(value: int, group: Group = None) -> int:
    """The number that the first rank of ``group`` gives, below 2^63. Collective."""
    if not _together(group):
        return value
    given = torch.tensor([value], dtype=torch.int64, device=_device_of(group))
    dist.broadcast(given, src=dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    return int(given.item())


def _together(group: Group) -> TypeGuard[dist.ProcessGroup | None]:
    return (
        not isinstance(group, str) and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
    )


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where collectives of ``group`` want their tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
