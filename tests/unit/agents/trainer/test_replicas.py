"""All replicas leave a publish together, also when one fails, and hear why."""

import threading

import pytest
import torch.distributed as dist
from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.replicas import ALONE, agree_on, gather_texts, leave_together


def test_nobody_leaves_before_a_slow_primary(in_ranks):
    waiting, left = threading.Barrier(4), []

    def body(rank):
        with leave_together():
            waiting.wait(30)  # the replicas have nothing left to do but to leave
            if rank == 0:
                assert not left, "a replica left while the primary was still publishing"
        left.append(rank)

    in_ranks(4, body)
    assert sorted(left) == [0, 1, 2, 3]


def test_a_failure_reaches_every_rank_and_stays_its_own_at_home(in_ranks):
    def publish(rank):
        with leave_together():
            if rank == 2:
                raise KeyError("model.norm.weight")

    def body(rank):
        with pytest.raises(KeyError if rank == 2 else ReplicaFailed) as caught:
            publish(rank)
        dist.barrier()  # the next collective meets: nobody was left behind in the section
        return caught.value

    errors = in_ranks(4, body)
    assert {(error.rank, error.reason) for rank, error in enumerate(errors) if rank != 2} == {
        (2, "KeyError: 'model.norm.weight'")
    }


def test_a_rank_that_is_alone_in_its_job_meets_nobody(in_ranks):
    def body(rank):
        if rank != 1:
            return 1  # these ranks enter no collective
        with leave_together(ALONE):
            return agree_on(len(gather_texts("mine", ALONE)) + 40, ALONE)

    assert in_ranks(3, body) == [1, 41, 1]


def test_alone_it_does_nothing():
    with leave_together():
        pass
    assert gather_texts("x") == ["x"]
    assert agree_on(7) == 7


def test_texts_and_numbers(in_ranks):
    def body(rank):
        long = "é" * 5000 if rank == 1 else ""
        return gather_texts(f"rank {rank} {long}"), agree_on(2**62 + rank)

    for texts, number in in_ranks(3, body):
        assert number == 2**62
        assert texts[0] == "rank 0 "
        assert texts[1].startswith("rank 1 éé")
        assert len(texts[1].encode()) <= 1024
