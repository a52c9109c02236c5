"""What stays of a loader's writes, as byte runs worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from weightsync.agents.recorder import settled
from weightsync.agents.recorder.blueprint import Blueprint, ParameterPlace
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.settled import (
    Unrecorded,
    judge_unreached,
    length,
    missing,
    opaque_names,
    runs_of,
    settle,
    union,
)
from weightsync.agents.recorder.trace import Landing, OpaqueBytes, RecordError, Write

F32 = torch.float32


def write(name: str, first: int, elements: int, storage: int = 0) -> Write:
    """``name`` copied over ``elements`` float32 from byte ``first`` on; a constant if it has no name."""
    place = StridedView((elements,), (4,), first)
    landing = Landing(storage, Checkpoint(name, (elements,), F32), (0,), place, F32)
    return Write(storage, place, 4, (landing,) if name else ())


def runs(*pairs: tuple[int, int]) -> settled.Runs:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


@pytest.mark.parametrize(
    ("place", "itemsize", "expected"),
    [
        (StridedView((), (), 6), 2, [[6, 8]]),
        (StridedView((3, 4), (8, 2), 0), 2, [[0, 24]]),
        (StridedView((3, 2), (8, 2), 2), 2, [[2, 6], [10, 14], [18, 22]]),
        (StridedView((4, 3), (2, 8), 0), 2, [[0, 24]]),
        (StridedView((2, 1, 2), (16, 99, 8), 0), 4, [[0, 4], [8, 12], [16, 20], [24, 28]]),
        (StridedView((5, 2), (0, 4), 0), 4, [[0, 8]]),
        (StridedView((0, 2), (8, 4), 0), 4, []),
    ],
    ids=["a scalar", "dense", "columns", "transposed", "gaps in two dimensions", "a broadcast", "empty"],
)
def test_runs_of_a_place(place: StridedView, itemsize: int, expected: list[list[int]]) -> None:
    assert runs_of(place, itemsize).tolist() == expected


def test_a_place_in_too_many_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "MAX_RUNS", 3)
    with pytest.raises(RecordError, match="more than 3 separate runs"):
        runs_of(StridedView((4, 1), (8, 4)), 4)


def test_union_merges_what_overlaps_touches_or_lies_inside() -> None:
    merged = union([runs((8, 10), (0, 4)), runs((4, 6), (1, 2)), runs((20, 30), (21, 22))])
    assert merged.tolist() == [[0, 6], [8, 10], [20, 30]]
    assert length(merged) == 18
    assert union([]).tolist() == []


def test_missing_counts_the_wanted_bytes_that_are_not_reached() -> None:
    assert missing(runs((0, 4), (8, 12)), runs((2, 10))) == 4
    assert missing(runs((0, 16)), runs((2, 10))) == 0
    assert missing(runs(), runs((2, 10))) == 8


def test_writes_to_several_storages_are_settled_apart() -> None:
    states = settle([write("a", 0, 2), write("b", 0, 4, storage=3), write("c", 8, 1)])
    assert {storage: [mark.source.name for mark in state.landings] for storage, state in states.items()} == {
        0: ["a", "c"],
        3: ["b"],
    }
    assert states[0].reached.tolist() == [[0, 12]]


def test_the_last_write_to_a_place_counts_and_takes_its_turn() -> None:
    state = settle([write("a", 0, 2), write("", 0, 4), write("a again", 0, 2)])[0]
    assert [mark.source.name for mark in state.landings] == ["a again"]
    assert state.reached.tolist() == [[0, 8]]


def test_a_write_that_later_ones_cover_together_leaves_nothing() -> None:
    state = settle([write("a", 0, 4), write("b", 0, 2), write("c", 8, 2)])[0]
    assert [mark.source.name for mark in state.landings] == ["b", "c"]


def test_a_write_that_a_later_one_covers_in_part_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match="a later write covers a part of a only"):
        settle([write("a", 0, 4), write("b", 8, 4)])


def test_marks_of_one_write_that_overlap_are_refused() -> None:
    both = write("a", 0, 4).marks + write("b", 8, 2).marks
    with pytest.raises(RecordError, match="bytes are loaded twice, from among a, b"):
        settle([Write(0, StridedView((4,), (4,)), 4, both)])


def test_reasons_of_opaque_bytes_are_named_once_and_sorted() -> None:
    place = StridedView((1,), (4,))
    marks = [Write(n, place, 4, (OpaqueBytes(n, place, 4, reason),)) for n, reason in enumerate("bab")]
    assert opaque_names(settle(marks), dict(enumerate("vwv"))) == ["v: b", "w: a"]


class Padded(nn.Module):
    """Five rows, of which a checkpoint fills three, under two names; and a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 2), requires_grad=False)
        self.tied = self.weight
        self.register_buffer("table", torch.zeros(3))


def test_each_unreached_place_is_judged_once_with_the_bytes_that_are_left() -> None:
    parameters = Blueprint(Padded()).parameters
    asked: list[tuple[str, bool]] = []

    def reason(parameter: ParameterPlace, whole: bool) -> str:
        asked.append((parameter.name, whole))
        return "a table" if whole else "padding"

    state = settle([write("w", 0, 6, storage=parameters[0].storage)])
    assert judge_unreached(parameters, state, reason) == [
        Unrecorded("weight", 16, "padding"),
        Unrecorded("table", 12, "a table"),
    ]
    assert asked == [("weight", False), ("table", True)]


def test_what_has_no_reason_to_stay_is_refused_all_at_once() -> None:
    parameters = Blueprint(Padded()).parameters
    with pytest.raises(RecordError, match=r"reaches table \(12 of 12 bytes\), weight \(40 of 40 bytes\)"):
        judge_unreached(parameters, {}, lambda parameter, whole: "")
