"""The thread beside the engine: one thing at a time, at low priority, and no failure ends it."""

import logging
import os
import sys
import threading

import pytest
import torch
from weightsync.agents.inference.quiet import NICE, Quiet
from weightsync.agents.turns import SWITCH_SECONDS


def test_things_are_done_one_after_the_other_on_a_thread_of_low_priority() -> None:
    quiet, done, told = Quiet(torch.device("cpu")), threading.Event(), []
    here = os.getpriority(os.PRIO_PROCESS, 0)

    def tell() -> None:
        told.append((threading.get_ident(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    quiet(tell)
    quiet(tell)
    quiet(done.set)
    assert done.wait(20)
    assert told[0] == told[1]
    assert told[0][0] != threading.get_ident()
    assert told[0][1] == min(here + NICE, 19) or told[0][1] == NICE
    assert os.getpriority(os.PRIO_PROCESS, 0) == here


@pytest.mark.usefixtures("own_turns")
@pytest.mark.parametrize("waited_for", [True, False])
def test_what_is_waited_for_beside_an_engine_waits_for_no_long_turn_of_it(waited_for: bool) -> None:
    quiet, done = Quiet(torch.device("cpu"), waited_for=waited_for), threading.Event()
    told, before = [], sys.getswitchinterval()

    def fail() -> None:
        told.append(sys.getswitchinterval())
        raise RuntimeError("no such memory")

    quiet(fail)
    quiet(lambda: told.append(sys.getswitchinterval()))
    quiet(done.set)
    assert done.wait(20)
    quiet._thread.shutdown()
    assert told == pytest.approx([SWITCH_SECONDS if waited_for else before] * 2, abs=1e-6)
    assert sys.getswitchinterval() == pytest.approx(before, abs=1e-6)


def test_a_failure_is_logged_and_the_next_thing_is_done(caplog: pytest.LogCaptureFixture) -> None:
    quiet, done = Quiet(torch.device("cpu")), threading.Event()

    def fail() -> None:
        raise RuntimeError("no such memory")

    with caplog.at_level(logging.ERROR):
        quiet(fail)
        quiet(done.set)
        assert done.wait(20)
    assert "no such memory" in caplog.text
