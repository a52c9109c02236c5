"""What a loader was fed, digested box by box, and whether it left just that in the model's memory.

A trace says where the boxes of a checkpoint tensor land; here the bytes of a real load prove it. Each tensor is
digested on its way to the loader, so that no second copy of the model is held; afterwards the places are, and both are
compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import torch
from weightsync.agents.recorder.chains import run
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.located import order_sensitive_digest
from weightsync.agents.recorder.trace import Landing

MAX_FAULTS: Final = 8
"""Differences that one error names; a wrong landing seldom comes alone."""

MADE_PERIOD: Final = 1_000_003
"""Made values repeat after so many elements: a prime, so that no row of a tensor is like another one."""


class Ledger:
    """Digests of the boxes that a load is to bring, taken while it does."""

    def __init__(self, landings: Iterable[Landing], device: torch.device) -> None:
        """``device``: where the parameters are; boxes are digested there, as what they become."""
        self.device = device
        self._wanted: dict[str, list[Landing]] = defaultdict(list)
        for landing in landings:
            self._wanted[landing.source.name].append(landing)
        self._digests: dict[Landing, int] = {}
        self.seen: dict[str, Checkpoint] = {}
        self.sent: dict[Landing, torch.Tensor] = {}
        """What came for landings with a program, in the wire dtype, on the device."""

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights`` as they are, each digested before the loader gets (and perhaps changes) it."""
        for name, tensor in weights:
            self.seen[name] = Checkpoint(name, tuple(tensor.shape), tensor.dtype)
            for landing in self._wanted.get(name, ()):
                if landing.source == self.seen[name]:
                    self._enter(landing, tensor)
            yield name, tensor

    def _enter(self, landing: Landing, tensor: torch.Tensor) -> None:
        box = tensor.detach()[tuple(slice(c, c + n) for c, n in zip(landing.corner, landing.place.sizes, strict=True))]
        box = box.to(self.device).to(landing.dtype)
        if landing.program:
            self.sent[landing] = box.clone()
        with torch.no_grad():
            self._digests[landing] = order_sensitive_digest(run(landing.program, box))

    def unproved(self) -> list[str]:
        """Checkpoint tensors that did not come, or came with another shape or dtype than was traced."""
        return sorted(
            name for name, landings in self._wanted.items() if any(landing not in self._digests for landing in landings)
        )

    def differences(self, view: Callable[[Landing], tuple[str, torch.Tensor | None]]) -> list[str]:
        """Sentences about landings whose place does not hold what came for them.

        ``view`` gives the parameter's name and the place of a landing as a tensor, None where it is no more.
        """
        faults: list[str] = []
        for landing, digest in self._digests.items():
            name, live = view(landing)
            if live is None or order_sensitive_digest(live) != digest:
                box = f"{list(landing.corner)} + {list(landing.place.sizes)}"
                faults.append(f"{name} does not hold {landing.source.name} at {box} after loading it")
        return [*faults[:MAX_FAULTS], *([f"{len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else [])]


def stored_dtype(landing: Landing) -> torch.dtype:
    """The dtype of what a landing's bytes hold."""
    return landing.program[-1].stored if landing.program else landing.dtype


def made_values(checkpoint: Sequence[Checkpoint], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Values for a checkpoint that nobody has: by position, unlike from tensor to tensor, finite and above zero. On
    ``device``, where the parameters are: on a host, and from there to a GPU, 15 GB of them took a minute."""
    generator = torch.Generator().manual_seed(0)
    block = (torch.rand(MADE_PERIOD, generator=generator, device="cpu") + 0.5).to(device)
    blocks: dict[torch.dtype, torch.Tensor] = {}  # of tens of thousands of tensors, many have less than a block
    for index, entry in enumerate(checkpoint):
        if (numbers := blocks.get(entry.dtype)) is None:
            scaled = block if entry.dtype.is_floating_point else block * (2 if entry.dtype == torch.bool else 80)
            numbers = blocks[entry.dtype] = scaled.to(entry.dtype)
        size = torch.Size(entry.shape).numel()
        start = (index * 7919) % MADE_PERIOD  # a prime step: the same numbers, begun elsewhere
        turns = -(-(start + size) // MADE_PERIOD)
        made = numbers[start : start + size].clone() if turns <= 1 else numbers.repeat(turns)[start : start + size]
        yield entry.name, made.reshape(entry.shape)
