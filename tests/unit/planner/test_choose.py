"""Who sends what several hold."""

import numpy as np
import pytest
from layouts import SIZE, engine_rank, matrices, party_of, trainer
from weightsync.orchestrator.planner import make_plan
from weightsync.orchestrator.planner.choose import pour, water_fill
from weightsync.orchestrator.protocol.layout import Tensor


def test_replicas_share_the_load():
    model = matrices(40)
    sources = [party_of(trainer(r), model) for r in range(4)]
    plan = make_plan(sources, [party_of(engine_rank(f"e{i}"), model) for i in range(3)])
    sent = [plan.sends[s.member].bytes for s in sources]
    assert max(sent) - min(sent) <= SIZE * SIZE * 2
    assert sum(sent) == plan.bytes == 3 * 40 * SIZE * SIZE * 2


def test_what_only_one_holds_is_levelled_by_what_all_hold():
    shared, own = matrices(32), [Tensor(f"own.{i}", "bfloat16", (SIZE, SIZE)) for i in range(8)]
    sources = [party_of(trainer(0), shared + own), party_of(trainer(1), shared)]
    plan = make_plan(sources, [party_of(engine_rank("e"), shared + own)])
    assert plan.sends[trainer(0)].bytes == plan.sends[trainer(1)].bytes


def test_a_target_gets_replicated_tensors_from_few_sources():
    model = matrices(64)
    sources = [party_of(trainer(r), model) for r in range(16)]
    plan = make_plan(sources, [party_of(engine_rank("e", r), model) for r in range(16)])
    assert max(len(plan.part(engine_rank("e", r)).peers) for r in range(16)) <= 2


@pytest.mark.parametrize(
    ("load", "amount", "shares"),
    [
        ([5, 1, 3], 6, [0, 4, 2]),
        ([5, 1, 3], 1, [0, 1, 0]),
        ([0, 0], 3, [2, 1]),
        ([7], 4, [4]),
        ([2, 2, 9], 0, [0, 0, 0]),
    ],
)
def test_the_lowest_fill_up_first(load, amount, shares):
    assert water_fill(np.array(load), amount).tolist() == shares


def test_pieces_are_poured_in_stretches():
    sizes = np.full(4, 4)
    assert pour(sizes, np.array([0, 0])).tolist() == [0, 0, 1, 1]
    assert pour(sizes, np.array([8, 0])).tolist() == [0, 1, 1, 1]
    assert pour(sizes, np.array([100, 0])).tolist() == [1, 1, 1, 1]
