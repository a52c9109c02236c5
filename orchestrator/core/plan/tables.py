"""Copy tables as they travel: each member's own, from the units' columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.core.plan.arrays import Ids, Ints
from weightsync.orchestrator.core.plan.inputs import Party
from weightsync.orchestrator.core.plan.unit import Unit
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


@dataclass(frozen=True, slots=True)
class Slice:
    """Transfers ``[start, end)`` of a unit."""

    unit: Unit
    start: int
    end: int


def source_table(number: int, slices: Sequence[Slice]) -> tuple[tuple[Party, ...], Ints, Ids]:
    """The peers of source ``number``, sorted; its writes by group, then peer, then place at the peer; and the row of
    the peer's layout that each write is meant for.

    Each source begins a group with another peer, so that they do not all fall on the same one.
    """
    parties = [s.unit.targets[t] for s in slices for t in np.unique(s.unit.target[s.start : s.end]).tolist()]
    peers = tuple(sorted(parties, key=lambda party: party.member))
    position = {party.member: i for i, party in enumerate(peers)}
    table = np.empty((sum(s.end - s.start for s in slices), COPY_COLUMNS), np.int64)
    meant = np.concatenate([np.zeros(0, np.int32), *(s.unit.target_row[s.start : s.end] for s in slices)])
    at = 0
    for piece in slices:
        part = table[at : at + piece.end - piece.start]
        _fill_writes(part, piece, np.array([position.get(p.member, -1) for p in piece.unit.targets], np.int64))
        at += len(part)
    turn = (table[:, COPY_PEER] - number) % max(1, len(peers))
    order = np.argsort(table[:, COPY_GROUP] * max(1, len(peers)) + turn, kind="stable")
    return peers, table[order], meant[order]


def _fill_writes(table: Ints, piece: Slice, position: Ints) -> None:
    unit, rows = piece.unit, slice(piece.start, piece.end)
    shape, target = unit.shape[rows], unit.target[rows]
    packed = unit.staged_source[rows] >= 0
    table[:, COPY_PEER] = position[target]
    table[:, COPY_ROW] = unit.source_row[rows]
    table[:, COPY_GROUP] = unit.group[rows]
    table[:, COPY_STAGED] = unit.staged_source[rows]
    _fill_boxes(table, unit, shape)
    staging = np.array([party.layout.staging for party in unit.targets], np.int64)
    table[:, COPY_REMOTE] = np.where(packed, staging[target], unit.region[rows])
    table[:, COPY_REMOTE + 1] = np.where(packed, unit.staged_target[rows], unit.offset[rows])
    table[:, COPY_REMOTE + 2 :] = unit.shapes.stride[shape]
    table[packed, COPY_REMOTE + 2 :] = 0


def _fill_boxes(table: Ints, unit: Unit, shape: Ids) -> None:
    table[:, COPY_BOX : COPY_BOX + 2 * MAX_RANK : 2] = unit.shapes.offset[shape]
    table[:, COPY_BOX + 1 : COPY_BOX + 2 * MAX_RANK : 2] = unit.shapes.extent[shape]


def target_tables(unit: Unit, sources: Sequence[Party]) -> list[tuple[tuple[Party, ...], Ints]]:
    """Per target of the unit: all sources that write to it, sorted, and what arrives packed, by group and place."""
    tables = []
    by_target = np.argsort(unit.target, kind="stable")
    limits = np.searchsorted(unit.target[by_target], np.arange(len(unit.targets) + 1))
    for start, end in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True):
        mine = by_target[start:end]
        peers = tuple(sorted((sources[i] for i in np.unique(unit.source[mine]).tolist()), key=lambda p: p.member))
        position = {party.member: i for i, party in enumerate(peers)}
        of_source = np.array([position.get(party.member, -1) for party in sources], np.int64)
        mine = mine[unit.staged_target[mine] >= 0]
        mine = mine[np.lexsort((unit.staged_target[mine], unit.group[mine]))]
        table = np.zeros((len(mine), COPY_COLUMNS), np.int64)
        table[:, COPY_PEER] = of_source[unit.source[mine]]
        table[:, COPY_ROW] = unit.target_row[mine]
        table[:, COPY_GROUP] = unit.group[mine]
        table[:, COPY_STAGED] = unit.staged_target[mine]
        _fill_boxes(table, unit, unit.shape[mine])
        tables.append((peers, table))
    return tables
