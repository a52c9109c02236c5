"""From layouts to a plan: every member's table, proved, fingerprinted, and kept for whoever joins later."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.catalogue import Catalogue, make_catalogue
from weightsync.orchestrator.planner.engine_part import EnginePart, plan_engine
from weightsync.orchestrator.planner.errors import PlanError
from weightsync.orchestrator.planner.fingerprint import part_fingerprint, root_fingerprint
from weightsync.orchestrator.planner.inputs import CostModel, Party
from weightsync.orchestrator.planner.proof import Proof
from weightsync.orchestrator.planner.tables import MemberTable, Tables
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.names import Member


@dataclass(frozen=True, slots=True)
class PlanPart:
    """What one member is told.

    ``copies``: int64 ``[n, COPY_COLUMNS]`` in bytes; a source's writes, or what a target scatters from its landing.
    ``expected_bytes``: what a source writes, or what a target receives, packed or not. ``berths``: of the edges with
    the peers, None where nothing lands.
    """

    peers: tuple[Member, ...]
    copies: bytes
    fingerprint: str
    expected_bytes: int
    berths: tuple[Berth | None, ...]


@dataclass(frozen=True, slots=True)
class Sends:
    """What one source sends in all."""

    bytes: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All writes of all members.

    ``root`` is the fingerprint of the whole; ``parts`` what each member is told; ``flows`` the bytes from source to
    target; ``unneeded`` the tensors that sources hold, in a slot or not, and no engine needs. ``catalogue`` and
    ``engines`` are kept for the plan of whoever joins later.
    """

    root: str
    cost: CostModel
    catalogue: Catalogue
    engines: tuple[EnginePart, ...]
    parts: dict[Member, PlanPart]
    sends: dict[Member, Sends]
    flows: dict[tuple[Member, Member], int]
    unneeded: tuple[str, ...]

    def part(self, member: Member) -> PlanPart:
        """What ``member`` is told.

        Raises:
            KeyError: the member is not part of the plan.
        """
        return self.parts[member]

    @property
    def bytes(self) -> int:
        """Bytes that all sources send."""
        return sum(self.flows.values())


def make_plan(
    sources: Sequence[Party], targets: Sequence[Party], cost: CostModel | None = None, previous: Plan | None = None
) -> Plan:
    """Plan all transfers from ``sources`` to ``targets`` and prove that every destination byte is written exactly once.

    Deterministic. Engines are planned in the order in which ``targets`` first names them; an engine changes nothing of
    those before it. With ``previous`` (same sources and cost) engines that it contains keep their transfers as they are
    and the others are planned on top: a join touches its own edges only, and costs only what they cost.

    Raises:
        LayoutError: a layout contradicts itself.
        LandingTooSmall: an engine's landing does not take what must land there at once.
        ShapeMismatch, DtypeMismatch: two parties declare a tensor differently.
        CoverageError: a target needs what no source holds.
        TooComplex: sources overlap in too many ways.
        ProofFailed: a bug of the planner.
    """
    cost = cost or CostModel()
    if not sources:
        raise PlanError("a plan needs at least one source")
    parties = [p.member for p in (*sources, *targets)]
    if len(set(parties)) != len(parties):
        twice = next(m for i, m in enumerate(parties) if m in parties[:i])
        raise PlanError(f"{twice} is in the plan twice", twice)
    kept = _kept_engines(sources, targets, cost, previous)
    catalogue = previous.catalogue if previous and kept is not None else make_catalogue(sources)
    engines = _plan_engines(catalogue, targets, cost, kept or [])
    return _assemble(catalogue, engines, cost)


def _engines(targets: Sequence[Party]) -> list[tuple[Party, ...]]:
    """The ranks of each engine, engines in the order in which ``targets`` first names them."""
    engines: dict[str, list[Party]] = {}
    for party in targets:
        engines.setdefault(party.member.engine, []).append(party)
    return [tuple(ranks) for ranks in engines.values()]


def _kept_engines(
    sources: Sequence[Party], targets: Sequence[Party], cost: CostModel, previous: Plan | None
) -> list[EnginePart] | None:
    """Engines of ``previous`` whose ranks are the same; None where its sources or its costs are not."""
    if previous is None or previous.cost != cost or [s.party for s in previous.catalogue.sources] != list(sources):
        return None
    wanted = {ranks[0].member.engine: list(ranks) for ranks in _engines(targets)}
    return [e for e in previous.engines if wanted.get(e.name) == [t.party for t in e.targets]]


def _plan_engines(
    catalogue: Catalogue, targets: Sequence[Party], cost: CostModel, kept: Sequence[EnginePart]
) -> tuple[EnginePart, ...]:
    count = len(catalogue.sources)
    load = np.zeros(count, np.int64)
    engines = list(kept)
    for engine in kept:
        load += engine.load
    have = {engine.name for engine in kept}
    for ranks in _engines(targets):
        if ranks[0].member.engine not in have:
            engines.append(plan_engine(catalogue, ranks, cost, load))
            load = load + engines[-1].load
    return tuple(engines)


def _assemble(catalogue: Catalogue, engines: tuple[EnginePart, ...], cost: CostModel) -> Plan:
    """Make the tables, prove them, and fingerprint them."""
    tables = Tables(catalogue.sources, engines)
    flows = _flows(catalogue, engines)
    moved: dict[Member, int] = {}
    for (source, target), size in flows.items():
        moved[source] = moved.get(source, 0) + size
        moved[target] = moved.get(target, 0) + size
    targets = list(tables.of_targets())
    proof = Proof(targets, catalogue.decoder.form_table())
    parts: dict[Member, PlanPart] = {}
    # Sources' tables are large (144 bytes a write): each is dropped once it is proved and encoded.
    for number, decoded in enumerate(catalogue.sources):
        table = tables.of_source(number)
        proof.writes(table)
        parts[decoded.party.member] = _part(table, moved)
    proof.finish()
    parts.update((table.member.party.member, _part(table, moved)) for table in targets)
    root = root_fingerprint({member: part.fingerprint for member, part in parts.items()})
    return Plan(root, cost, catalogue, engines, parts, _sends(catalogue, engines), flows, _unneeded(catalogue, engines))


def _part(table: MemberTable, moved: dict[Member, int]) -> PlanPart:
    copies, expected = table.copies.tobytes(), moved.get(table.member.party.member, 0)
    peers = [peer.digest for peer in table.peers]
    fingerprint = part_fingerprint(table.member.digest, peers, table.berths, copies, expected)
    return PlanPart(tuple(peer.party.member for peer in table.peers), copies, fingerprint, expected, table.berths)


def _unneeded(catalogue: Catalogue, engines: Sequence[EnginePart]) -> tuple[str, ...]:
    """Names of tensors that some source holds, in a slot or not, and no engine needs."""
    needed = np.zeros(len(catalogue.decoder.names), np.bool_)
    for engine in engines:
        needed[engine.tensor] = True
    held = np.unique(catalogue.held.tensor)
    unneeded = [catalogue.decoder.names.tensors[i].name for i in held[~needed[held]].tolist()]
    unread = (name for source in catalogue.sources for name in source.party.layout.unread)
    return tuple(dict.fromkeys((*unneeded, *unread)))


def _flows(catalogue: Catalogue, engines: Sequence[EnginePart]) -> dict[tuple[Member, Member], int]:
    """Bytes of each (source, target) that have any."""
    flows = {}
    for engine in engines:
        edges = engine.edges()
        if len(engine.source):
            totals = np.add.reduceat(engine.shapes.bytes[engine.shape], edges[:-1]).tolist()
            for at, size in zip(edges[:-1].tolist(), totals, strict=True):
                source, target = catalogue.sources[engine.source[at]], engine.targets[engine.target[at]]
                flows[source.party.member, target.party.member] = size
    return flows


def _sends(catalogue: Catalogue, engines: Sequence[EnginePart]) -> dict[Member, Sends]:
    """What each source sends to all engines together."""
    count = len(catalogue.sources)
    size, descriptors = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for engine in engines:
        size += engine.load
        descriptors += np.bincount(engine.source, weights=engine.descriptors(), minlength=count).astype(np.int64)
    return {s.party.member: Sends(int(size[i]), int(descriptors[i])) for i, s in enumerate(catalogue.sources)}
