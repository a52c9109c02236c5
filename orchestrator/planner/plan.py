"""From layouts to a plan: every member's table, proved, fingerprinted, and kept for whoever joins later."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.catalogue import Catalogue, make_catalogue
from weightsync.orchestrator.planner.engine_part import Unit, plan_unit
from weightsync.orchestrator.planner.errors import PlanError
from weightsync.orchestrator.planner.fingerprint import part_fingerprint, root_fingerprint
from weightsync.orchestrator.planner.inputs import CostModel, Party
from weightsync.orchestrator.planner.proof import Proof
from weightsync.orchestrator.planner.tables import Tables, Told
from weightsync.orchestrator.protocol.names import Member


@dataclass(frozen=True, slots=True)
class PlanPart:
    """What one member is told.

    ``copies``: int64 ``[n, COPY_COLUMNS]`` in bytes; a source's writes, or what a target must scatter from its staging.
    ``expected_bytes``: what a source writes, or what a target receives, packed or not.
    """

    peers: tuple[Member, ...]
    copies: bytes
    fingerprint: str
    expected_bytes: int


@dataclass(frozen=True, slots=True)
class Sends:
    """What one source sends in all."""

    bytes: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All writes of all members. ``root`` names it; ``unneeded`` are tensors that sources hold and nobody wants."""

    root: str
    cost: CostModel
    catalogue: Catalogue
    units: tuple[Unit, ...]
    parts: dict[Member, PlanPart]
    sends: dict[Member, Sends]
    flows: dict[tuple[Member, Member], int]
    """(source, target) → bytes."""
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
    kept = _kept_units(sources, targets, cost, previous)
    catalogue = previous.catalogue if previous and kept is not None else make_catalogue(sources)
    units = _plan_units(catalogue, targets, cost, kept or [])
    return _assemble(catalogue, units, cost)


def _engines(targets: Sequence[Party]) -> list[tuple[Party, ...]]:
    engines: dict[str, list[Party]] = {}
    for party in targets:
        engines.setdefault(party.member.engine, []).append(party)
    return [tuple(ranks) for ranks in engines.values()]


def _kept_units(
    sources: Sequence[Party], targets: Sequence[Party], cost: CostModel, previous: Plan | None
) -> list[Unit] | None:
    """Units of ``previous`` that still hold; None where its sources or costs do not."""
    if previous is None or previous.cost != cost or [s.party for s in previous.catalogue.sources] != list(sources):
        return None
    wanted = {ranks[0].member.engine: list(ranks) for ranks in _engines(targets)}
    return [u for u in previous.units if wanted.get(u.engine) == [t.party for t in u.targets]]


def _plan_units(
    catalogue: Catalogue, targets: Sequence[Party], cost: CostModel, kept: Sequence[Unit]
) -> tuple[Unit, ...]:
    count = len(catalogue.sources)
    load = np.zeros(count, np.int64)
    staging_used = np.zeros(count, np.int64)
    units = list(kept)
    for unit in kept:
        load += unit.load
        staging_used = np.maximum(staging_used, unit.staging_used)
    have = {unit.engine for unit in kept}
    for ranks in _engines(targets):
        if ranks[0].member.engine not in have:
            units.append(plan_unit(catalogue, ranks, cost, load, staging_used))
            load = load + units[-1].load
            staging_used = units[-1].staging_used
    return tuple(units)


def _assemble(catalogue: Catalogue, units: tuple[Unit, ...], cost: CostModel) -> Plan:
    """Tables, proof and fingerprints. Sources' tables are large: each is let go once it is proved and in bytes."""
    tables = Tables(catalogue.sources, units)
    flows = _flows(catalogue, units)
    moved: dict[Member, int] = {}
    for (source, target), size in flows.items():
        moved[source] = moved.get(source, 0) + size
        moved[target] = moved.get(target, 0) + size
    targets = list(tables.of_targets())
    proof = Proof(targets, catalogue.decoder.form_table())
    parts: dict[Member, PlanPart] = {}
    for number, decoded in enumerate(catalogue.sources):
        told = tables.of_source(number)
        proof.writes(told)
        parts[decoded.party.member] = _part(told, moved)
    proof.finish()
    parts.update((told.member.party.member, _part(told, moved)) for told in targets)
    root = root_fingerprint({member: part.fingerprint for member, part in parts.items()})
    return Plan(root, cost, catalogue, units, parts, _sends(catalogue, units), flows, _unneeded(catalogue, units))


def _part(told: Told, moved: dict[Member, int]) -> PlanPart:
    copies, expected = told.table.tobytes(), moved.get(told.member.party.member, 0)
    fingerprint = part_fingerprint(told.member.digest, [peer.digest for peer in told.peers], copies, expected)
    return PlanPart(tuple(peer.party.member for peer in told.peers), copies, fingerprint, expected)


def _unneeded(catalogue: Catalogue, units: Sequence[Unit]) -> tuple[str, ...]:
    needed = np.zeros(len(catalogue.decoder.names), np.bool_)
    for unit in units:
        needed[unit.tensor] = True
    held = np.unique(catalogue.held.tensor)
    return tuple(catalogue.decoder.names.tensors[i].name for i in held[~needed[held]].tolist())


def _flows(catalogue: Catalogue, units: Sequence[Unit]) -> dict[tuple[Member, Member], int]:
    flows = {}
    for unit in units:
        edges = unit.edges()
        if len(unit.source):
            totals = np.add.reduceat(unit.shapes.bytes[unit.shape], edges[:-1]).tolist()
            for at, size in zip(edges[:-1].tolist(), totals, strict=True):
                key = (catalogue.sources[unit.source[at]].party.member, unit.targets[unit.target[at]].party.member)
                flows[key] = size
    return flows


def _sends(catalogue: Catalogue, units: Sequence[Unit]) -> dict[Member, Sends]:
    count = len(catalogue.sources)
    size, descriptors = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for unit in units:
        size += unit.load
        descriptors += np.bincount(unit.source, weights=unit.descriptors(), minlength=count).astype(np.int64)
    return {s.party.member: Sends(int(size[i]), int(descriptors[i])) for i, s in enumerate(catalogue.sources)}
