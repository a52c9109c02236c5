"""Items of one mesh: how large they are, and what a rank keeps of its own."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from weightsync.agents.trainer.slots.arena import ArenaPlan
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.reading import Taken
from weightsync.agents.trainer.slots.routing import Router, SlotOptions
from weightsync.agents.trainer.slots.slot import made_slots
from weightsync.agents.trainer.slots.transit import Transit, items_of, padded


def test_sizes_are_whole_units():
    assert [padded(size) for size in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_a_rank_has_a_place_for_what_it_sends_and_what_it_receives(in_ranks):
    """5 rows of 3 over 2 ranks: 3 rows (18 bytes, 2 units) and 2 rows (12 bytes, 1 unit), kept by rank 0."""
    full = torch.arange(15, dtype=torch.float32).view(5, 3)

    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        tensor = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
        shares, plan = {"x": local_share("x", tensor)}, ArenaPlan()
        spec = ConversionSpec("x", (Source("x"),))
        route = Router(SlotOptions(), rank, True).route(spec, shares)
        [slot] = made_slots([(spec, route)], shares, plan)
        slot.bind(torch.zeros(plan.size, dtype=torch.uint8))
        [item] = items_of(slot, {"x": 0}, [mesh])
        assert item.journey.sizes == {(0,): 32, (1,): 16}
        transit = Transit([item], 0)
        space, whole = torch.zeros(transit.end, dtype=torch.uint8), torch.zeros(5, 3, dtype=torch.bfloat16)
        transit.bind(space, {id(slot): whole} if slot.moves else {})
        transit.run(Taken([tensor.to_local()], {}))
        return transit.end, whole

    (first, whole), (second, nothing) = in_ranks(2, body)
    assert (first, second) == (48, 16), "its own and what arrives; what is sent"
    assert torch.equal(whole, full.to(torch.bfloat16))
    assert not nothing.any()
