"""When the plan of a feed, or of a relay, does for what is wanted now."""

import dataclasses

import msgspec
import pytest
from fleets import rank
from weightsync.orchestrator.core.round.feed import Feed
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Version

BY = Connect(fingerprint="by", root="root", peers=(), copies=b"", expected_bytes=0)
RELAY = Feed(
    1,
    None,
    {"e1": "e0", "e2": "e0"},
    frozenset([(rank("e0"), 1), (rank("e1"), 2), (rank("e2"), 3)]),
    {rank("e0"): BY},
)
CATCH_UP = dataclasses.replace(RELAY, version=Version(7, 1), standby={})
FEWER = {"lenders": {"e2": "e0"}, "members": frozenset([(rank("e0"), 1), (rank("e2"), 3)])}


@pytest.mark.parametrize(
    ("feed", "other", "does"),
    [
        (RELAY, RELAY, True),
        (RELAY, dataclasses.replace(RELAY, number=2), True),
        (RELAY, dataclasses.replace(RELAY, **FEWER), True),
        (CATCH_UP, dataclasses.replace(CATCH_UP, **FEWER), False),
        (RELAY, dataclasses.replace(RELAY, lenders={"e1": "e2"}), False),
        (RELAY, dataclasses.replace(RELAY, members=frozenset([(rank("e0"), 9), (rank("e2"), 3)])), False),
        (RELAY, dataclasses.replace(RELAY, standby={rank("e0"): msgspec.structs.replace(BY, fingerprint="?")}), False),
        (RELAY, CATCH_UP, False),
    ],
)  # fmt: skip
def test_a_relay_does_for_fewer_takers_and_a_catch_up_for_its_own_alone(feed: Feed, other: Feed, does: bool) -> None:
    assert feed.serves(other) is does


def test_only_who_catches_up_runs_its_edges_in_the_place_of_the_trainers() -> None:
    assert (RELAY.borrowers, CATCH_UP.borrowers) == ({}, {"e1": "e0", "e2": "e0"})
