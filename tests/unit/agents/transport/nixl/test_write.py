"""The write loop leaves the process as it found it, and tells each edge's end once, when nothing of it is in flight.

What it writes is tested by real NIXL in test_endpoint.py.
"""

import asyncio
import itertools
import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from weightsync.agents.transport.nixl import write as writes
from weightsync.agents.transport.nixl.cargo import Cargo, CargoChunk
from weightsync.agents.transport.nixl.edge import Edge, EdgeResult, Transfer
from weightsync.agents.transport.nixl.errors import DisconnectedError
from weightsync.agents.transport.nixl.flow import Loading
from weightsync.agents.transport.nixl.ring import PackingRing
from weightsync.agents.transport.nixl.write import Writer
from weightsync.agents.turns import SWITCH_SECONDS
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.names import RoundName

pytestmark = pytest.mark.usefixtures("own_turns")


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

    def __init__(self, seconds: float, stall: float | None = None, **answers: list[str]) -> None:
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
        self.writer = Writer("trainer/0", self.nixl, bindings, in_flight=9, deadline=deadline, ended=self.told.append,
                             stall_seconds=stall)  # fmt: skip

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
    assert write.ends == {"b": (20, ""), "a": (10, "TransferError")}, "so that it can be tried anew at once"
    assert write.writer.over


@pytest.mark.parametrize("ends", ["stop", "stall", "deadline"])
async def test_what_is_in_flight_over_a_broken_connection_and_hangs_is_not_waited_for_longer_than_any_other(ends):
    seconds, stall = (0.05 if ends == "deadline" else 60.0), (0.05 if ends == "stall" else None)
    write = Written(seconds, stall, a1=["PROC"], a2=["gone"], b1=["DONE"], b2=["DONE"])
    began = time.monotonic()
    task = asyncio.create_task(write.write())
    await asyncio.sleep(0.02)
    if ends == "stop":
        assert not task.done()
        write.writer.stop({"a"}, "left out")
    await task
    assert time.monotonic() - began < 5.0
    assert write.ends == {"b": (20, "")}
    assert [left.edge.peer for left in write.writer.left()] == ["a"]
    write.writer.forget("a")
    assert write.ends == {"b": (20, ""), "a": (0, "DisconnectedError")}, "its first error is what is told"


async def test_a_post_that_raises_and_has_begun_is_in_flight() -> None:
    write = Written(60.0, a1=["refused", "PROC", "PROC", "PROC", "DONE"], a2=["DONE"], b1=["DONE"], b2=["DONE"])
    await write.write()
    assert write.nixl.posted == ["a1", "b1", "b2"]
    assert not write.edges[0].tainted
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


async def test_an_edge_of_which_nothing_moves_is_given_up_long_before_the_deadline() -> None:
    write = Written(60.0, 1.0, a1=["DONE"], a2=["PROC"], b1=["DONE"], b2=["PROC"] * 5 + ["DONE"])
    began = time.monotonic()
    await write.write()
    assert 1.0 <= time.monotonic() - began < 30.0
    assert write.ends == {"b": (20, "")}
    assert [type(left.error).__name__ for left in write.writer.left()] == ["StalledError"]
    assert "nothing has moved for 1 s with 1 transfers in flight" in str(write.edges[0].last_error)
    write.writer.forget("a")
    assert write.ends["a"] == (10, "StalledError")


async def test_a_process_that_stood_still_takes_no_edge_for_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = [0.0]
    monkeypatch.setattr(writes, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + slept[0]))
    write = Written(1e6, 30.0, a1=["PROC"] * 30 + ["DONE"], a2=["DONE"], b1=["DONE"], b2=["DONE"])
    task = asyncio.create_task(write.write())
    await asyncio.sleep(0)
    slept[0] = 1000.0
    await task
    assert write.ends == {"a": (20, ""), "b": (20, "")}


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


# --------------------------------------------------------------------------------------------------------- its cargo
class Loads(Handles):
    """A NIXL whose handles are made as chunks are loaded: ``peer`` and the chunk's number."""

    def get_xfer_descs(self, table: Any, memory: str) -> Any:
        return table

    def initialize_xfer(self, operation: str, local: Any, remote: Any, peer: str, notice: bytes) -> Any:
        number = int(remote[0, 0]) // 256
        self.answers.setdefault(f"{peer}{number}", ["DONE"])
        return Handle(f"{peer}{number}")


class Handle(str):
    def release(self) -> None: ...


class Pack:
    """Packed as soon as it is begun."""

    def begin(self, pack: Any, shift: int) -> Any:
        done: asyncio.Future[None] = asyncio.Future()
        done.set_result(None)
        return done


class Loaded:
    """Writes of edges with a cargo of three packed chunks each, through one ring."""

    def __init__(self, places: int, **answers: list[str]) -> None:
        self.nixl = Loads(**answers)
        self.ring = PackingRing(Region(1 << 20, 256 * places))
        self.told: list[EdgeResult] = []
        self.writers: list[Writer] = []
        straight = np.empty((0, 3), np.uint64)
        chunks = tuple(
            CargoChunk(n, 256, 256, lambda shift=0: None, straight, np.array([[256 * n, 256, 0]], np.uint64))
            for n in range(3)
        )
        cargo = Cargo(Berth(0, 0, 256, 3, 768), chunks, "DRAM", "DRAM")
        self.edges = {peer: Edge(peer, [], lambda region, offset: "x", cargo) for peer in "ab"}

    async def write(self, peers: str, seconds: float = 60.0) -> list[EdgeResult]:
        bindings: Any = SimpleNamespace(errors=(RuntimeError, ConnectionError), disconnected=ConnectionError)
        packer: Any = Pack()
        self.writers.append(
            Writer("trainer/0", self.nixl, bindings, in_flight=9, deadline=time.monotonic() + seconds,
                   ended=self.told.append, loading=Loading(RoundName(1, 1), self.ring, packer))
        )  # fmt: skip
        return await self.writers[-1].write([self.edges[peer] for peer in peers])


async def test_transfers_are_posted_as_their_slots_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they are, and the time in which there is nothing to send says nothing of the link."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 1e-3 * next(ticks), sleep=time.sleep)
    monkeypatch.setattr(writes, "time", clock)
    nixl, filled = Handles(late=["DONE"], early=["DONE"], last=["DONE"]), [0]
    transfers = [
        Transfer(10, 1, lambda: "x", name, number=n, needs=needs)
        for n, (name, needs) in enumerate((("late", 200), ("early", 100), ("last", 300)))
    ]
    edge = Edge("a", [], lambda region, offset: "x", transfers=transfers)
    bindings: Any = SimpleNamespace(errors=(RuntimeError,), disconnected=ConnectionError)
    packer: Any = Pack()
    loading = Loading(RoundName(1, 1), None, packer, lambda: filled[0])
    writer = Writer("trainer/0", nixl, bindings, in_flight=9, deadline=math.inf, ended=lambda end: None,
                    loading=loading, stall_seconds=0.01)  # fmt: skip
    task = asyncio.create_task(writer.write([edge]))
    for offset, posted in ((0, []), (100, ["early"]), (250, ["early", "late"]), (300, ["early", "late", "last"])):
        filled[0] = offset
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert nixl.posted == posted
    [result] = await task
    assert (result.error, result.bytes) == (None, 30)
    assert result.seconds < 0.3, "of more than a second"


async def test_more_chunks_than_places_go_through_the_ring() -> None:
    write = Loaded(1)
    results = await write.write("ab")
    assert [(result.error, result.bytes, result.descriptors) for result in results] == [(None, 768, 3), (None, 768, 3)]
    assert sorted(write.nixl.posted) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert not write.edges["a"].loads


async def test_a_chunk_that_hangs_holds_its_place_and_what_remains_serves_the_others() -> None:
    write = Loaded(2, a1=["PROC"])
    hung, sent = await write.write("ab", seconds=0.05)
    assert (sent.error, sent.bytes) == (None, 768)
    assert hung.bytes == 512
    assert "trainer/0 → a at chunk 1 of 3: the deadline passed with 1 transfers in flight" in str(hung.error)
    assert write.edges["a"].tainted
    [again] = await write.write("b")
    assert (again.error, again.bytes) == (None, 768), "the other place goes round"


async def test_where_no_place_remains_an_edge_fails_at_once_and_by_name() -> None:
    write = Loaded(1, a0=["PROC"])
    await write.write("a", seconds=0.05)
    [lost] = await write.write("b")
    assert "no packing chunk is left: writes to a have not ended" in str(lost.error)
    write.nixl.answers["a0"] = ["DONE"]
    write.writers[0].settle()
    assert [end.peer for end in write.told] == ["b", "a"]
    assert not write.edges["a"].tainted
    [sent] = await write.write("b")
    assert (sent.error, sent.bytes) == (None, 768)


async def test_a_chunk_that_is_refused_ends_its_edge_and_frees_its_place() -> None:
    write = Loaded(1, a1=["gone"])
    refused, sent = await write.write("ab")
    assert isinstance(refused.error, DisconnectedError)
    assert "at chunk 1 of 3" in str(refused.error)
    assert (refused.bytes, write.edges["a"].broken) == (256, True)
    assert (sent.error, sent.bytes) == (None, 768)


async def test_of_a_peer_that_is_gone_nothing_holds_a_place() -> None:
    write = Loaded(1, a0=["PROC"])
    await write.write("a", seconds=0.05)
    write.writers[0].forget("a")
    assert [end.peer for end in write.told] == ["a"]
    [sent] = await write.write("b")
    assert sent.error is None


class Hands:
    """Packed when the test says so. ``two``: that two chunks are under way."""

    def __init__(self) -> None:
        self.begun: list[asyncio.Future[None]] = []
        self.two = asyncio.Event()

    def begin(self, pack: Any, shift: int) -> Any:
        self.begun.append(asyncio.Future())
        if len(self.begun) == 2:
            self.two.set()
        return self.begun[-1]


@pytest.mark.parametrize("end", ["stopped", "late", "gone"])
async def test_an_edge_is_over_when_nothing_packs_for_it_any_more(end: str) -> None:
    """Whoever hears of its end may write where it packs: an engine that lends packs in its landing."""
    write, hands = Loaded(3), Hands()
    packer: Any = hands
    bindings: Any = SimpleNamespace(errors=(RuntimeError, ConnectionError), disconnected=ConnectionError)
    writer = Writer(
        "trainer/0", write.nixl, bindings, in_flight=9, deadline=time.monotonic() + (0.05 if end == "late" else 60),
        ended=write.told.append, loading=Loading(RoundName(1, 1), write.ring, packer),
    )  # fmt: skip
    task = asyncio.create_task(writer.write([write.edges["a"]]))
    await hands.two.wait()
    if end == "stopped":
        writer.stop({"a"}, "another version lands here")
    elif end == "gone":
        writer.forget("a")
    await task
    writer.settle()
    assert write.told == []
    hands.begun[0].set_result(None)
    writer.settle()
    assert write.told == []
    hands.begun[1].set_result(None)
    writer.settle()
    assert [told.peer for told in write.told] == ["a"]
    assert writer.over


async def test_an_edge_that_broke_while_it_was_packed_is_told_of_within_the_write() -> None:
    """For it is tried again there."""
    write, hands = Loaded(3, a0=["gone"]), Hands()
    packer: Any = hands
    bindings: Any = SimpleNamespace(errors=(RuntimeError, ConnectionError), disconnected=ConnectionError)
    writer = Writer(
        "trainer/0", write.nixl, bindings, in_flight=9, deadline=time.monotonic() + 60, ended=write.told.append,
        loading=Loading(RoundName(1, 1), write.ring, packer),
    )  # fmt: skip
    task = asyncio.create_task(writer.write([write.edges["a"]]))
    await hands.two.wait()
    hands.begun[0].set_result(None)
    await asyncio.sleep(0.05)
    assert (write.told, task.done()) == ([], False)
    hands.begun[1].set_result(None)
    [broken] = await task
    assert isinstance(broken.error, DisconnectedError)
    assert write.told == [broken]


async def test_a_peer_whose_word_is_waited_for_is_looked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks are written and none was scattered: NIXL has nothing in flight that would end."""
    monkeypatch.setattr(writes, "PROBE_SECONDS", 0.0)
    write = Loaded(3)
    edge = write.edges["a"]
    assert edge.cargo is not None
    edge.cargo = Cargo(Berth(0, 0, 256, 3, 768, passes=True), edge.cargo.chunks, "DRAM", "DRAM")
    bindings: Any = SimpleNamespace(errors=(RuntimeError,), disconnected=ConnectionError)
    packer: Any = Pack()
    looks = iter(["PROC", "DONE", "ERR"])
    writer = Writer(
        "trainer/0", write.nixl, bindings, in_flight=9, deadline=time.monotonic() + 60, ended=write.told.append,
        loading=Loading(RoundName(1, 1), write.ring, packer), probe=lambda peer: (next(looks), ConnectionError("gone")),
    )  # fmt: skip
    [lost] = await writer.write([edge])
    assert isinstance(lost.error, DisconnectedError)
    assert "at the peer has yet to scatter 3 of 3 chunks" in str(lost.error)
    assert edge.broken
