"""The write loop leaves the process as it found it; what it writes is tested by real NIXL in test_endpoint.py."""

import asyncio
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from weightsync.agents.transport.nixl.chunks import Chunk
from weightsync.agents.transport.nixl.edge import Edge, EdgeResult, Transfer
from weightsync.agents.transport.nixl.errors import TransferError
from weightsync.agents.transport.nixl.write import SWITCH_SECONDS, Writer

ELSEWHERE = 0.004


@pytest.fixture(autouse=True)
def as_before() -> Any:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


class Wire:
    """A NIXL whose posts call ``post``."""

    def __init__(self, post: Callable[[], str]) -> None:
        self.post = post

    def transfer(self, handle: int) -> str:
        return self.post()


def written(post: Callable[[], str]) -> EdgeResult:
    lane: Any = SimpleNamespace(places=np.zeros((1, 2), dtype=np.int64))
    edge = Edge("peer", [lane], lambda region, offset: "x", [Transfer(0, Chunk(0, 1, 10, 0), 0)])
    bindings: Any = SimpleNamespace(errors=(RuntimeError,), disconnected=(ConnectionError,))
    writer = Writer("trainer/0", Wire(post), bindings, in_flight=100, deadline=time.monotonic() + 60)
    [result] = asyncio.run(writer.write([edge]))
    return result


def test_threads_take_short_turns_while_it_writes() -> None:
    during = []

    def post() -> str:
        during.append(sys.getswitchinterval())
        return "DONE"

    before = sys.getswitchinterval()
    assert written(post).bytes == 10
    assert during == [pytest.approx(SWITCH_SECONDS)]
    assert sys.getswitchinterval() == before
    sys.setswitchinterval(SWITCH_SECONDS / 10)
    shorter = sys.getswitchinterval()
    written(post)
    assert during[1] == shorter, "those of a process that has shorter ones stay"
    assert sys.getswitchinterval() == shorter


@pytest.mark.parametrize("microseconds", [699, 700, 701, 4900, 5000])
def test_turns_are_as_before_however_often_it_writes(microseconds: int) -> None:
    sys.setswitchinterval((microseconds + 0.5) * 1e-6)
    before = sys.getswitchinterval()
    for _ in range(3):
        written(lambda: "DONE")
    assert sys.getswitchinterval() == before


def test_turns_are_as_before_also_after_a_failure() -> None:
    def post() -> str:
        raise RuntimeError("no route")

    before = sys.getswitchinterval()
    assert isinstance(written(post).error, TransferError)
    assert sys.getswitchinterval() == before


def test_what_somebody_else_says_meanwhile_counts() -> None:
    def post() -> str:
        sys.setswitchinterval(ELSEWHERE)
        return "DONE"

    written(post)
    assert sys.getswitchinterval() == pytest.approx(ELSEWHERE)
