"""What a rank owes its peers: proved against what the plan says, cut by group, kept while the plan leaves it alone."""

import pytest
from tiny_fleet import SHAPES, Target, made_slots, planned, rebuilt, replace_name, with_peers
from weightsync.agents.tables.runs import RUN_LENGTH, RUN_LOCAL_OFFSET
from weightsync.agents.transport.shares import PlanMismatch, Shares
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS
from weightsync.orchestrator.protocol.names import NO_BYTES, add_digests


@pytest.fixture
def plan(weights):
    """(shares, connect, targets) of one trainer rank and a tensor-parallel engine of two."""
    slots = made_slots(weights.state(SHAPES), 0)
    targets = [Target.of("a", rank, 0) for rank in range(2)]
    return Shares(slots.layout, slots.arenas), planned(slots, targets)[1], targets


def test_a_table_that_is_not_worth_its_bytes_is_refused(plan):
    shares, connect, _ = plan
    with pytest.raises(PlanMismatch, match="are worth") as caught:
        shares.replan(rebuilt(connect, copies=connect.copies[: -8 * COPY_COLUMNS]))
    assert (caught.value.fault, caught.value.retry) == ("daemon", False)
    with pytest.raises(PlanMismatch, match="peers that it does not name"):
        shares.replan(with_peers(connect, connect.peers[:1]))
    assert shares.digests() == {}


def test_each_peer_has_its_bytes_and_their_digest(plan):
    shares, connect, targets = plan
    owed = {share.peer.member: share for share in shares.replan(connect)}
    # Half of the sharded matrices (2 bytes an element), and all of the three norms of 64.
    halves = sum(2 * extent[0] * extent[1] // 2 for extent in SHAPES.values() if len(extent) == 2)
    assert {member: share.bytes for member, share in owed.items()} == {t.member: halves + 3 * 128 for t in targets}
    assert sum(share.bytes for share in owed.values()) == connect.expected_bytes
    digests = shares.digests()
    assert digests.keys() == owed.keys()
    assert add_digests(*digests.values()) != NO_BYTES


def test_no_run_belongs_to_two_groups(plan):
    shares, connect, _ = plan
    for share in shares.replan(connect):
        assert sorted(set(share.groups.tolist())) == [0, 1]
        layer = share.runs[share.groups == 0]
        outside = share.runs[share.groups == 1]
        # embed, lm_head and norm; the layer's seven matrices and two norms lie elsewhere in the arena.
        assert int(outside[:, RUN_LENGTH].sum()) == 2 * 48 * 64 * 2 + 128
        assert not set(layer[:, RUN_LOCAL_OFFSET].tolist()) & set(outside[:, RUN_LOCAL_OFFSET].tolist())


def test_shares_that_the_new_plan_leaves_alone_are_the_same_objects(plan):
    shares, connect, _ = plan
    first = shares.replan(connect)
    assert all(new is old for new, old in zip(shares.replan(connect), first, strict=True))
    moved = shares.replan(with_peers(connect, (connect.peers[0], replace_name(connect.peers[1], "a/1-new"))))
    assert moved[0] is first[0]
    assert moved[1] is not first[1]
