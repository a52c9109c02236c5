"""What came and what is there, box by box: a difference in one bit or one place is named."""

import torch
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.chains import Function
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.ledger import Ledger, made_values, stored_dtype
from weightsync.agents.recorder.trace import Landing

F32, BF16 = torch.float32, torch.bfloat16
X = Checkpoint("x", (4, 6), F32)
RIGHT_HALF = Landing(0, X, (1, 3), StridedView((2, 3), (12, 4), 0), F32)
CPU = torch.device("cpu")


def fed(landing: Landing, values: torch.Tensor) -> Ledger:
    ledger = Ledger([landing], CPU)
    for _, tensor in ledger.watch([("x", values), ("other", torch.zeros(1))]):
        tensor.zero_()  # what a loader does to a tensor that it got is no part of what came
    return ledger


def test_a_box_is_compared_with_its_place() -> None:
    values = torch.randn(4, 6)
    box = values[1:3, 3:].clone()
    ledger = fed(RIGHT_HALF, values)
    assert ledger.unproved() == []
    assert ledger.seen["x"] == X
    assert ledger.differences(lambda landing: ("w", box)) == []
    for wrong in (box.flip(0), box + 1e-6, box.t().contiguous().t().flip(1)):
        assert ledger.differences(lambda landing, w=wrong: ("w", w)) == [
            "w does not hold x at [1, 3] + [2, 3] after loading it"
        ]
    assert len(ledger.differences(lambda landing: ("w", None))) == 1


def test_a_cast_is_compared_after_it() -> None:
    values = torch.randn(4, 6)
    box = values[1:3, 3:].to(BF16)
    landing = Landing(0, X, (1, 3), StridedView((2, 3), (6, 2), 0), BF16)
    assert fed(landing, values).differences(lambda landing: ("w", box)) == []


def test_a_program_is_run_and_what_it_takes_is_kept() -> None:
    values = torch.randn(4, 6)
    box = values[1:3, 3:].clone()
    step = Function(F32, F32, torch.ops.aten.exp.default, (), ())
    landing = Landing(0, X, (1, 3), RIGHT_HALF.place, F32, (step,))
    ledger = fed(landing, values)
    assert ledger.differences(lambda landing: ("w", box.exp())) == []
    assert torch.equal(ledger.sent[landing], box)
    assert stored_dtype(landing) == F32


def test_what_did_not_come_or_came_otherwise_is_unproved() -> None:
    ledger = Ledger([RIGHT_HALF], CPU)
    assert ledger.unproved() == ["x"]
    list(ledger.watch([("x", torch.zeros(4, 6, dtype=BF16))]))
    assert ledger.unproved() == ["x"]


def test_only_so_many_differences_are_named() -> None:
    landings = [Landing(0, X, (row, 0), StridedView((1, 6), (24, 4), 24 * row), F32) for row in range(4)]
    landings += [Landing(1, X, (row, 0), StridedView((1, 6), (24, 4), 24 * row), F32) for row in range(4)]
    landings += [Landing(2, X, (0, 0), StridedView((1, 6), (24, 4), 0), F32)]
    ledger = Ledger(landings, CPU)
    list(ledger.watch([("x", torch.randn(4, 6))]))
    faults = ledger.differences(lambda landing: ("w", None))
    assert len(faults) == 9
    assert faults[-1] == "1 more"


def test_made_values_differ_from_place_to_place_and_tensor_to_tensor() -> None:
    entries = [Checkpoint(n, (64, 32), dtype) for n, dtype in (("a", F32), ("b", F32), ("c", torch.float8_e4m3fn))]
    made = dict(
        made_values([*entries, Checkpoint("i", (5,), torch.int8), Checkpoint("s", (), BF16)], torch.device("cpu"))
    )
    assert [(t.shape, t.dtype) for t in made.values()][:3] == [((64, 32), e.dtype) for e in entries]
    assert len(made["a"].unique()) > 2000
    assert not torch.equal(made["a"], made["b"])
    assert all((tensor.float() > 0).all() and tensor.float().isfinite().all() for tensor in made.values())
