"""Simulated meshes: every rank runs its own exchanges, and every shard must arrive at its owner, and nowhere else."""

import itertools
import random

import pytest
from weightsync.agents.trainer.slots.journeys import Journey, exchanges


def mesh_of(shape):
    return list(itertools.product(*map(range, shape)))


def journey(shape, owner, dims, sizes=lambda at: 16):
    places = itertools.product(*(range(n) if d in dims else (0,) for d, n in enumerate(shape)))
    return Journey(owner, frozenset(dims), {at: sizes(at) for at in places})


def travelled(journeys, shape):
    """What lies at each rank in the end, and how many bytes moved."""
    ranks = mesh_of(shape)
    held = {here: {(n, here) for n, j in enumerate(journeys) if j.begins_at(here)} for here in ranks}
    plans = {here: list(exchanges(journeys, shape, here)) for here in ranks}
    moved = 0
    assert len({tuple(e.dim for e in plan) for plan in plans.values()}) == 1, "all ranks enter the same collectives"
    for step in range(len(plans[ranks[0]])):
        arriving = {here: set() for here in ranks}
        for here in ranks:
            exchange = plans[here][step]
            for position, sent in enumerate(exchange.send):
                there = (*here[: exchange.dim], position, *here[exchange.dim + 1 :])
                assert sent == plans[there][step].receive[here[exchange.dim]], "what is sent is what is expected"
                assert set(sent) <= held[here], "only what is there can be sent"
                arriving[there] |= set(sent)
                held[here] -= set(sent)
                moved += sum(journeys[n].size(at) for n, at in sent)
        for here in ranks:
            held[here] |= arriving[here]
    return held, moved


def test_one_dimension_is_one_exchange_of_what_others_own():
    shape = (3,)
    journeys = [journey(shape, (0,), {0}), journey(shape, (2,), {0})]
    [exchange] = exchanges(journeys, shape, (1,))
    assert exchange.send == (((0, (1,)),), (), ((1, (1,)),))
    assert exchange.receive == ((), (), ())
    [exchange] = exchanges(journeys, shape, (0,))
    assert exchange.receive == ((), ((0, (1,)),), ((0, (2,)),))
    held, moved = travelled(journeys, shape)
    assert held == {(0,): {(0, (c,)) for c in range(3)}, (1,): set(), (2,): {(1, (c,)) for c in range(3)}}
    assert moved == 4 * 16


def test_only_the_owners_replica_sends():
    held, moved = travelled([journey((2, 2), (1, 0), {1})], (2, 2))
    assert held[(1, 0)] == {(0, (1, 0)), (0, (1, 1))}
    assert moved == 16


def test_a_tensor_that_nothing_cuts_stays():
    assert list(exchanges([journey((2, 2), (0, 1), set())], (2, 2), (0, 1))) == []


def test_empty_shards_do_not_travel():
    held, moved = travelled([journey((4,), (3,), {0}, lambda at: 16 * (at[0] == 0))], (4,))
    assert held[(3,)] == {(0, (0,))}
    assert moved == 16


@pytest.mark.parametrize("seed", range(30))
def test_every_shard_arrives_at_its_owner_whatever_the_mesh(seed):
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 3)))
    ranks = mesh_of(shape)
    cutting = [d for d, n in enumerate(shape) if n > 1]
    journeys = [
        journey(shape, draw.choice(ranks), {d for d in cutting if draw.random() < 0.7}, lambda at: draw.choice((0, 16)))
        for _ in range(6)
    ]
    held, _ = travelled(journeys, shape)
    for n, each in enumerate(journeys):
        expected = {at for at in ranks if each.begins_at(at)}
        assert {at for m, at in held[each.owner] if m == n} == expected
        assert not any(m == n for here in ranks if here != each.owner for m, _ in held[here])
