"""What ranks would gather together is the same on all of them, or named before any collective."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from weightsync.agents.trainer.replicas import TrainerRanks
from weightsync.agents.trainer.routes.routes import NeededTable
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.sources.gathered import Gathered, disagreement

GATHERED = SlotOptions(2**30, 2**30, staging_bytes=0)
NAMES = ("a", "b", "c")


def one_sees_other_shapes(state, mesh):
    """As ``from_local`` without a shape makes it of an uneven shard."""
    local = torch.zeros(3, 8)
    return state | {"b": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}


def as_it_is(state, mesh):
    return state


CASES = {
    "the same": (as_it_is, NAMES, GATHERED, None),
    "another global shape": (one_sees_other_shapes, NAMES, GATHERED, "b"),
    "another order": (as_it_is, ("b", "a", "c"), GATHERED, "a, b"),
    "a tensor less": (as_it_is, NAMES[:2], GATHERED, "c"),
    "another rule": (as_it_is, NAMES, replace(GATHERED, min_sharded_bytes=0), "a, b, c"),
    "another dtype on its way": (as_it_is, NAMES, GATHERED, "a, b, c"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_would_be_gathered_otherwise_is_named_to_all(in_ranks, weights, case):
    change, names, options, expected = CASES[case]

    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        full = weights.state(dict.fromkeys(NAMES, (8, 8)))
        state = {n: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for n, t in full.items()}
        odd = rank == 1
        keep = QuantizationSpec(torch.float32, keeps_master=True)
        treatment = keep if odd and "dtype" in case else QuantizationSpec()
        specs = [ConversionSpec(n, (Source(n),), quantization=treatment) for n in (names if odd else NAMES)]
        state = change(state, mesh) if odd else state
        slots = TrainerSlots(state, NeededTable(specs), options=options if odd else GATHERED)
        gathered, ranks = Gathered(slots.slots), TrainerRanks()
        with ranks.section():
            said = ranks.agree(gathered.said(), seconds=20)
            return disagreement(ranks, said, gathered.each, 20)

    assert in_ranks(2, body) == [None if expected is None else (0, 1, expected)] * 2


def test_plain_tensors_are_nobodys_business(weights):
    slots = TrainerSlots(
        weights.state({"a": (4, 4)}), NeededTable([ConversionSpec("a", (Source("a"),))]), options=GATHERED
    )
    assert Gathered(slots.slots).said() == ""
    assert Gathered(slots.slots).each("nobody's") == b"{}"
