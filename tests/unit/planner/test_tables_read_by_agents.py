"""What agents make of their tables is what the planner counted."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import fleets
from weightsync.agents.tables.runs import copied_bytes, pack_table, runs, scatter_table
from weightsync.orchestrator.planner import CostModel, make_plan
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, COPY_PEER, COPY_REMOTE, COPY_STAGED, as_matrix

RUN_LENGTH = 5


def moved(kernel_table):
    """Bytes of a strided-copy table: run bytes times three loop counts."""
    return int(kernel_table[:, [0, 5, 8, 11]].prod(axis=1).sum())


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), alpha=st.sampled_from([0.0, 1e-9, 1.0]))
def test_bytes_and_descriptors(data, alpha):
    sources, targets = data.draw(fleets())
    plan = make_plan(sources, targets, CostModel(alpha_seconds=alpha))
    packed = 0
    for source in sources:
        part = plan.part(source.member)
        copies = as_matrix(part.copies, COPY_COLUMNS)
        posted, packing = runs(copies, source.layout), pack_table(copies, source.layout)
        size = copied_bytes(copies, source.layout)
        assert size == part.expected_bytes == plan.sends[source.member].bytes
        assert size == int(posted[:, RUN_LENGTH].sum()) + moved(packing)
        assert len(posted) <= plan.sends[source.member].descriptors, "agents merge across groups, too"
        landing = np.array([berth.region if berth else -1 for berth in part.berths], np.int64)
        lands = (copies[:, COPY_STAGED] < 0) & (copies[:, COPY_REMOTE] == landing[copies[:, COPY_PEER]])
        packed += moved(packing) + copied_bytes(copies[lands], source.layout)
    scattered = sum(
        moved(scatter_table(as_matrix(plan.part(t.member).copies, COPY_COLUMNS), t.layout)) for t in targets
    )
    assert packed == scattered, "what lands is scattered"
