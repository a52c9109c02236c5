"""What a rank owes its peers: proved against what the plan says, cut by group, kept while the plan leaves it alone."""

import pytest
import torch
from tiny_fleet import LAYER, SHAPES, Target, made_slots, planned, rebuilt, replace_name, with_peers
from weightsync.agents.tables.spans import NOWHERE
from weightsync.agents.trainer.slots.finite import NonFinite
from weightsync.agents.transport import shares as shares_module
from weightsync.agents.transport.shares import PlanMismatch, Shares
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS
from weightsync.orchestrator.protocol.names import NO_BYTES, add_digests


@pytest.fixture
def slots(weights):
    return made_slots(weights.state(SHAPES), 0)


@pytest.fixture
def plan(slots):
    """(shares, connect, targets) of one trainer rank and a tensor-parallel engine of two."""
    targets = [Target.of("a", rank, 0) for rank in range(2)]
    return Shares(slots.layout, slots.arenas), planned(slots, targets)[1], targets


def test_a_table_that_is_not_worth_its_bytes_is_refused(plan):
    shares, connect, _ = plan
    with pytest.raises(PlanMismatch, match="are worth") as caught:
        shares.replan(rebuilt(connect, copies=connect.copies[: -8 * COPY_COLUMNS]))
    assert (caught.value.fault, caught.value.retry) == ("daemon", False)
    with pytest.raises(PlanMismatch, match="peers that it does not name"):
        shares.replan(with_peers(connect, connect.peers[:1]))
    assert shares.read().digests == {}


def test_each_peer_has_its_bytes_and_their_digest(plan):
    shares, connect, targets = plan
    owed = {share.peer.member: share for share in shares.replan(connect)}
    # Half of the sharded matrices (2 bytes an element), and all of the three norms of 64.
    halves = sum(2 * extent[0] * extent[1] // 2 for extent in SHAPES.values() if len(extent) == 2)
    assert {member: share.bytes for member, share in owed.items()} == {t.member: halves + 3 * 128 for t in targets}
    assert sum(share.bytes for share in owed.values()) == connect.expected_bytes
    digests = shares.read().digests
    assert digests.keys() == owed.keys()
    assert add_digests(*digests.values()) != NO_BYTES


def test_shares_that_the_new_plan_leaves_alone_are_the_same_objects(plan):
    shares, connect, _ = plan
    first = shares.replan(connect)
    assert all(new is old for new, old in zip(shares.replan(connect), first, strict=True))
    moved = shares.replan(with_peers(connect, (connect.peers[0], replace_name(connect.peers[1], "a/1-new"))))
    assert moved[0] is first[0]
    assert moved[1] is not first[1]


def test_reading_says_where_all_is_finite_and_so_what_is_left_to_look_at(plan, slots, weights):
    shares, connect, targets = plan
    assert shares.read().finite is NOWHERE
    shares.replan(connect)
    finite = shares.read().finite
    assert shares.read().finite is finite, "the same for as long as the plan is"
    slots.convert({name: torch.full(extent, torch.nan) for name, extent in SHAPES.items()})
    assert slots.nonfinite(finite) == (), "both peers together are owed all there is, and what is known is not read"
    state = weights.state(SHAPES) | {"model.norm.weight": torch.full((64,), torch.nan)}
    slots.convert(state)
    assert shares.read().finite is NOWHERE, "one that is not, and nothing is known"
    assert slots.nonfinite(shares.read().finite) == (NonFinite("model.norm.weight", 64, 64, blocks=False),)
    assert shares.read().digests.keys() == {target.member for target in targets}
    slots.convert(weights.state(SHAPES))
    assert shares.read().finite is finite


def test_what_nobody_is_owed_is_still_looked_at(slots, weights):
    """One of two tensor-parallel ranks alone: half of each matrix goes to nobody, and no digest reads it."""
    shares = Shares(slots.layout, slots.arenas)
    shares.replan(planned(slots, [Target.of("a", 0, 0)])[1])
    name = LAYER + "self_attn.o_proj.weight"
    state = weights.state(SHAPES)
    state[name][7, 40], state[name][9, 63] = torch.inf, -torch.inf
    slots.convert(state)
    finite = shares.read().finite
    assert finite is not NOWHERE, "columns from 32 on are the other rank's"
    assert slots.nonfinite(finite) == (NonFinite(name, 2, 64 * 64, blocks=False),)
    state[name][7, 31] = torch.inf
    slots.convert(state)
    assert shares.read().finite is NOWHERE
    assert slots.nonfinite() == (NonFinite(name, 3, 64 * 64, blocks=False),)


def test_what_is_written_meanwhile_is_digested_beside_the_wire(plan, monkeypatch):
    shares, connect, _ = plan
    asked, prepare = [], shares_module.prepare_digest
    monkeypatch.setattr(
        shares_module, "prepare_digest", lambda *given, beside: asked.append(beside) or prepare(*given, beside=beside)
    )
    assert len(shares.replan(connect)) == len(asked) == 2
    assert set(asked) == {"wire"}
