"""When a writer says CLOSED, and what."""

from collections.abc import Callable

import pytest
from weightsync.agents.transport.grants import SAY_SECONDS, OpenGrant, not_written
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS
from weightsync.orchestrator.protocol.messages import Closed, Grant
from weightsync.orchestrator.protocol.names import NO_BYTES, Member, RoundName, Version

A, B, C, D = (Member("inference", name, 0) for name in "abcd")
ROUND = RoundName(3, 1)
GRANT = Grant(round=ROUND, version=Version(7, 1), fingerprint="f", members=(A, B, C, D), deadline_seconds=1.0)


class Clock:
    """Calls that are due later; ``passes`` makes them."""

    def __init__(self) -> None:
        self.due: list[Due] = []

    def later(self, seconds: float, work: Callable[[], None]) -> "Due":
        assert seconds == SAY_SECONDS
        self.due.append(Due(work))
        return self.due[-1]

    def passes(self) -> None:
        due, self.due = self.due, []
        for call in due:
            if not call.cancelled:
                call.work()


class Due:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.cancelled = work, False

    def cancel(self) -> None:
        self.cancelled = True


class Opened(OpenGrant):
    """A grant whose words are kept in ``said``."""

    def __init__(self) -> None:
        self.said: list[Closed] = []
        self.clock = Clock()
        super().__init__(GRANT, self.said.append, self.clock.later)


@pytest.fixture
def grant() -> Opened:
    return Opened()


def sent(member: Member) -> PeerTransfer:
    return PeerTransfer(member, 100, 1, 0.1, (1, 2))


def closed(*peers: PeerTransfer, final: bool = False) -> Closed:
    return Closed(round=ROUND, peers=peers, final=final)


def test_edges_that_end_together_are_told_together(grant: Opened) -> None:
    for member in (B, A, D, C):
        grant.ended(sent(member))
    grant.clock.passes()
    assert grant.said == [closed(sent(B), sent(A), sent(D), sent(C), final=True)]
    assert grant.final


def test_those_that_have_ended_do_not_wait_for_the_others(grant: Opened) -> None:
    grant.ended(sent(A))
    assert grant.said == []
    grant.clock.passes()
    grant.clock.passes()
    assert grant.said == [closed(sent(A))]
    grant.ended(sent(B))
    grant.ended(sent(C))
    grant.clock.passes()
    grant.ended(sent(D))
    assert grant.said[1:] == [closed(sent(A), sent(B), sent(C)), closed(sent(A), sent(B), sent(C), sent(D), final=True)]
    grant.clock.passes()
    assert len(grant.said) == 3


def test_the_first_failure_is_told_at_once_with_all_that_has_ended(grant: Opened) -> None:
    grant.ended(sent(A))
    grant.ended(not_written(B, "the peer is gone"))
    lost = PeerTransfer(B, 0, 0, 0.0, NO_BYTES, "the peer is gone")
    assert grant.said == [closed(sent(A), lost)]
    grant.ended(not_written(C, "the peer is gone, too"))
    assert len(grant.said) == 1
    grant.clock.passes()
    assert len(grant.said) == 2
    assert not grant.final
    assert grant.open == {D}


def test_an_end_is_told_once(grant: Opened) -> None:
    grant.ended(sent(A))
    grant.ended(not_written(A, "stopped"))
    grant.ended(sent(Member("inference", "stranger", 0)))
    grant.clock.passes()
    assert grant.said == [closed(sent(A))]


def test_peers_that_are_owed_nothing_are_not_waited_for(grant: Opened) -> None:
    grant.leave({A, B})
    assert (grant.open, grant.said) == ({A, B}, [])
    grant.ended(sent(A))
    grant.ended(sent(B))
    assert grant.said == [closed(sent(A), sent(B), final=True)]


def test_a_grant_to_peers_that_are_owed_nothing_is_closed_at_once(grant: Opened) -> None:
    grant.leave(())
    grant.leave(())
    assert grant.said == [closed(final=True)]


def test_a_refusal_is_the_last_word(grant: Opened) -> None:
    grant.leave((), "x" * 2 * MAX_REASON_CHARS, "trainer", retry=False)
    [refused] = grant.said
    assert (refused.final, refused.fault, refused.retry, refused.peers) == (True, "trainer", False, ())
    assert len(refused.error) == MAX_REASON_CHARS


def test_a_failure_of_our_own_is_told_at_once_and_ends_with_what_is_in_flight(grant: Opened) -> None:
    grant.ended(sent(A))
    grant.leave({B}, "out of memory", "trainer")
    assert grant.said == [Closed(round=ROUND, peers=(sent(A),), final=False, error="out of memory", fault="trainer")]
    late = not_written(B, "the write was cut off")
    grant.ended(late)
    assert grant.said[-1] == Closed(
        round=ROUND, peers=(sent(A), late), final=True, error="out of memory", fault="trainer"
    )


def test_who_is_stopped_before_anything_is_posted_has_ended(grant: Opened) -> None:
    """Whatever keeps it from that: a digest hangs with the device that computes it."""
    assert grant.stop({B}, "left out") == frozenset()
    assert grant.said == [closed(not_written(B, "left out"))]
    assert grant.stop({A, B, C, D}, "it is over") == frozenset()
    assert grant.final
    assert {end.peer: end.error for end in grant.said[-1].peers} == {
        B: "left out", A: "it is over", C: "it is over", D: "it is over",
    }  # fmt: skip


def test_only_what_has_not_ended_can_be_stopped(grant: Opened) -> None:
    grant.posting = True
    grant.ended(sent(A))
    assert grant.stop({A, B, Member("inference", "stranger", 0)}, "left out") == {B}
    assert grant.stopped == {B: "left out"}
    assert grant.open == {B, C, D}, "it ends when nothing is in flight to it"


def test_a_reason_is_cut() -> None:
    assert len(not_written(A, "x" * 2 * MAX_REASON_CHARS).error) == MAX_REASON_CHARS


def test_the_last_word_can_be_repeated_and_no_other(grant: Opened) -> None:
    grant.ended(sent(A))
    grant.repeat()
    assert grant.said == []
    grant.leave(())
    grant.repeat()
    assert grant.said == [closed(sent(A), final=True)] * 2
