"""The transfers of a whole plan in columns, from which explanations and simulations are summed up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.arrays import Flags, Ids, Ints, starts
from weightsync.orchestrator.planner.decode import Decoded
from weightsync.orchestrator.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class Transfers:
    """All engines' transfers, one engine after the other, in columns ``[n]``.

    ``source`` indexes the plan's sources and ``target`` the ``targets``, which are those of all engines in turn;
    ``tensor`` indexes the decoder's names and ``source_row`` the rows of the source's layout. ``size`` is in bytes,
    ``runs`` counts its descriptors if it is not packed, ``lands`` says whether it goes by way of the landing;
    ``descriptors`` what it adds to what its source posts (0 where it shares one).
    """

    targets: tuple[Decoded, ...]
    source: Ints
    target: Ints
    tensor: Ints
    source_row: Ints
    group: Ints
    size: Ints
    runs: Ints
    lands: Flags
    packed: Flags
    descriptors: Ints


def transfers_of(plan: Plan) -> Transfers:
    """The transfers of all engines of ``plan``."""
    engines = plan.engines
    first = starts(np.array([len(engine.targets) for engine in engines], np.int64))
    return Transfers(
        targets=tuple(target for engine in engines for target in engine.targets),
        source=_joined([e.source for e in engines]),
        target=_joined([e.target + first[i] for i, e in enumerate(engines)]),
        tensor=_joined([e.tensor for e in engines]),
        source_row=_joined([e.source_row for e in engines]),
        group=_joined([e.group for e in engines]),
        size=_joined([e.shapes.bytes[e.shape] for e in engines]),
        runs=_joined([e.runs for e in engines]),
        lands=_joined([e.place for e in engines]) >= 0,
        packed=_joined([e.packed for e in engines]).astype(np.bool_),
        descriptors=_joined([e.descriptors() for e in engines]),
    )


def _joined(columns: Sequence[Ints | Ids | Flags]) -> Ints:
    # A plan without engines has no columns at all, which concatenate() refuses.
    return np.concatenate([np.zeros(0, np.int64), *columns])
