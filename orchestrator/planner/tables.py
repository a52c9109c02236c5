"""Copy tables as they travel: each member's own, cut out of the columns of all engines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.arrays import Ids, Ints, stable_order, starts
from weightsync.orchestrator.planner.decode import Decoded
from weightsync.orchestrator.planner.engine_part import MAX_GROUPS, EnginePart
from weightsync.orchestrator.protocol.landing import Berth
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

NO_ROWS: Ids = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class MemberTable:
    """The table of one member of a plan.

    ``copies [n, COPY_COLUMNS]``: a source's writes, or what a target scatters from its landing; COPY_PEER indexes
    ``peers``. ``berths``: of the edges with them, None where nothing lands. ``target_row [n]``: of a source's writes,
    which row of the peer's layout each is meant for; the member is not told it, the proof checks it. Empty for targets.
    """

    member: Decoded
    peers: tuple[Decoded, ...]
    copies: Ints
    berths: tuple[Berth | None, ...]
    target_row: Ids


class Tables:
    """Makes the table of every member of a plan.

    Targets and shapes are numbered per engine; here the engines are laid end to end, so that an engine's own number
    plus the engine's first is a number of the whole plan.
    """

    def __init__(self, sources: Sequence[Decoded], engines: Sequence[EnginePart]) -> None:
        self._sources = sources
        self._source_rank = _ranks(sources)
        self._engines = engines
        self._of_source = [engine.of_source(len(sources)).tolist() for engine in engines]
        self._targets = [target for engine in engines for target in engine.targets]
        self._target_rank = _ranks(self._targets)
        self._first_target = starts(np.array([len(engine.targets) for engine in engines], np.int64))
        self._first_shape = starts(np.array([len(engine.shapes.bytes) for engine in engines], np.int64))
        self._box = np.concatenate([np.zeros((0, 2 * MAX_RANK), np.int64), *(e.shapes.box for e in engines)])
        self._stride = np.concatenate([np.zeros((0, MAX_RANK), np.int64), *(e.shapes.stride for e in engines)])
        self._dense = np.concatenate([np.zeros((0, MAX_RANK), np.int64), *(e.shapes.dense for e in engines)])
        self._berth = {
            (id(sources[engine.source[at]]), id(engine.targets[engine.target[at]])): berth
            for engine in engines
            for at, berth in zip(engine.edges()[:-1].tolist(), engine.berths, strict=True)
        }

    def of_source(self, number: int) -> MemberTable:
        """The writes of the plan's source ``number`` by group, then peer, then place at the peer.

        Each source begins a group with another peer, so that they do not all fall on the same one.
        """
        mine = [(i, slice(first[number], first[number + 1])) for i, first in enumerate(self._of_source)]
        mine = [(i, rows) for i, rows in mine if rows.stop > rows.start]
        if not mine:
            return MemberTable(self._sources[number], (), np.zeros((0, COPY_COLUMNS), np.int64), (), NO_ROWS)
        peers, peer = _peers(
            self._targets,
            self._target_rank,
            np.concatenate([self._engines[i].target[rows] + self._first_target[i] for i, rows in mine]),
        )
        group = np.concatenate([self._engines[i].group[rows] for i, rows in mine])
        # Source k puts peer k first and goes round from there. A stable sort keeps the order by place within a peer.
        turn = (peer - number) % len(peers)
        order = stable_order(group * len(peers) + turn, MAX_GROUPS * len(peers))
        shape = np.concatenate([self._engines[i].shape[rows] + self._first_shape[i] for i, rows in mine])[order]

        def column(name: str) -> Ints:
            values: Ints = np.concatenate([getattr(self._engines[i], name)[rows] for i, rows in mine])[order]
            return values

        peer = peer[order]
        place, packed = column("place"), column("packed")
        lands = place >= 0
        staging = np.array([p.party.layout.staging for p in peers], np.int64)
        copies = np.empty((len(order), COPY_COLUMNS), np.int64)
        copies[:, COPY_PEER] = peer
        copies[:, COPY_ROW] = column("source_row")
        copies[:, COPY_GROUP] = group[order]
        copies[:, COPY_STAGED] = np.where(packed, place, -1)
        copies[:, COPY_BOX:COPY_REMOTE] = self._box[shape]
        # COPY_REMOTE holds region, offset and strides at the target; cargo lies densely.
        copies[:, COPY_REMOTE] = np.where(lands, staging[peer], column("region"))
        copies[:, COPY_REMOTE + 1] = np.where(lands, place, column("offset"))
        copies[:, COPY_REMOTE + 2 :] = np.where(lands[:, None], self._dense[shape], self._stride[shape])
        berths = tuple(self._berth.get((id(self._sources[number]), id(target))) for target in peers)
        return MemberTable(self._sources[number], peers, copies, berths, column("target_row").astype(np.int32))

    def of_targets(self) -> Iterator[MemberTable]:
        """Per target of every engine: the sources that write to it, and what lands, by group and place."""
        for engine in self._engines:
            by_target = stable_order(engine.target, len(engine.targets))
            limits = np.searchsorted(engine.target[by_target], np.arange(len(engine.targets) + 1, dtype=np.int32))
            for number, target in enumerate(engine.targets):
                mine = by_target[limits[number] : limits[number + 1]]
                # Peers are all that write to the target, but only what lands must be scattered.
                peers, peer = _peers(self._sources, self._source_rank, engine.source[mine])
                lands = engine.place[mine] >= 0
                mine, peer = mine[lands], peer[lands]
                order = stable_order(engine.group[mine], MAX_GROUPS)
                mine, peer = mine[order], peer[order]
                copies = np.zeros((len(mine), COPY_COLUMNS), np.int64)
                copies[:, COPY_PEER] = peer
                copies[:, COPY_ROW] = engine.target_row[mine]
                copies[:, COPY_GROUP] = engine.group[mine]
                copies[:, COPY_STAGED] = engine.place[mine]
                copies[:, COPY_BOX:COPY_REMOTE] = engine.shapes.box[engine.shape[mine]]
                berths = tuple(self._berth.get((id(source), id(target))) for source in peers)
                yield MemberTable(target, peers, copies, berths, NO_ROWS)


def _ranks(parties: Sequence[Decoded]) -> Ints:
    """The place of each party among all of them, sorted by member ``[len(parties)]``."""
    ranks = np.empty(len(parties), np.int64)
    ranks[sorted(range(len(parties)), key=lambda i: parties[i].party.member)] = np.arange(len(parties))
    return ranks


def _peers(parties: Sequence[Decoded], rank: Ints, used: Ids | Ints) -> tuple[tuple[Decoded, ...], Ints]:
    """Those of ``parties`` that ``used [n]`` points to, sorted by member, and the place of each among them ``[n]``."""
    present = np.flatnonzero(np.bincount(used, minlength=len(parties)))
    present = present[np.argsort(rank[present])]
    position = np.full(len(parties), -1, np.int64)
    position[present] = np.arange(len(present))
    return tuple(parties[i] for i in present.tolist()), position[used]
