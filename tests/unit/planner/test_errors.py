"""What errors of planning say and carry."""

from layouts import engine_rank
from weightsync.orchestrator.planner import CoverageError, Missing
from weightsync.orchestrator.planner.errors import SHOWN


def lack(number, engine="e"):
    return Missing(f"t{number}", engine_rank(engine), (0, 4), (2, 4), 3)


def test_a_missing_box_is_written_as_a_slice():
    assert str(lack(7)) == "t7[0:2, 4:8] lacks 3 elements at e/0"


def test_the_message_is_short_and_the_attributes_are_whole():
    error = CoverageError([lack(i) for i in range(SHOWN + 2)])
    assert str(error).startswith(f"no trainer rank holds all of {SHOWN + 2} tensors that the engines need: t0[")
    assert str(error).endswith("; and 2 more")
    assert len(error.tensors) == len(error.missing) == SHOWN + 2
    assert error.member == engine_rank("e")


def test_no_single_engine_is_named_where_two_lack_something():
    assert CoverageError([lack(1, "a"), lack(2, "b")]).member is None
