"""Places of the packing ring: in turn, at most one's part, and held by whoever has been given up."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from weightsync.agents.transport.nixl import ring as rings
from weightsync.agents.transport.nixl.ring import PackingRing
from weightsync.orchestrator.protocol.layout import Region


@dataclass(eq=False)
class Edge:
    peer: str
    stopped: bool = False


def ring_of(places):
    return PackingRing(Region(4096, places * 256))


@pytest.fixture
def pair():
    """A ring of four places, and two edges that write."""
    ring, a, b = ring_of(4), Edge("a"), Edge("b")
    ring.join(a)
    ring.join(b)
    return ring, a, b


def test_places_are_chunks_of_the_region():
    ring = PackingRing(Region(4096, 64 << 20))
    assert (ring.chunk_bytes, ring.offset(3)) == (8 << 20, 24 << 20)


def test_one_that_writes_alone_leaves_a_place_for_whoever_begins_later():
    ring, edge, later = ring_of(4), Edge("a"), Edge("b")
    ring.join(edge)
    assert [ring.take(edge) for _ in range(4)] == [0, 1, 2, None]
    ring.give(2)
    assert ring.take(edge) == 3
    ring.join(later)
    assert ring.take(later) == 2


def test_of_two_places_one_that_writes_alone_has_both_to_pack_in_and_to_write_from():
    ring, edge = ring_of(2), Edge("a")
    ring.join(edge)
    assert [ring.take(edge) for _ in range(3)] == [0, 1, None]


def test_one_that_has_more_than_its_part_owes_it_to_those_that_wait():
    ring, a, b = ring_of(4), Edge("a"), Edge("b")
    ring.join(a)
    held = [ring.take(a) for _ in range(3)]
    ring.join(b)
    assert not ring.owes(a), "nobody waits"
    assert ring.take(b) == 3
    assert ring.take(b) is None
    assert (ring.owes(a), ring.owes(b)) == (True, False)
    ring.give(held.pop())
    assert not ring.owes(a)
    assert ring.take(b) == 2


def test_what_is_stuck_is_nobodys_part():
    ring, a, b, c = ring_of(5), Edge("a"), Edge("b"), Edge("c")
    ring.join(a)
    for _ in range(4):
        ring.take(a)
    a.stopped = True
    ring.leave(a)
    ring.give(0)
    ring.join(b)
    ring.join(c)
    assert [ring.take(b), ring.take(b)] == [4, None], "of two that are left, one is its part"
    assert ring.take(c) == 0


def test_one_that_asks_no_more_loses_its_turn(monkeypatch):
    ring, slow, quick = ring_of(1), Edge("slow"), Edge("quick")
    now = [0.0]
    monkeypatch.setattr(rings, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for edge in (slow, quick):
        ring.join(edge)
    assert [ring.take(quick), ring.take(slow)] == [0, None]
    ring.give(0)
    assert ring.take(quick) is None, "the other's turn"
    now[0] = 2 * rings.TURN_SECONDS
    assert ring.take(quick) == 0
    assert ring.take(slow) is None, "it waits again"
    ring.give(0)
    assert ring.take(quick) is None
    assert ring.take(slow) == 0


def test_no_edge_holds_more_than_its_part(pair):
    ring, a, b = pair
    assert [ring.take(a) for _ in range(3)] == [0, 1, None]
    assert [ring.take(b) for _ in range(3)] == [2, 3, None]
    ring.leave(b)
    ring.give(3)
    assert ring.take(a) == 3, "one that has left takes none"


def test_places_suffice_while_each_edge_that_may_hold_one_has_its_own(pair):
    ring, a, b = pair
    others = [Edge(str(number)) for number in range(3)]
    for edge in others[:2]:
        ring.join(edge)
    assert ring.suffices
    ring.join(others[2])
    assert not ring.suffices
    ring.take(a)
    a.stopped = True
    ring.leave(a)
    assert not ring.suffices, "what a write that was given up holds may stay held"
    ring.leave(b)
    assert ring.suffices


def test_more_edges_than_places_take_turns():
    ring, edges = ring_of(1), [Edge(str(number)) for number in range(3)]
    for edge in edges:
        ring.join(edge)
    assert [ring.take(edge) for edge in edges] == [0, None, None]
    ring.give(0)
    assert ring.take(edges[0]) is None, "the others have waited"
    assert ring.take(edges[1]) == 0
    ring.leave(edges[2])
    ring.give(0)
    assert ring.take(edges[0]) == 0


def test_what_is_held_by_writes_that_were_given_up_is_lost_until_they_end(pair):
    ring, a, b = pair
    held = [ring.take(a), ring.take(a)]
    a.stopped = True
    ring.leave(a)
    assert [ring.take(b), ring.take(b), ring.take(b)] == [2, 3, None]
    assert ring.lost() == (), "b's own come back"
    ring.give(2)
    ring.give(3)
    assert ring.lost() == ()
    assert [ring.take(b), ring.take(b)] == [2, 3]
    b.stopped = True
    ring.leave(b)
    late = Edge("late")
    ring.join(late)
    assert ring.take(late) is None
    assert ring.lost() == ("a", "b")
    ring.give(held[0])
    assert ring.lost() == ()
    assert ring.take(late) == held[0]
