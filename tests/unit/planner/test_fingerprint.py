"""Fingerprints: what they depend on, and what they do not."""

from dataclasses import replace

import pytest
from layouts import engine_rank, matrices, party_of, trainer
from weightsync.orchestrator.planner import Party, make_plan
from weightsync.orchestrator.planner.fingerprint import (
    FINGERPRINT_CHARS,
    PartyDigest,
    part_fingerprint,
    root_fingerprint,
)
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Region


@pytest.mark.parametrize("change", ["incarnation", "regions", "expert_map", "rows"])
def test_fingerprints_follow_what_they_depend_on(change):
    model = matrices(4)
    sources = [party_of(trainer(r), model[2 * r : 2 * r + 2]) for r in range(2)]
    targets = [party_of(engine_rank("a"), model[:2]), party_of(engine_rank("b"), model[2:])]
    before = make_plan(sources, targets)
    old = targets[0]
    layout = old.layout
    if change == "regions":
        layout = type(layout)(layout.tensors, (Region(4096, layout.regions[0].length),), layout.rows)
    elif change == "expert_map":
        layout = type(layout)(layout.tensors, layout.regions, layout.rows, expert_map="other")
    elif change == "rows":
        rows = layout.matrix().copy()
        layout = type(layout)(layout.tensors, layout.regions, rows[::-1].tobytes())
    incarnation = 2 if change == "incarnation" else 1
    after = make_plan(sources, [Party(old.member, incarnation, layout), targets[1]])
    same = {m for m in before.parts if before.part(m).fingerprint == after.part(m).fingerprint}
    assert {engine_rank("b"), trainer(1)} <= same
    assert engine_rank("a") not in same
    assert (trainer(0) in same) == (change in ("expert_map", "rows"))


def test_a_parts_fingerprint_follows_layout_peers_table_and_bytes():
    own, peer = PartyDigest(b"layout", b"where"), PartyDigest(b"other", b"there")
    berth = Berth(1, 0, 256, 4, 5120)
    base = part_fingerprint(own, [peer], [berth], b"copies", 8)
    assert len(base) == FINGERPRINT_CHARS
    assert part_fingerprint(own, [replace(peer, layout=b"changed")], [berth], b"copies", 8) == base
    changed = [
        part_fingerprint(replace(own, layout=b"changed"), [peer], [berth], b"copies", 8),
        part_fingerprint(own, [replace(peer, where=b"moved")], [berth], b"copies", 8),
        part_fingerprint(own, [peer], [None], b"copies", 8),
        part_fingerprint(own, [peer], [Berth(1, 0, 256, 8, 5120)], b"copies", 8),
        part_fingerprint(own, [peer], [berth], b"copied", 8),
        part_fingerprint(own, [peer], [berth], b"copies", 9),
    ]
    assert len({base, *changed}) == 7


def test_the_root_depends_on_all_parts_and_not_on_their_order():
    parts = [(trainer(0), "a"), (engine_rank("e"), "b")]
    root = root_fingerprint(parts)
    assert len(root) == FINGERPRINT_CHARS
    assert root == root_fingerprint(dict(parts[::-1]))
    assert root != root_fingerprint([(trainer(0), "b"), (engine_rank("e"), "a")])
