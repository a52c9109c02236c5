"""Copies of one tensor on several ranks, compared before a version is announced.

Engines are sent whichever copy has the least to do, a part of one and a part of another. Where copies differ (a buffer
that nobody reduces, norms of tensor parallelism without their gradients' sum, replicas that have drifted apart) engines
would serve a mixture that no checkpoint has, and every digest would be right.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from weightsync.agents.tables.runs import digest_table
from weightsync.agents.trainer.slots.slot import Slot
from weightsync.kernels.digest import PreparedDigest, digest, prepare
from weightsync.orchestrator.protocol.layout import ROW_BOX, ROW_TENSOR, Layout, Matrix

MAX_GROUPS: Final = 30
"""That are told of; there is one for each way in which a mesh copies, and all must fit into one text of a rank."""

NAME_DIGITS: Final = 16


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that the same other ranks have, too: ``name`` is theirs, as it comes from tensors and boxes alone."""

    name: str
    rows: Matrix
    digest: PreparedDigest


class Copies:
    """What this rank holds that others hold as well.

    Args:
        slots: bound and laid out.
        layout: theirs.
        arenas: of its regions.
    """

    def __init__(self, slots: Sequence[Slot], layout: Layout, arenas: Sequence[torch.Tensor]) -> None:
        self._layout, self._arenas = layout, arenas
        kinds: dict[object, list[int]] = {}
        for slot in slots:
            kind = _kind(slot)
            if kind is not None and slot.rows:
                kinds.setdefault(kind, []).extend(slot.rows)
        self._groups = [self._group(numbers) for numbers in list(kinds.values())[:MAX_GROUPS]]

    def said(self) -> str:
        """Each group and the digest of what its slots hold now, for ``differing``. Waits for the device."""
        for group in self._groups:
            group.digest.launch()
        results = ((group.name, group.digest.result()) for group in self._groups)
        return " ".join(f"{name}:{first:x}.{second:x}" for name, (first, second) in results)

    def each(self, group: str) -> bytes:
        """The digest of each tensor of a group, as JSON; of none if this rank has no such group."""
        found: dict[str, list[str]] = {}
        for rows in (own.rows for own in self._groups if own.name == group):
            for number in np.unique(rows[:, ROW_TENSOR]).tolist():
                table = digest_table(rows[rows[:, ROW_TENSOR] == number], self._layout)
                found[self._layout.tensors[number].name] = [f"{each:x}" for each in digest(self._arenas, table)]
        return json.dumps(found).encode()

    def _group(self, numbers: Sequence[int]) -> _Group:
        rows = self._layout.matrix()[np.array(numbers, np.int64)]
        held = hashlib.sha256(np.ascontiguousarray(rows[:, ROW_BOX::3]).tobytes())
        held.update(np.ascontiguousarray(rows[:, ROW_BOX + 1 :: 3]).tobytes())
        tensors = (self._layout.tensors[number] for number in rows[:, ROW_TENSOR].tolist())
        held.update("\n".join(f"{t.name} {t.dtype} {t.shape}" for t in tensors).encode())
        return _Group(held.hexdigest()[:NAME_DIGITS], rows, prepare(self._arenas, digest_table(rows, self._layout)))


def differing(said: Sequence[str]) -> tuple[int, int, str] | None:
    """The first two ranks that hold other values in one group, and its name, from what every rank has ``said``."""
    first: dict[str, tuple[int, str]] = {}
    for rank, text in enumerate(said):
        for word in text.split():
            group, _, sums = word.partition(":")
            holder, known = first.setdefault(group, (rank, sums))
            if sums != known:
                return holder, rank, group
    return None


def unlike(own: bytes, theirs: bytes) -> list[str]:
    """Names of tensors of which two ranks say (see ``each``) different things, or one nothing; sorted."""
    mine, other = json.loads(own), json.loads(theirs)
    return sorted(name for name in {**mine, **other} if mine.get(name) != other.get(name))


def _kind(slot: Slot) -> object | None:
    """Ranks that copy a slot of one kind copy all of that kind; None for what no other rank has."""
    if slot.kind == "gathered":
        return None  # one owner has it
    copied: list[object] = []
    for share in slot.shares:
        grid = share.grid
        if grid is None:
            copied.append(None)
            continue
        along = tuple(dim for dim in share.replicated_dims if grid.shape[dim] > 1)
        if not along:
            return None
        copied.append((grid.shape, grid.ranks, along))
    # Plain experts are this rank's own ones beside tensors that every rank has.
    return (slot.kind == "expert" or slot.spec.expert_id is not None, *dict.fromkeys(copied))
