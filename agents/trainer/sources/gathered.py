"""What ranks gather together, said before they do: else one's bytes would be taken for another tensor's.

A collective knows sizes and no names. Ranks that disagree about a tensor's global shape (``DTensor.from_local`` of
uneven shards without ``shape``), about the order of tensors, or about what is gathered at all, would fill slots with
each other's tensors or with nothing, and every digest would be right.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

from weightsync.agents.trainer.errors import shown
from weightsync.agents.trainer.replicas import TrainerRanks
from weightsync.agents.trainer.slots.boxes import Grid
from weightsync.agents.trainer.slots.slot import Slot
from weightsync.agents.trainer.sources.copies import NAME_DIGITS, differing, unlike


class Gathered:
    """This rank's part in the gathering, for each mesh that it is in.

    Args:
        slots: all of the rank's, in their order.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._meshes: dict[str, dict[str, list[str]]] = {}
        for slot in slots:
            for share in slot.shares:
                if share.grid is None:
                    continue
                here = self._meshes.setdefault(_named(share.grid), {})
                if slot.kind == "gathered":
                    place, dtype = len(here), slot.spec.quantization.gather_dtype
                    about = f"{share.shape} {share.cuts} {slot.route.offsets} to {slot.route.owner} as {dtype}"
                    here.setdefault(slot.spec.dst, [str(place)]).append(about)

    def said(self) -> str:
        """Each mesh and what is gathered over it, for ``differing``."""
        return " ".join(f"{mesh}:{_hashed(json.dumps(tensors))}" for mesh, tensors in self._meshes.items())

    def each(self, mesh: str) -> bytes:
        """What is known of each tensor that is gathered over a mesh, as JSON; of none if it is not this rank's."""
        return json.dumps(self._meshes.get(mesh, {})).encode()


def disagreement(
    ranks: TrainerRanks, said: Sequence[str], each: Callable[[str], bytes], seconds: float
) -> tuple[int, int, str] | None:
    """Two ranks that have ``said`` different things of one group, and the names in ``each`` by which they differ.

    None if there are no such ranks; else collective.
    """
    found = differing(said)
    if found is None:
        return None
    one, other, group = found
    mine = each(group)
    names = unlike(mine, ranks.share(mine, one, seconds=seconds))
    return one, other, ranks.agree(shown(names), seconds=seconds)[other]


def _named(grid: Grid) -> str:
    return _hashed(f"{grid.shape} {grid.ranks}")


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]
