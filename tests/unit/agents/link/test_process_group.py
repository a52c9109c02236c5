"""Both ends of the group's talk over a double of it; real groups are tested beside the daemon's child process."""

from datetime import timedelta
from typing import Any

import pytest
from weightsync.agents.link import process_group
from weightsync.agents.link.process_group import SHORTEST_WAIT_SECONDS, GroupError, Rank0, SpgRendezvous
from weightsync.orchestrator.protocol.codec import encode
from weightsync.orchestrator.protocol.group import Barrier, Deliver, Gather, Join, PipePiece
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Announce, Connect, Ready, TcpStoreRendezvous

ANNOUNCE = Announce(layout=Layout(tensors=(), regions=(), rows=b""))
CONNECT = Connect(fingerprint="f", root="r", peers=(), copies=b"", expected_bytes=1)
READY = Ready(fingerprint="f")


class Store:
    """Takes the timeout of the next wait."""

    def __init__(self) -> None:
        self.timeouts: list[timedelta] = []

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeouts.append(timeout)


class GroupDouble:
    """What all ranks have said, in the order of each; a wait for what nobody has said fails at once."""

    def __init__(self) -> None:
        self.store = Store()
        self.said: dict[tuple[int, int | None], list[Any]] = {}
        self.ranks: list[tuple[str, int, int, int, float]] = []

    def as_rank(self, rank: int) -> "Rank":
        return Rank(self, rank)


class Rank:
    """The group as one rank calls it."""

    def __init__(self, group: GroupDouble, rank: int) -> None:
        self.store, self._group, self._rank = group.store, group, rank

    def broadcast_obj(self, obj: Any, src: int) -> Any:
        if src == self._rank:
            self._group.said.setdefault((src, None), []).append(obj)
            return obj
        return self._take(src, None)

    def send_obj(self, obj: Any, dst: int) -> None:
        self._group.said.setdefault((self._rank, dst), []).append(obj)

    def recv_obj(self, src: int) -> Any:
        return self._take(src, self._rank)

    def _take(self, src: int, dst: int | None) -> Any:
        waiting = self._group.said.get((src, dst))
        if not waiting:
            raise TimeoutError(f"nothing of rank {src}")
        return waiting.pop(0)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> GroupDouble:
    made = GroupDouble()

    def join(host: str, port: int, rank: int, world: int, timeout_seconds: float) -> Rank:
        made.ranks.append((host, port, rank, world, timeout_seconds))
        return made.as_rank(rank)

    monkeypatch.setattr(process_group, "join_group", join)
    return made


def agents(count: int) -> list[SpgRendezvous]:
    return [SpgRendezvous(TcpStoreRendezvous("h", 29501, rank, count + 1, 60.0)) for rank in range(1, count + 1)]


def joined(count: int) -> Rank0:
    rank0 = Rank0()
    assert list(rank0.perform(Join("h", 29501, count + 1, 60.0))) == []
    return rank0


def test_everybody_joins_by_its_rank(group: GroupDouble) -> None:
    agents(2)
    joined(2)
    assert group.ranks == [("h", 29501, 1, 3, 60.0), ("h", 29501, 2, 3, 60.0), ("h", 29501, 0, 3, 60.0)]


def test_what_agents_say_is_gathered_in_the_order_of_ranks(group: GroupDouble) -> None:
    first, second = agents(2)
    rank0 = joined(2)
    second.ready(READY)
    first.announce(ANNOUNCE)
    assert list(rank0.perform(Gather(5.0))) == [PipePiece(1, encode(ANNOUNCE)), PipePiece(2, encode(READY))]


def test_all_ranks_of_a_gather_share_one_deadline(group: GroupDouble) -> None:
    for agent in agents(3):
        agent.ready(READY)
    list(joined(3).perform(Gather(0.0)))
    assert group.store.timeouts == [timedelta(seconds=SHORTEST_WAIT_SECONDS)] * 3


def test_a_connect_reaches_the_one_that_it_is_for(group: GroupDouble) -> None:
    first, second = agents(2)
    assert list(joined(2).perform(Deliver(2, encode(CONNECT)))) == []
    assert second.connect() == CONNECT
    with pytest.raises(GroupError, match="did not carry Connect: nothing of rank 0"):
        first.connect()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"junk", "the daemon's Connect is malformed"),
        (encode(READY), "the daemon's Connect is malformed"),
        ("a pickle of something else", "carried a str instead of bytes"),
    ],
)
def test_what_is_no_connect_is_an_error(group: GroupDouble, data: object, reason: str) -> None:
    (agent,) = agents(1)
    group.as_rank(0).send_obj(data, 1)
    with pytest.raises(GroupError, match=reason):
        agent.connect()


def test_a_silent_rank_is_named(group: GroupDouble) -> None:
    first, _ = agents(2)
    rank0 = joined(2)
    first.ready(READY)
    with pytest.raises(GroupError, match="what rank 2 says: nothing of rank 2"):
        list(rank0.perform(Gather(5.0)))


def test_a_barrier_is_arrive_be_let_go_and_leave(group: GroupDouble) -> None:
    (agent,) = agents(1)
    rank0 = joined(1)
    group.as_rank(0).broadcast_obj(b"go", src=0)  # one thread plays both: the word is there before it is waited for
    agent.barrier(7.0)
    assert group.store.timeouts == [timedelta(seconds=7.0)]
    assert group.said[1, None] == [b"arrived", b"left"]
    assert list(rank0.perform(Barrier(5.0))) == []
    assert group.said[0, None] == [b"go"]


def test_a_rank_that_says_something_else_at_the_barrier_is_named(group: GroupDouble) -> None:
    (agent,) = agents(1)
    rank0 = joined(1)
    agent.ready(READY)
    with pytest.raises(GroupError, match=f"rank 1 is not at the barrier: {len(encode(READY))} bytes"):
        list(rank0.perform(Barrier(5.0)))
