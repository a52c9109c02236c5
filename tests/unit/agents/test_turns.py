"""The threads of a process take turns as before when a write is over."""

import sys

import pytest
from weightsync.agents.turns import SLACK_NANOSECONDS, SWITCH_SECONDS, quick_turns, timer_slack

ELSEWHERE = 0.004


pytestmark = pytest.mark.usefixtures("own_turns")


@pytest.mark.parametrize("microseconds", [699, 700, 701, 4900, 5000])
def test_turns_are_as_before_however_often_it_writes(microseconds: int) -> None:
    sys.setswitchinterval((microseconds + 0.5) * 1e-6)
    before = sys.getswitchinterval()
    for _ in range(3):
        with quick_turns():
            assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    assert sys.getswitchinterval() == before


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_the_writing_thread_is_woken_in_time() -> None:
    before = timer_slack()
    assert before > SLACK_NANOSECONDS
    for _ in range(2):
        with quick_turns():
            assert timer_slack() == SLACK_NANOSECONDS
        assert timer_slack() == before


def test_turns_are_as_before_also_after_a_failure() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(RuntimeError, match="no route"), quick_turns():
        raise RuntimeError("no route")
    assert sys.getswitchinterval() == before


def test_what_somebody_else_says_meanwhile_counts() -> None:
    with quick_turns():
        sys.setswitchinterval(ELSEWHERE)
    assert sys.getswitchinterval() == pytest.approx(ELSEWHERE)


def test_shorter_turns_stay() -> None:
    sys.setswitchinterval(SWITCH_SECONDS / 10)
    shorter = sys.getswitchinterval()
    with quick_turns():
        assert sys.getswitchinterval() == shorter
    assert sys.getswitchinterval() == shorter


def test_of_several_that_overlap_the_last_puts_back_what_was_before() -> None:
    turns, slack = sys.getswitchinterval(), timer_slack()
    first, second = quick_turns(), quick_turns()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    assert timer_slack() == min(slack, SLACK_NANOSECONDS)
    second.__exit__(None, None, None)
    assert (sys.getswitchinterval(), timer_slack()) == (turns, slack)
