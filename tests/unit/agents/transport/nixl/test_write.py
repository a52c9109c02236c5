"""The write loop leaves the process as it found it, and tells each edge's end once, when nothing of it is in flight.

What it writes is tested by real NIXL in test_endpoint.py.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
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

    def check_xfer_state(self, handle: int) -> str:
        raise RuntimeError("never posted")


def written(post: Callable[[], str]) -> EdgeResult:
    edge = Edge("peer", [], lambda region, offset: "x", transfers=[Transfer(10, 1, lambda: "x", 0)])
    bindings: Any = SimpleNamespace(errors=(RuntimeError,), disconnected=(ConnectionError,))
    told: list[EdgeResult] = []
    writer = Writer("trainer/0", Wire(post), bindings, in_flight=100, deadline=time.monotonic() + 60, ended=told.append)
    [result] = asyncio.run(writer.write([edge]))
    assert told == [result]
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


# ------------------------------------------------------------------------------------------------- the end of an edge
class Handles:
    """A NIXL that says of each handle, at each question, the next of ``answers``; the last one for ever."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = answers
        self.posted: list[str] = []

    def transfer(self, handle: str) -> str:
        self.posted.append(handle)
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: str) -> str:
        answers = self.answers[handle]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer == "gone":
            raise ConnectionError("disconnected")
        if answer == "refused":
            raise RuntimeError("invalid")
        return answer


class Written:
    """One write of edges a and b, of two handles each; ``told`` are their ends."""

    def __init__(self, seconds: float, **answers: list[str]) -> None:
        self.nixl = Handles(**answers)
        self.edges = [
            Edge(
                peer,
                [],
                lambda region, offset: "x",
                transfers=[Transfer(10, 1, lambda: "x", f"{peer}{n}") for n in (1, 2)],
            )
            for peer in ("a", "b")
        ]
        self.told: list[EdgeResult] = []
        bindings: Any = SimpleNamespace(errors=(RuntimeError, ConnectionError), disconnected=ConnectionError)
        deadline = time.monotonic() + seconds
        self.writer = Writer("trainer/0", self.nixl, bindings, in_flight=9, deadline=deadline, ended=self.told.append)

    async def write(self) -> None:
        await self.writer.write(self.edges)

    @property
    def ends(self) -> dict[str, tuple[int, str]]:
        assert len({end.peer for end in self.told}) == len(self.told), "each is told once"
        return {end.peer: (end.bytes, type(end.error).__name__ if end.error else "") for end in self.told}


async def test_a_refused_post_is_not_in_flight() -> None:
    write = Written(60.0, a1=["DONE"], a2=["gone"], b1=["DONE"], b2=["PROC", "DONE"])
    await write.write()
    assert write.ends == {"a": (10, "DisconnectedError"), "b": (20, "")}
    assert [edge.tainted for edge in write.edges] == [False, False]
    assert [edge.broken for edge in write.edges] == [True, False]
    assert write.writer.over


async def test_after_the_first_failure_nothing_more_is_posted_and_what_is_in_flight_is_waited_for() -> None:
    write = Written(60.0, a1=["PROC", "PROC", "DONE"], a2=["ERR"], b1=["DONE"], b2=["DONE"])
    await write.write()
    assert write.ends == {"b": (20, "")}
    assert [left.edge.peer for left in write.writer.left()] == ["a"]
    while not write.writer.over:
        write.writer.settle()
    assert write.ends == {"b": (20, ""), "a": (10, "TransferError")}


async def test_a_post_that_raises_and_has_begun_is_in_flight() -> None:
    write = Written(60.0, a1=["refused", "PROC", "PROC", "PROC", "DONE"], a2=["DONE"], b1=["DONE"], b2=["DONE"])
    await write.write()
    assert write.nixl.posted == ["a1", "b1", "b2"]
    assert write.edges[0].tainted
    while not write.writer.over:
        write.writer.settle()
    assert write.ends == {"b": (20, ""), "a": (10, "TransferError")}


async def test_an_edge_that_hangs_at_the_deadline_is_over_when_its_last_transfer_is() -> None:
    write = Written(0.05, a1=["PROC"], a2=["PROC"], b1=["DONE"], b2=["DONE"])
    await write.write()
    assert write.ends == {"b": (20, "")}
    write.nixl.answers["a1"] = ["DONE"]
    write.writer.settle()
    assert len(write.told) == 1
    write.nixl.answers["a2"] = ["gone"]
    write.writer.settle()
    write.writer.settle()
    assert write.ends == {"b": (20, ""), "a": (10, "DeadlineError")}


async def test_only_the_edge_that_is_named_is_stopped() -> None:
    write = Written(60.0, a1=["PROC"], a2=["PROC"], b1=["PROC"], b2=["PROC"])
    task = asyncio.create_task(write.write())
    await asyncio.sleep(0)
    write.writer.stop({"a"}, "left out")
    write.nixl.answers |= {"b1": ["DONE"], "b2": ["DONE"]}
    await task
    assert write.ends == {"b": (20, "")}
    write.writer.forget("a")
    assert write.ends == {"b": (20, ""), "a": (0, "StoppedError")}
    assert not write.edges[0].tainted


async def test_an_edge_that_has_not_ended_is_not_posted_again() -> None:
    write = Written(0.05, a1=["PROC"], a2=["PROC"], b1=["DONE"], b2=["DONE"])
    await write.write()
    again = Writer("trainer/0", write.nixl, write.writer._bindings, in_flight=9, deadline=time.monotonic() + 60,
                   ended=write.told.append)  # fmt: skip
    write.nixl.posted.clear()
    write.told.clear()
    [hung, sent] = await again.write(write.edges)
    assert "an earlier write has not ended (the deadline passed" in str(hung.error)
    assert sent.error is None
    assert write.nixl.posted == ["b1", "b2"]
    assert [end.peer for end in write.told] == ["b"]
    write.writer.forget("a")
    again.settle()
    assert [end.peer for end in write.told] == ["b", "a", "a"], "one end for each write"
