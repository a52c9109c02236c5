"""From what agents announced to what each of them is told."""

import dataclasses

import msgspec
import numpy as np
import pytest
from weightsync.orchestrator.core.commands import Announced, MakeNeeds, MakePlan
from weightsync.orchestrator.daemon.planning import Planning
from weightsync.orchestrator.planner import PlanError
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import (
    COPY_COLUMNS,
    COPY_STAGED,
    Layout,
    Region,
    Tensor,
    as_matrix,
    row,
)
from weightsync.orchestrator.protocol.messages import Announce
from weightsync.orchestrator.protocol.names import Member

ROWS, COLUMNS = 64, 1024
BYTES = ROWS * COLUMNS * 2


def announced(member: Member, first: int, end: int, *, dtype: str = "bfloat16", base: int = 1 << 20) -> Announced:
    """A party that holds rows ``[first, end)`` of the one tensor, densely, in one region."""
    box = row(0, 0, 0, (first, 0), (end - first, COLUMNS), (COLUMNS * 2, 2))
    rows = np.asarray([box], dtype="<i8").tobytes()
    region = Region(base, (end - first) * COLUMNS * 2)
    layout = Layout((Tensor("w", dtype, (ROWS, COLUMNS)),), (region,), rows)
    endpoint = str(member).encode()
    return Announced(
        member, 100 + member.rank, Announce(layout=layout, endpoint_name=f"of {member}", endpoint=endpoint)
    )


TRAINERS = tuple(announced(Member("trainer", "", rank), 32 * rank, 32 * rank + 32) for rank in (0, 1))
ENGINE = announced(Member("inference", "e0", 0), 0, ROWS, base=1 << 30)


def test_needs_are_those_of_all_engines_that_agree() -> None:
    other = announced(Member("inference", "e1", 0), 0, ROWS, dtype="float32", base=1 << 31)
    found = Planning().needs(MakeNeeds(1, (ENGINE, other)))
    assert found.needs.tensors == (Tensor("w", "bfloat16", (ROWS, COLUMNS)),)
    assert found.misfits == {"e1": "tensor 'w' has dtype bfloat16 at e0/0 but float32 at e1/0"}


def test_each_agent_is_told_its_own_edges() -> None:
    planning = Planning()
    assert planning.layouts("run") is None
    facts = planning.make(MakePlan(1, TRAINERS, (ENGINE,)))
    assert facts.proved
    assert facts.flows == {(trainer.member, ENGINE.member): BYTES // 2 for trainer in TRAINERS}
    assert facts.writers_of(frozenset({ENGINE.member})) == {t.member: (ENGINE.member,) for t in TRAINERS}
    assert set(facts.connects) == {party.member for party in (*TRAINERS, ENGINE)}
    for trainer in TRAINERS:
        connect = facts.connects[trainer.member]
        (peer,) = connect.peers
        assert (peer.member, peer.incarnation) == (ENGINE.member, ENGINE.incarnation)
        assert (peer.endpoint_name, peer.endpoint) == ("of e0/0", b"e0/0")
        assert peer.regions == ENGINE.announce.layout.regions
        assert connect.root == facts.root
    assert len({connect.fingerprint for connect in facts.connects.values()}) == 3


def test_the_view_names_every_party_of_the_present_plan() -> None:
    planning = Planning()
    root = planning.make(MakePlan(1, TRAINERS, (ENGINE,))).root
    view = planning.layouts("run")
    assert view is not None
    assert (view.run, view.root) == ("run", root)
    assert [party.name for party in view.parties] == ["trainer/0", "trainer/1", "e0/0"]


def test_a_plan_that_fails_leaves_the_last_one() -> None:
    planning = Planning()
    planning.make(MakePlan(1, TRAINERS, (ENGINE,)))
    before = planning.plan
    with pytest.raises(PlanError, match="'w' has dtype bfloat16 at trainer/0 but float16 at e0/0"):
        planning.make(MakePlan(2, TRAINERS, (announced(ENGINE.member, 0, ROWS, dtype="float16"),)))
    with pytest.raises(PlanError, match="w"):
        planning.make(MakePlan(3, TRAINERS[:1], (ENGINE,)))
    assert planning.plan is before


def test_another_incarnation_is_another_plan() -> None:
    """And the same parties make the same one."""
    planning = Planning()
    root = planning.make(MakePlan(1, TRAINERS, (ENGINE,))).root
    restarted = Announced(ENGINE.member, ENGINE.incarnation + 1, ENGINE.announce)
    assert planning.make(MakePlan(2, TRAINERS, (restarted,))).root != root
    assert planning.make(MakePlan(3, TRAINERS, (ENGINE,))).root == root


def test_another_endpoint_is_the_same_plan_and_its_writers_are_told() -> None:
    """Who has the fingerprint already is not told again."""
    planning = Planning()
    before = planning.make(MakePlan(1, TRAINERS, (ENGINE,)))
    elsewhere = msgspec.structs.replace(ENGINE.announce, endpoint_name="another of e0/0", endpoint=b"another")
    after = planning.make(MakePlan(2, TRAINERS, (Announced(ENGINE.member, ENGINE.incarnation, elsewhere),)))
    assert after.root == before.root
    changed = {m for m, connect in after.connects.items() if connect.fingerprint != before.connects[m].fingerprint}
    assert changed == {trainer.member for trainer in TRAINERS}
    assert {c.peers[0].endpoint_name for m, c in after.connects.items() if m in changed} == {"another of e0/0"}


def test_a_relay_reads_what_has_landed_where_it_has_landed() -> None:
    """Not the rows, which hold another version; its edges are others than those of a feed between the same two."""
    planning = Planning()
    seed, taker = (in_copy(Member("inference", name, 0), base) for name, base in (("e0", 1 << 31), ("e1", 1 << 32)))
    main = planning.make(MakePlan(1, TRAINERS, (seed, taker)))
    landed = {seed.member: main.connects[seed.member]}
    relay = planning.make(MakePlan(1, (seed,), (taker,), lends=True, standby=landed))
    feed = planning.make(MakePlan(2, (seed,), (taker,), lends=True))
    assert relay.flows == feed.flows == {(seed.member, taker.member): BYTES}
    writes, reads = relay.connects[seed.member], relay.connects[taker.member]
    assert (writes.lends, writes.relays, writes.landed) == (True, True, landed[seed.member].fingerprint)
    assert (reads.lends, reads.relays, reads.landed) == (False, True, "")
    assert {c.fingerprint for c in relay.connects.values()}.isdisjoint(c.fingerprint for c in feed.connects.values())
    staged = as_matrix(writes.copies, COPY_COLUMNS)[:, COPY_STAGED]
    assert (staged == -1).all(), "the bytes of a piece lie one behind the other, so nothing is packed"


def in_copy(member: Member, base: int) -> Announced:
    """All rows in live memory at ``base``, and a landing behind it."""
    party = announced(member, 0, ROWS, base=base)
    layout = party.announce.layout
    regions = (*layout.regions, Region(base + (1 << 28), arena_bytes(layout)))
    layout = msgspec.structs.replace(layout, regions=regions, staging=len(regions) - 1, lands="copy")
    said = msgspec.structs.replace(party.announce, layout=layout, lends_name="lends", lends=b"by this")
    return dataclasses.replace(party, announce=said)


def test_a_feed_is_of_engines_alone_and_leaves_the_trainers_plan() -> None:
    """Who writes is reached by the endpoint by which it lends; both sides know what travels."""
    planning = Planning()
    before = planning.make(MakePlan(1, TRAINERS, (ENGINE,))).root
    lender = dataclasses.replace(
        ENGINE, announce=msgspec.structs.replace(ENGINE.announce, lends_name="lends", lends=b"by this")
    )
    borrower = announced(Member("inference", "e1", 0), 0, ROWS, base=1 << 31)
    facts = planning.make(MakePlan(1, (lender,), (borrower,), lends=True))
    assert facts.flows == {(lender.member, borrower.member): BYTES}
    assert facts.proved
    mine, other = facts.connects[lender.member], facts.connects[borrower.member]
    assert (mine.lends, other.lends) == (True, False)
    assert [(peer.member, peer.endpoint) for peer in mine.peers] == [(borrower.member, b"e1/0")]
    assert [(peer.member, peer.endpoint_name, peer.endpoint) for peer in other.peers] == [
        (lender.member, "lends", b"by this")
    ]
    assert planning.plan is not None
    assert planning.plan.root == before
