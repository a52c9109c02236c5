"""Ctrl-C waits for the end of the section, a second one does not."""

import signal
import threading
from collections.abc import Iterator

import pytest
from weightsync.agents.trainer.interrupts import held_interrupts


@pytest.fixture(autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_comes_at_the_end_of_the_section() -> None:
    reached = []

    def section() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        section()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_comes_at_once() -> None:
    reached = []

    def section() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
            reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        section()
    assert reached == [1]


def test_without_one_nothing_happens_and_a_handler_of_the_script_is_kept() -> None:
    heard: list[int] = []

    def mine(number: int, frame: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with held_interrupts():
            signal.raise_signal(signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_holds_nothing() -> None:
    entered = []

    def body() -> None:
        with held_interrupts():
            entered.append(1)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert entered == [1]
