"""What a round moved by each kind of link, and which edges were slow: every figure worked out by hand."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.records import LinkUse, RoundEnded, SlowEdge, decode_record, encode_record
from weightsync.orchestrator.core.round.links import JUDGED_BYTES, MAX_SLOW, Seen, measured, used
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

MUCH = 10 * JUDGED_BYTES


def a_round(engines: dict[str, int], lands: Lands = "copy") -> Round:
    ranks = {Member("inference", name, number): 1 for name, world in engines.items() for number in range(world)}
    return Round(RoundName(1, 1), Version(7, 1), 1, False, {name: Progress(lands=lands) for name in engines}, ranks, {})


def close(current: Round, writer: int, peer: Member, seconds: float, size: int = MUCH, **about: Any) -> None:
    moved = PeerTransfer(peer, size, 1, seconds, (1, 2), **({"link": "nic", "by": "rc_mlx5/mlx5_0:1"} | about))
    current.closed.setdefault(trainer(writer), {})[peer] = moved


def test_by_kind_of_link_the_edges_the_bytes_and_the_longest() -> None:
    current = a_round({"a": 2, "b": 1})
    close(current, 0, rank("a", 0), 2.0)
    close(current, 1, rank("a", 1), 4.0, by="dc_mlx5/mlx5_1:1")
    close(current, 0, rank("b"), 0.5, link="nvlink", by="cuda_ipc/cuda")
    close(current, 1, rank("b"), 0.0, size=0, link="nvlink")
    assert used(current, {}) == {
        "nic": LinkUse(edges=2, bytes=2 * MUCH, seconds=4.0, ways=("dc_mlx5", "rc_mlx5"),
                       slow=(SlowEdge("trainer/1 → a/1", "dc_mlx5/mlx5_1:1", 0.168, 1.0),
                             SlowEdge("trainer/0 → a/0", "rc_mlx5/mlx5_0:1", 0.336, 1.0)), slow_edges=2),
        "nvlink": LinkUse(edges=1, bytes=MUCH, seconds=0.5, ways=("cuda_ipc",),
                          slow=(SlowEdge("trainer/0 → b/0", "cuda_ipc/cuda", 1.342, 10.0),), slow_edges=1),
    }  # fmt: skip


def test_many_senders_that_share_a_receivers_port_are_not_slow() -> None:
    """Each edge has a sixteenth of the port, and the port is full."""
    seen: Seen = {("nic", "copy"): 40e9}
    current = a_round({"a": 1})
    for writer in range(16):
        close(current, writer, rank("a"), 16 * MUCH / 40e9)
    assert used(current, seen)["nic"].slow_edges == 0


def test_the_edge_of_a_far_port_is_named_and_those_that_wait_beside_it_are_not() -> None:
    """Trainer 1 is at a tenth; both ranks hear of it late, and trainer 0, which is done in time, stays blameless."""
    current, fast = a_round({"a": 2}), MUCH / 20e9
    for number in range(2):
        close(current, 0, rank("a", number), 2 * fast)
        close(current, 1, rank("a", number), 20 * fast, by="rc_mlx5/mlx5_7:1")
    use = used(current, {})["nic"]
    assert [edge.edge for edge in use.slow] == ["trainer/1 → a/0", "trainer/1 → a/1"]
    assert [(edge.gb_per_s, edge.link_gb_per_s) for edge in use.slow] == [(2.0, 20.0)] * 2
    assert use.slow[0].by == "rc_mlx5/mlx5_7:1"


def test_a_link_is_held_to_what_it_did_before_but_only_where_engines_land_alike() -> None:
    seen: Seen = {}
    good = a_round({"a": 1})
    close(good, 0, rank("a"), MUCH / 30e9)
    assert used(good, seen)["nic"].slow_edges == 0
    assert seen == {("nic", "copy"): pytest.approx(30e9)}
    assert measured(seen | {("nic", "live"): 9e9, ("tcp", "live"): 0.0}) == {"nic": 30.0}
    for rate, slow in ((15.1e9, 0), (14.9e9, 1)):
        current = a_round({"a": 1})
        close(current, 0, rank("a"), MUCH / rate)
        assert used(current, seen)["nic"].slow_edges == slow
    live = a_round({"a": 1}, "live")
    close(live, 0, rank("a"), MUCH / 14.9e9)
    assert used(live, seen)["nic"].slow_edges == 0


def test_little_is_not_judged_and_what_no_hardware_is_as_slow_as_is_slow_at_once() -> None:
    small, first = a_round({"a": 1}), a_round({"a": 1})
    close(small, 0, rank("a"), 10.0, size=JUDGED_BYTES - 1)
    assert used(small, {})["nic"].slow_edges == 0
    close(first, 0, rank("a"), MUCH / 0.4e9, link="same_gpu", by="cuda_ipc/cuda")
    assert used(first, {})["same_gpu"].slow == (SlowEdge("trainer/0 → a/0", "cuda_ipc/cuda", 0.4, 100.0),)


def test_a_link_of_which_nobody_knows_anything_is_judged_by_itself_alone() -> None:
    current = a_round({"a": 1})
    close(current, 0, rank("a"), 100.0, link="unknown", by="")
    assert used(current, {})["unknown"] == LinkUse(edges=1, bytes=MUCH, seconds=100.0)


def test_of_a_thousand_slow_edges_a_few_are_named_and_the_record_is_taken_back() -> None:
    current = a_round({"a": 32})
    for writer in range(32):
        for number in range(32):
            close(current, writer, rank("a", number), 100.0 + writer)
    use = used(current, {})["nic"]
    assert (use.edges, use.slow_edges, len(use.slow)) == (1024, 1024, MAX_SLOW)
    row = RoundEnded(
        round=current.name, version=current.version, attempt=1, engines=("a",), left_out=(), outcome="committed",
        reason="", bytes=1, descriptors=1, times={}, links={"nic": use},
    )  # fmt: skip
    assert decode_record(encode_record(row)) == row


def test_what_an_engine_is_written_and_what_it_writes_on_are_not_one_stream() -> None:
    """Else the link would be held to a rate that it never had, and all others would be slow."""
    seen: Seen = {}
    current = a_round({"a": 1, "b": 1})
    close(current, 0, rank("a"), MUCH / 20e9)
    sent = PeerTransfer(rank("b"), MUCH, 1, MUCH / 20e9, (1, 2), link="nic", by="rc_mlx5/mlx5_0:1")
    current.closed[rank("a")] = {rank("b"): sent}
    use = used(current, seen)["nic"]
    assert (use.edges, use.bytes, use.slow_edges) == (2, 2 * MUCH, 0)
    assert seen == {("nic", "copy"): pytest.approx(20e9)}
