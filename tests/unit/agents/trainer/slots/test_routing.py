"""Routes of single specifications on a mesh that is only described: no process group, no tensors."""

import pytest
import torch
from weightsync.agents.tables.box import Box
from weightsync.agents.trainer.errors import ConversionTableError, ExpertPartitionError, OffGridError
from weightsync.agents.trainer.slots.boxes import Cut, Grid, LocalShare
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, QuantizationSpec
from weightsync.agents.trainer.slots.routing import ExpertParallel, Router, SlotOptions, SlotPiece, Turns, ring_bytes

F32 = torch.float32
FP8 = QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX)
SMALL = SlotOptions(min_sharded_bytes=0)


def shard(shape, rank, ranks=4, name="dp_shard", dim=0):
    """A tensor of ``shape`` cut along ``dim`` over a mesh of one dimension, as rank ``rank`` holds it."""
    return LocalShare(shape, F32, (Cut(0, dim, ranks),), Grid((ranks,), (name,), (rank,), tuple(range(ranks))))


def routed(spec, *held, rank=1, primary=True, options=SMALL):
    return Router(options, rank, primary).route(spec, {s.key: h for s, h in zip(spec.sources, held, strict=True)})


@pytest.mark.parametrize(
    ("asked", "device", "slots", "expected"),
    [
        (None, "cpu", 1 << 40, 64 << 20),
        (None, "cuda", 1 << 40, 2 << 30),
        (None, "cuda", 1000, 1024),
        (None, "cpu", 0, 0),
        (0, "cpu", 1 << 40, 0),
        (4096, "cuda", 1 << 40, 4096),
    ],
)
def test_a_ring_has_eight_chunks_and_no_more_than_the_slots(asked, device, slots, expected):
    assert ring_bytes(asked, torch.device(device), slots) == expected


def test_a_share_that_stands_alone_stays_where_it_is():
    route = routed(ConversionSpec("x", (Source("x"),)), shard((8, 6), 1))
    assert (route.kind, route.reason, route.shape) == ("sharded", "each rank's share stands alone", (8, 6))
    assert route.pieces == (SlotPiece(0, (slice(0, 2), slice(0, 6)), Box((2, 0), (2, 6))),)


def test_a_plain_tensor_is_held_whole():
    route = routed(ConversionSpec("x", (Source("x"),)), LocalShare((3,), F32))
    assert (route.kind, route.reason) == ("sharded", "a plain tensor, held whole")
    assert route.pieces == (SlotPiece(0, (slice(0, 3),), Box((0,), (3,))),)


@pytest.mark.parametrize("mesh", [None, Grid((4,), ("dp_shard",), (1,), (0, 1, 2, 3))])
def test_a_scalar_has_no_dimension_to_be_joined_along(mesh):
    held = LocalShare((), F32, (), mesh)
    routes = [routed(ConversionSpec("beta", (Source("beta"),)), held, rank=rank) for rank in range(4)]
    whole = SlotPiece(0, (), Box((), ()))
    assert {route.shape for route in routes} == {()}
    assert [route.pieces for route in routes] == [(whole,)] * 4
    gathered = routed(ConversionSpec("beta", (Source("beta"),)), held, rank=0, options=SlotOptions())
    assert (gathered.kind, gathered.pieces) == ("sharded" if mesh is None else "gathered", (whole,))


def test_two_scalars_cannot_be_joined():
    with pytest.raises(ConversionTableError, match="cannot be joined"):
        routed(ConversionSpec("x", (Source("a"), Source("b"))), LocalShare((), F32), LocalShare((), F32))


def test_a_cut_source_takes_only_what_lies_in_its_part():
    spec = ConversionSpec("k", (Source("qkv", 0, start=3, length=4),))
    here = routed(spec, shard((12, 2), 1))
    assert here.shape == (4, 2)
    assert here.pieces == (SlotPiece(0, (slice(0, 3), slice(0, 2)), Box((0, 0), (3, 2))),)
    assert routed(spec, shard((12, 2), 2)).pieces == (SlotPiece(0, (slice(0, 1), slice(0, 2)), Box((3, 0), (1, 2))),)
    assert routed(spec, shard((12, 2), 3)).pieces == ()


@pytest.mark.parametrize(
    ("spec", "held", "options", "why"),
    [
        (ConversionSpec("x", (Source("x"),)), (10, 4), SMALL, "not divisible over dp_shard=4"),
        (ConversionSpec("x", (Source("x"),), quantization=FP8), (256, 256), SMALL, "ends at 64 of dimension 0"),
        (ConversionSpec("x", (Source("x"),)), (8, 4), SlotOptions(min_sharded_bytes=65), "64 bytes are fewer than 65"),
    ],
)
def test_what_cannot_stand_alone_goes_whole_to_one_owner(spec, held, options, why):
    routes = [routed(spec, shard(held, rank), rank=rank, options=options) for rank in range(4)]
    assert {route.kind for route in routes} == {"gathered"}
    assert all(why in route.reason and "rank 0 has it" in route.reason for route in routes)
    assert routes[0].pieces == (SlotPiece(0, tuple(slice(0, n) for n in held), Box.whole(held)),)
    assert [route.pieces for route in routes[1:]] == [(), (), ()]


@pytest.mark.parametrize(("rows", "kind"), [(96, "gathered"), (128, "sharded")])
def test_a_small_tensor_of_large_shares_is_not_gathered(rows, kind):
    """Experts of a mixture are below 2 MiB and all of its bytes: 65,536 of each rank are packed like any others."""
    spec, options = ConversionSpec("x", (Source("x"),)), SlotOptions()
    routes = [routed(spec, shard((4 * rows, 256), rank), rank=rank, options=options) for rank in range(4)]
    assert {route.kind for route in routes} == {kind}
    if kind == "gathered":
        assert "196608 bytes are fewer than 2097152, and 49152 of a rank fewer than 65536" in routes[0].reason


def test_gathered_tensors_take_turns_among_their_candidates():
    turns = Turns()
    assert [turns.next_owner((0, 1, 2)) for _ in range(4)] == [0, 1, 2, 0]
    assert turns.next_owner((4, 5)) == 4
    assert turns.next_owner((0, 1, 2)) == 1


def test_a_replica_that_is_not_primary_holds_nothing():
    spec = ConversionSpec("x", (Source("x"),))
    assert routed(spec, shard((8, 6), 1), primary=False).pieces == ()
    assert routed(spec, shard((7, 6), 0), rank=0, primary=False).pieces == ()


def test_stacked_experts_are_numbered_globally():
    spec = ConversionSpec("e.{expert}.w", (Source("w"),), experts=16)
    whole = routed(spec, shard((16, 4, 4), 1))
    assert (whole.kind, whole.reason, whole.shape) == ("expert", "routed by global expert id (4–7 here)", (16, 4, 4))
    options = SlotOptions(min_sharded_bytes=0, expert_parallel=ExpertParallel(2, 1))
    local = routed(spec, shard((8, 4, 4), 1), options=options)
    assert [(p.index[0], p.box.offset[0]) for p in local.pieces] == [(slice(0, 2), 10)]
    with pytest.raises(
        ExpertPartitionError, match=r"2 local experts × 4 \(fsdp\) × 1 \(ep\) = 8, but the model has 16"
    ):
        routed(spec, shard((8, 4, 4), 1))


def test_sources_that_do_not_fit_are_refused_by_name():
    both = ConversionSpec("x", (Source("a"), Source("b")))
    with pytest.raises(ConversionTableError, match=r"'x': sources of shapes \[\(4, 2\), \(4, 3\)\] cannot be joined"):
        routed(both, LocalShare((4, 2), F32), LocalShare((4, 3), F32))
    with pytest.raises(ConversionTableError, match=r"'a' of shape \(4, 2\) has no 3…\+2 along 0"):
        routed(ConversionSpec("x", (Source("a", 0, 3, 2),)), LocalShare((4, 2), F32))
    with pytest.raises(ConversionTableError, match="blocks are of matrices"):
        routed(ConversionSpec("x", (Source("a"),), quantization=FP8), LocalShare((256,), F32))


def test_a_tensor_parallel_slice_inside_a_block_is_an_error():
    with pytest.raises(OffGridError, match=r"'x': a tensor-parallel slice ends at 64 of dimension 1 .* tp=4"):
        routed(ConversionSpec("x", (Source("x"),), quantization=FP8), shard((256, 256), 0, name="tp", dim=1))
