"""The coverage check catches planted faults, and nothing but them."""

import dataclasses

import numpy as np
import pytest
from layouts import Builder
from msgspec import structs
from msgspec.structs import replace
from weightsync.orchestrator.planner import CostModel, ProofFailed, make_plan
from weightsync.orchestrator.planner.catalogue import make_catalogue
from weightsync.orchestrator.planner.engine_part import plan_engine
from weightsync.orchestrator.planner.proof import Proof
from weightsync.orchestrator.planner.tables import MemberTable, Tables
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_GROUP,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    Tensor,
)
from weightsync.orchestrator.protocol.names import Member

ROWS, COLUMNS = 8, 16


@pytest.fixture
def plan_tables():
    """Tables of two sources and two targets; all matrices go straight, all norms packed."""
    matrices = [Tensor(f"model.layers.{i}.w", "bfloat16", (ROWS, COLUMNS)) for i in range(3)]
    norms = [Tensor(f"model.layers.{i}.norm", "float32", (2,)) for i in range(3)]
    sources = []
    for rank in range(2):
        builder = Builder(Member("trainer", "", rank), 4096)
        for tensor in matrices:
            builder.dense((tensor, ((rank * ROWS // 2, 0), (ROWS // 2, COLUMNS))))
        for tensor in norms:
            builder.dense((tensor, ((rank,), (1,))))
        sources.append(builder.party())
    targets = []
    for rank in range(2):
        builder = Builder(Member("inference", "e", rank), 4096)
        for tensor in (*norms, *matrices):
            builder.dense((tensor, ((0,) * len(tensor.shape), tensor.shape)))
        targets.append(builder.party())
    catalogue = make_catalogue(sources)
    nothing = np.zeros(len(sources), np.int64)
    engine = plan_engine(catalogue, tuple(targets), CostModel(1e-9, 44e9, 500e9), nothing)
    tables = Tables(catalogue.sources, [engine])
    found = [tables.of_source(i) for i in range(2)], list(tables.of_targets()), catalogue.decoder.form_table()
    assert all(0 < (s.copies[:, COPY_STAGED] >= 0).sum() < len(s.copies) for s in found[0])
    return found


def check(plan_tables):
    sources, targets, forms = plan_tables
    proof = Proof(targets, forms)
    for source in sources:
        proof.writes(source)
    proof.finish()


def with_table(old, table, meant=None):
    return MemberTable(old.member, old.peers, table, old.berths, old.target_row if meant is None else meant)


def test_a_right_plan_passes(plan_tables):
    check(plan_tables)


@pytest.mark.parametrize("row", range(12))
def test_a_lost_write_is_caught(plan_tables, row):
    sources, targets, forms = plan_tables
    keep = np.arange(len(sources[0].copies)) != row
    sources[0] = with_table(sources[0], sources[0].copies[keep], sources[0].target_row[keep])
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


@pytest.mark.parametrize("row", range(12))
def test_a_doubled_write_is_caught(plan_tables, row):
    sources, targets, forms = plan_tables
    twice = np.append(np.arange(len(sources[0].copies)), row)
    sources[0] = with_table(sources[0], sources[0].copies[twice], sources[0].target_row[twice])
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


def test_one_write_instead_of_another_is_caught(plan_tables):
    sources, targets, forms = plan_tables
    order = np.arange(len(sources[0].copies))
    order[3] = 4
    sources[0] = with_table(sources[0], sources[0].copies[order], sources[0].target_row[order])
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


SHIFTS = [
    *((column, by) for column in range(COPY_BOX, COPY_REMOTE) for by in (1, -1)),
    (COPY_REMOTE, 1),
    (COPY_REMOTE + 1, 2),
    (COPY_REMOTE + 1, -32),
    (COPY_ROW, 1),
    (COPY_PEER, 1),
    (COPY_PEER, 2),
    (COPY_STAGED, 4),
    (COPY_STAGED, 1 << 20),
]


@pytest.mark.parametrize(("column", "by"), SHIFTS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_shifted_write_is_caught(plan_tables, column, by, packed):
    sources, targets, forms = plan_tables
    table = sources[1].copies.copy()
    row = int(np.flatnonzero((table[:, COPY_STAGED] >= 0) == packed)[0])
    table[row, column] += by
    sources[1] = with_table(sources[1], table)
    if column == COPY_STAGED and not packed:
        table[row, column] = by
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


@pytest.mark.parametrize(
    ("column", "by"), [(COPY_ROW, 1), (COPY_ROW, 1 << 20), (COPY_STAGED, 4), (COPY_STAGED, -8), (COPY_BOX + 6, 1)]
)
def test_a_scatter_that_differs_from_what_was_packed_is_caught(plan_tables, column, by):
    sources, targets, forms = plan_tables
    table = targets[0].copies.copy()
    table[0, column] += by
    targets[0] = with_table(targets[0], table)
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


def test_two_boxes_at_one_place_are_caught(plan_tables):
    sources, targets, forms = plan_tables
    table = targets[0].copies.copy()
    table[:, COPY_STAGED] = table[0, COPY_STAGED]
    targets[0] = with_table(targets[0], table)
    with pytest.raises(ProofFailed, match="overlap in the cargo"):
        check((sources, targets, forms))


BERTHS = {
    "two edges share memory": lambda berth: replace(berth, offset=0),
    "it leaves the landing": lambda berth: replace(berth, offset=4096 - 16),
    "it is another region": lambda berth: replace(berth, region=0),
    "another number of places": lambda berth: replace(berth, places=9),
}
AGREED = ("another number of places", True)
"""There is no harm in that."""


@pytest.mark.parametrize(
    ("change", "both"), [(change, both) for change in BERTHS for both in (True, False) if (change, both) != AGREED]
)
def test_a_berth_that_is_wrong_or_not_known_to_both_ends_is_caught(plan_tables, change, both):
    sources, targets, forms = plan_tables
    second = targets[0].peers.index(sources[1].member)
    wrong = BERTHS[change](targets[0].berths[second])
    changed = [*targets[0].berths]
    changed[second] = wrong
    targets[0] = dataclasses.replace(targets[0], berths=tuple(changed))
    if both:
        known = [*sources[1].berths]
        known[sources[1].peers.index(targets[0].member)] = wrong
        sources[1] = dataclasses.replace(sources[1], berths=tuple(known))
    with pytest.raises(ProofFailed, match="berths of e/0 overlap, leave its landing, or are not those of its sources"):
        check((sources, targets, forms))


def test_a_write_past_the_landing_of_a_shadow_engine_is_caught(plan_tables):
    """Its rows are out of everybody's reach: what goes straight to them is refused, however right its place."""
    sources, targets, forms = plan_tables
    proof = Proof(targets, forms)
    proof.shadow[:] = True
    with pytest.raises(ProofFailed, match="does not arrive where"):
        proof.writes(sources[0])


def test_a_berth_of_a_copying_engine_that_is_gone_through_again_is_caught(plan_tables):
    _, targets, forms = plan_tables
    small = replace(targets[0].berths[0], chunk_bytes=16)
    layout = structs.replace(targets[0].member.party.layout, lands="copy")
    party = dataclasses.replace(targets[0].member.party, layout=layout)
    table = dataclasses.replace(targets[0], berths=(small,), peers=targets[0].peers[:1])
    table = dataclasses.replace(table, member=dataclasses.replace(table.member, party=party))
    proof = Proof([table], forms)
    proof.sources[id(table.peers[0])] = 0
    proof.berths[0, 0] = small
    with pytest.raises(ProofFailed, match="berths of e/0"):
        proof._apart(0, table)


def test_swapped_destinations_of_equal_shape_are_caught(plan_tables):
    sources, targets, forms = plan_tables
    source = sources[0]
    table = source.copies.copy()
    direct = np.flatnonzero((table[:, COPY_STAGED] < 0) & (table[:, COPY_PEER] == 0))
    a, b = direct[:2]
    table[[a, b], COPY_REMOTE:] = table[[b, a], COPY_REMOTE:]
    meant = source.target_row.copy()
    for claim in (
        meant,
        np.where(np.arange(len(meant)) == a, meant[b], np.where(np.arange(len(meant)) == b, meant[a], meant)),
    ):
        sources[0] = with_table(source, table, claim.astype(np.int32))
        with pytest.raises(ProofFailed, match="does not arrive"):
            check((sources, targets, forms))


def test_a_claim_for_a_row_that_is_not_there_is_caught(plan_tables):
    sources, targets, forms = plan_tables
    meant = sources[0].target_row.copy()
    meant[0] = 1000
    sources[0] = with_table(sources[0], sources[0].copies, meant)
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


def test_the_group_is_not_a_matter_of_right_or_wrong(plan_tables):
    sources, targets, forms = plan_tables
    table = sources[0].copies.copy()
    table[:, COPY_GROUP] = 0
    sources[0] = with_table(sources[0], table)
    check((sources, targets, forms))


def test_every_plan_is_proved(monkeypatch):
    tensor = Tensor("w", "bfloat16", (4, 4))
    builders = [Builder(Member("trainer", "", 0)), Builder(Member("inference", "e", 0))]
    for builder in builders:
        builder.dense((tensor, ((0, 0), (4, 4))))
    source, target = (b.party() for b in builders)
    lose = Tables.of_source

    def lossy(self, number):
        whole = lose(self, number)
        return MemberTable(whole.member, whole.peers, whole.copies[:0], whole.berths, whole.target_row[:0])

    monkeypatch.setattr(Tables, "of_source", lossy)
    with pytest.raises(ProofFailed, match=r"1 target rows are not written exactly once; first: 'w' at e/0"):
        make_plan([source], [target])
