"""Places of an arena before it exists, and the arrays in it afterwards."""

import torch
from weightsync.agents.memory.arena import ALIGNMENT
from weightsync.agents.trainer.slots.arena import ArenaPlan, Reservation


def test_places_are_aligned_and_lie_one_behind_the_other():
    plan = ArenaPlan()
    first = plan.reserve((3, 5), torch.bfloat16)
    second = plan.reserve((), torch.float32)
    assert (first.offset, first.nbytes, first.stride) == (0, 30, (10, 2))
    assert (second.offset, second.nbytes, second.stride) == (ALIGNMENT, 4, ())
    assert plan.size == 2 * ALIGNMENT
    assert plan.reserve((ALIGNMENT + 1,), torch.uint8).offset == 2 * ALIGNMENT
    assert plan.size == 4 * ALIGNMENT


def test_nothing_takes_no_room():
    plan = ArenaPlan()
    assert plan.reserve((0, 4), torch.float32) == Reservation(0, (0, 4), torch.float32)
    assert plan.size == 0


def test_a_view_is_the_arena_s_own_memory():
    arena = torch.zeros(64, dtype=torch.uint8)
    view = Reservation(16, (2, 3), torch.float32).view(arena)
    view.copy_(torch.arange(6.0).view(2, 3))
    assert arena[16:40].view(torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert not arena[:16].any()
    assert not arena[40:].any()
