"""Copy tables as they travel: each member's own, from the units' columns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.arrays import Ids, Ints, stable_order, starts
from weightsync.orchestrator.planner.decode import Decoded
from weightsync.orchestrator.planner.engine_part import MAX_GROUPS, Unit
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_COLUMNS,
    COPY_GROUP,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK

NOTHING: Ids = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Told:
    """What a member is told; for a source's writes also the row of the peer's layout that each is meant for."""

    member: Decoded
    peers: tuple[Decoded, ...]
    table: Ints
    meant: Ids


class Tables:
    """Makes the table of every member of a plan."""

    def __init__(self, sources: Sequence[Decoded], units: Sequence[Unit]) -> None:
        self._sources = sources
        self._units = units
        self._of_source = [unit.of_source(len(sources)).tolist() for unit in units]
        self._first_shape = starts(np.array([len(unit.shapes.bytes) for unit in units], np.int64))
        self._source_rank = _ranks(sources)
        targets = [target for unit in units for target in unit.targets]
        first = starts(np.array([len(unit.targets) for unit in units], np.int64))
        self._targets, self._first_target, self._target_rank = targets, first, _ranks(targets)
        self._box = np.concatenate([np.zeros((0, 2 * MAX_RANK), np.int64), *(u.shapes.box for u in units)])
        self._stride = np.concatenate([np.zeros((0, MAX_RANK), np.int64), *(u.shapes.stride for u in units)])

    def of_source(self, number: int) -> Told:
        """The writes of the plan's source ``number`` by group, then peer, then place at the peer.

        Each source begins a group with another peer, so that they do not all fall on the same one.
        """
        mine = [(i, slice(of[number], of[number + 1])) for i, of in enumerate(self._of_source)]
        mine = [(i, rows) for i, rows in mine if rows.stop > rows.start]
        if not mine:
            return Told(self._sources[number], (), np.zeros((0, COPY_COLUMNS), np.int64), NOTHING)
        peers, peer = _peers(
            self._targets,
            self._target_rank,
            np.concatenate([self._units[i].target[rows] + self._first_target[i] for i, rows in mine]),
        )
        group = np.concatenate([self._units[i].group[rows] for i, rows in mine])
        order = stable_order(group * len(peers) + (peer - number) % len(peers), MAX_GROUPS * len(peers))
        shape = np.concatenate([self._units[i].shape[rows] + self._first_shape[i] for i, rows in mine])[order]

        def column(name: str) -> Ints:
            values: Ints = np.concatenate([getattr(self._units[i], name)[rows] for i, rows in mine])[order]
            return values

        peer = peer[order]
        staged = column("staged_source")
        packed = staged >= 0
        staging = np.array([p.party.layout.staging for p in peers], np.int64)
        table = np.empty((len(order), COPY_COLUMNS), np.int64)
        table[:, COPY_PEER] = peer
        table[:, COPY_ROW] = column("source_row")
        table[:, COPY_GROUP] = group[order]
        table[:, COPY_STAGED] = staged
        table[:, COPY_BOX:COPY_REMOTE] = self._box[shape]
        table[:, COPY_REMOTE] = np.where(packed, staging[peer], column("region"))
        table[:, COPY_REMOTE + 1] = np.where(packed, column("staged_target"), column("offset"))
        table[:, COPY_REMOTE + 2 :] = self._stride[shape]
        table[packed, COPY_REMOTE + 2 :] = 0
        return Told(self._sources[number], peers, table, column("target_row").astype(np.int32))

    def of_targets(self) -> Iterator[Told]:
        """Per target of every unit: the sources that write to it, and what arrives packed, by group and place."""
        for unit in self._units:
            by_target = stable_order(unit.target, len(unit.targets))
            limits = np.searchsorted(unit.target[by_target], np.arange(len(unit.targets) + 1, dtype=np.int32)).tolist()
            for number, target in enumerate(unit.targets):
                mine = by_target[limits[number] : limits[number + 1]]
                peers, peer = _peers(self._sources, self._source_rank, unit.source[mine])
                packed = unit.staged_target[mine] >= 0
                mine, peer = mine[packed], peer[packed]
                # Staging was given out in the order of sources, so that the unit's order is the place's.
                order = stable_order(unit.group[mine], MAX_GROUPS)
                mine, peer = mine[order], peer[order]
                table = np.zeros((len(mine), COPY_COLUMNS), np.int64)
                table[:, COPY_PEER] = peer
                table[:, COPY_ROW] = unit.target_row[mine]
                table[:, COPY_GROUP] = unit.group[mine]
                table[:, COPY_STAGED] = unit.staged_target[mine]
                table[:, COPY_BOX:COPY_REMOTE] = unit.shapes.box[unit.shape[mine]]
                yield Told(target, peers, table, NOTHING)


def _ranks(parties: Sequence[Decoded]) -> Ints:
    """The place of each party among all of them, sorted by member."""
    ranks = np.empty(len(parties), np.int64)
    ranks[sorted(range(len(parties)), key=lambda i: parties[i].party.member)] = np.arange(len(parties))
    return ranks


def _peers(parties: Sequence[Decoded], rank: Ints, used: Ids | Ints) -> tuple[tuple[Decoded, ...], Ints]:
    """Those of ``parties`` that ``used`` points to, sorted by member, and for each pointer the place among them."""
    present = np.flatnonzero(np.bincount(used, minlength=len(parties)))
    present = present[np.argsort(rank[present])]
    position = np.full(len(parties), -1, np.int64)
    position[present] = np.arange(len(present))
    return tuple(parties[i] for i in present.tolist()), position[used]
