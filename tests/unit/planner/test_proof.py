"""The coverage check catches planted faults, and nothing but them."""

import numpy as np
import pytest
from weightsync.orchestrator.planner import CostModel, ProofFailed, make_plan
from weightsync.orchestrator.planner.catalogue import make_catalogue
from weightsync.orchestrator.planner.engine_part import plan_unit
from weightsync.orchestrator.planner.proof import Proof
from weightsync.orchestrator.planner.tables import Tables, Told
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
def told(bench):
    """Tables of two sources and two targets; all matrices go straight, all norms packed."""
    matrices = [Tensor(f"model.layers.{i}.w", "bfloat16", (ROWS, COLUMNS)) for i in range(3)]
    norms = [Tensor(f"model.layers.{i}.norm", "float32", (2,)) for i in range(3)]
    sources = []
    for rank in range(2):
        builder = bench.Builder(Member("trainer", "", rank), 4096)
        for tensor in matrices:
            builder.dense((tensor, ((rank * ROWS // 2, 0), (ROWS // 2, COLUMNS))))
        for tensor in norms:
            builder.dense((tensor, ((rank,), (1,))))
        sources.append(builder.party())
    targets = []
    for rank in range(2):
        builder = bench.Builder(Member("inference", "e", rank), 4096)
        for tensor in (*norms, *matrices):
            builder.dense((tensor, ((0,) * len(tensor.shape), tensor.shape)))
        targets.append(builder.party())
    catalogue = make_catalogue(sources)
    nothing = np.zeros(len(sources), np.int64)
    unit = plan_unit(catalogue, tuple(targets), CostModel(1e-9, 44e9, 500e9), nothing, nothing)
    tables = Tables(catalogue.sources, [unit])
    found = [tables.of_source(i) for i in range(2)], list(tables.of_targets()), catalogue.decoder.form_table()
    assert all(0 < (s.table[:, COPY_STAGED] >= 0).sum() < len(s.table) for s in found[0])
    return found


def check(told):
    sources, targets, forms = told
    proof = Proof(targets, forms)
    for source in sources:
        proof.writes(source)
    proof.finish()


def with_table(told, table, meant=None):
    return Told(told.member, told.peers, table, told.meant if meant is None else meant)


def test_a_right_plan_passes(told):
    check(told)


@pytest.mark.parametrize("row", range(12))
def test_a_lost_write_is_caught(told, row):
    sources, targets, forms = told
    keep = np.arange(len(sources[0].table)) != row
    sources[0] = with_table(sources[0], sources[0].table[keep], sources[0].meant[keep])
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


@pytest.mark.parametrize("row", range(12))
def test_a_doubled_write_is_caught(told, row):
    sources, targets, forms = told
    twice = np.append(np.arange(len(sources[0].table)), row)
    sources[0] = with_table(sources[0], sources[0].table[twice], sources[0].meant[twice])
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


def test_one_write_instead_of_another_is_caught(told):
    sources, targets, forms = told
    order = np.arange(len(sources[0].table))
    order[3] = 4
    sources[0] = with_table(sources[0], sources[0].table[order], sources[0].meant[order])
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
def test_a_shifted_write_is_caught(told, column, by, packed):
    sources, targets, forms = told
    table = sources[1].table.copy()
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
def test_a_scatter_that_differs_from_what_was_packed_is_caught(told, column, by):
    sources, targets, forms = told
    table = targets[0].table.copy()
    table[0, column] += by
    targets[0] = with_table(targets[0], table)
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


def test_two_edges_that_share_staging_are_caught(told):
    sources, targets, forms = told
    table = targets[0].table.copy()
    table[:, COPY_STAGED] = table[0, COPY_STAGED]
    targets[0] = with_table(targets[0], table)
    with pytest.raises(ProofFailed, match="overlap"):
        check((sources, targets, forms))


def test_swapped_destinations_of_equal_shape_are_caught(told):
    sources, targets, forms = told
    source = sources[0]
    table = source.table.copy()
    direct = np.flatnonzero((table[:, COPY_STAGED] < 0) & (table[:, COPY_PEER] == 0))
    a, b = direct[:2]
    table[[a, b], COPY_REMOTE:] = table[[b, a], COPY_REMOTE:]
    meant = source.meant.copy()
    for claim in (
        meant,
        np.where(np.arange(len(meant)) == a, meant[b], np.where(np.arange(len(meant)) == b, meant[a], meant)),
    ):
        sources[0] = with_table(source, table, claim.astype(np.int32))
        with pytest.raises(ProofFailed, match="does not arrive"):
            check((sources, targets, forms))


def test_a_claim_for_a_row_that_is_not_there_is_caught(told):
    sources, targets, forms = told
    meant = sources[0].meant.copy()
    meant[0] = 1000
    sources[0] = with_table(sources[0], sources[0].table, meant)
    with pytest.raises(ProofFailed):
        check((sources, targets, forms))


def test_the_group_is_not_a_matter_of_right_or_wrong(told):
    sources, targets, forms = told
    table = sources[0].table.copy()
    table[:, COPY_GROUP] = 0
    sources[0] = with_table(sources[0], table)
    check((sources, targets, forms))


def test_every_plan_is_proved(bench, monkeypatch):
    tensor = Tensor("w", "bfloat16", (4, 4))
    builders = [bench.Builder(Member("trainer", "", 0)), bench.Builder(Member("inference", "e", 0))]
    for builder in builders:
        builder.dense((tensor, ((0, 0), (4, 4))))
    source, target = (b.party() for b in builders)
    lose = Tables.of_source

    def lossy(self, number):
        told = lose(self, number)
        return Told(told.member, told.peers, told.table[:0], told.meant[:0])

    monkeypatch.setattr(Tables, "of_source", lossy)
    with pytest.raises(ProofFailed, match=r"1 target rows are not written exactly once; first: 'w' at e/0"):
        make_plan([source], [target])
