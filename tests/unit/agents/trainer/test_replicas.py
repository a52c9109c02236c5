"""All ranks leave a section together, also when one fails, and hear why; none waits for one that will not come."""

import threading
import time

import pytest
import torch.distributed as dist
from weightsync.agents.trainer import replicas
from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.replicas import ALONE, TrainerRanks


def test_nobody_goes_on_before_a_slow_one(in_ranks):
    waiting, left = threading.Barrier(4), []

    def body(rank):
        ranks = TrainerRanks()
        with ranks.section():
            waiting.wait(30)
            if rank == 2:
                time.sleep(0.2)
                assert not left
            ranks.agree(seconds=30)
        left.append(rank)

    in_ranks(4, body)
    assert sorted(left) == [0, 1, 2, 3]


@pytest.mark.parametrize("who", [0, 2])
def test_a_failure_reaches_every_rank_and_stays_its_own_at_home(in_ranks, who):
    def publish(ranks):
        with ranks.section():
            if ranks.rank == who:
                raise KeyError("model.norm.weight")
            ranks.agree(seconds=30)

    def body(rank):
        ranks = TrainerRanks()
        with pytest.raises(KeyError if rank == who else ReplicaFailed) as caught:
            publish(ranks)
        with ranks.section():  # the next one meets: nobody was left behind
            assert ranks.agree(f"{rank}", seconds=30) == ("0", "1", "2", "3")
        return caught.value

    errors = in_ranks(4, body)
    assert {(error.rank, error.reason) for rank, error in enumerate(errors) if rank != who} == {
        (who, "KeyError: 'model.norm.weight'")
    }


def test_who_tries_again_meets_who_comes_late(in_ranks):
    """A rank that failed three times is three sections ahead; the other hears of each."""

    def body(rank):
        ranks, failures = TrainerRanks(), 0
        while True:
            try:
                with ranks.section():
                    if rank == 0 and failures < 3:
                        raise OSError("disk")
                    time.sleep(0.1)
                    return failures, ranks.agree(seconds=30)
            except (OSError, ReplicaFailed):
                failures += 1

    assert in_ranks(2, body) == [(3, ("", ""))] * 2


def test_what_the_first_rank_does_for_all_fails_for_all(in_ranks):
    def body(rank):
        ranks = TrainerRanks()
        with pytest.raises(OSError if rank == 0 else ReplicaFailed, match="read-only"), ranks.section():
            ranks.agree(seconds=30, then=refuse)

    def refuse(said):
        assert said == ("", "", "")
        raise OSError("read-only")

    in_ranks(3, body)


def test_a_rank_that_does_not_come_is_named_to_all(in_ranks):
    alive = []

    def body(rank):
        ranks = TrainerRanks()
        alive.append(ranks)
        if rank == 2:
            return
        with pytest.raises(ReplicaFailed, match=r"rank 2: not come within 0\.5 s"), ranks.section():
            ranks.agree(seconds=0.5 if rank == 0 else 30)

    in_ranks(3, body)


def test_a_closed_rank_is_waited_for_by_nobody_but_its_last_word_counts(in_ranks):
    def body(rank):
        ranks = TrainerRanks()
        with ranks.section():
            ranks.agree(seconds=30)
        if rank == 1:
            ranks.close()
            return
        with pytest.raises(ReplicaFailed, match="rank 1: its agent was closed"), ranks.section():
            ranks.agree(seconds=30)

    in_ranks(3, body)


def test_looking_is_enough_to_hear_of_a_failure(in_ranks):
    def wait(ranks):
        with ranks.section():
            if ranks.rank == 1:
                raise KeyboardInterrupt
            while True:
                ranks.look()
                time.sleep(0.01)

    def body(rank):
        with pytest.raises(KeyboardInterrupt if rank == 1 else ReplicaFailed):
            wait(TrainerRanks())

    in_ranks(2, body)


def test_keys_do_not_pile_up(in_ranks):
    def body(rank):
        ranks = TrainerRanks()
        for _ in range(20):
            with ranks.section():
                ranks.agree("x", seconds=30)
                ranks.agree("y", seconds=30)
        dist.barrier()
        return len(ranks._mine)

    assert max(in_ranks(2, body)) <= 8


def test_alone_it_asks_nobody():
    ranks, done = TrainerRanks(), []
    with ranks.section():
        assert ranks.agree("x", seconds=0, then=done.append) == ("x",)
        ranks.look()
    ranks.close()
    assert (ranks.rank, ranks.world, done) == (0, 1, [("x",)])


def test_a_rank_that_is_alone_in_its_job_meets_nobody(in_ranks):
    def body(rank):
        if rank != 1:
            return ("nobody",)  # these ranks come to no agreement
        ranks = TrainerRanks(ALONE)
        assert (ranks.rank, ranks.world) == (0, 1)
        with ranks.section():
            assert ranks.share(b"mine", 0, seconds=0) == b"mine"
            return ranks.agree("mine", seconds=0)

    assert in_ranks(3, body) == [("nobody",), ("mine",), ("nobody",)]


def test_bytes_of_one_rank_are_shared_whole(in_ranks):
    data = bytes(range(256)) * 5000

    def body(rank):
        ranks = TrainerRanks()
        with ranks.section():
            return ranks.share(data if rank == 1 else b"other", 1, seconds=30) == data

    assert in_ranks(3, body) == [True] * 3


def test_long_texts_are_cut(in_ranks):
    def body(rank):
        ranks = TrainerRanks()
        with ranks.section():
            return ranks.agree("é" * 5000 if rank == 1 else f"{rank}", seconds=30)

    for first, second in in_ranks(2, body):
        assert first == "0"
        assert second == "é" * 2000


def test_a_rank_that_said_its_part_and_closed_meanwhile_is_no_failure(in_ranks, monkeypatch):
    """Rank 0 gives its verdict and closes just between rank 1's two looks."""
    looked, gone = threading.Event(), threading.Event()

    def body(rank):
        ranks = TrainerRanks()
        if rank == 1:
            look = ranks.look

            def late_look():
                looked.set()
                assert gone.wait(30)
                look()

            monkeypatch.setattr(ranks, "look", late_look)
        with ranks.section():
            if rank == 0:
                assert looked.wait(30)  # rank 1 has seen that nothing is there yet
            said = ranks.agree(str(rank), seconds=30)
        if rank == 0:
            monkeypatch.setattr(replicas, "READ_SECONDS", 0.0)
            ranks.close()
            gone.set()
        return said

    assert in_ranks(2, body) == [("0", "1"), ("0", "1")]
