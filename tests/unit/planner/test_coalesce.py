"""What is packed, where it lands, and how much of a landing each edge has."""

import numpy as np
import pytest
from layouts import copies_of, engine_rank, party_of, trainer
from msgspec import structs
from weightsync.orchestrator.planner import CostModel, LandingTooSmall, Party, make_plan
from weightsync.orchestrator.planner.coalesce import load_cargo
from weightsync.orchestrator.planner.decode import Decoder
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import COPY_STAGED, Tensor


def test_small_pieces_share_one_descriptor_and_large_ones_go_straight():
    small = [Tensor(f"model.layers.{i}.norm", "bfloat16", (16,)) for i in range(20)]
    large = [Tensor("model.layers.0.w", "bfloat16", (1024, 1024))]
    model = small + large
    plan = make_plan(
        [party_of(trainer(0), model[::-1], staging=1 << 20)],
        [party_of(engine_rank("e"), model, staging=1 << 20)],
        CostModel(),
    )
    assert plan.sends[trainer(0)].descriptors == 2
    staged = copies_of(plan, trainer(0))[:, COPY_STAGED]
    assert (staged >= 0).sum() == len(small)
    assert len(copies_of(plan, engine_rank("e"))) == len(small)


def test_a_lone_small_piece_is_not_packed():
    model = [Tensor("norm", "bfloat16", (16,))]
    plan = make_plan([party_of(trainer(0), model, staging=4096)], [party_of(engine_rank("e"), model, staging=4096)])
    assert (copies_of(plan, trainer(0))[:, COPY_STAGED] == -1).all()


COST = CostModel(alpha_seconds=1e-6, bytes_per_second=1e8, pack_bytes_per_second=1e9)
"""A descriptor is worth 100 bytes."""
NOTHING = Tensor("nothing", "bfloat16", (1,))


def loaded(edge, target, size, source_room, target_room, lands="live", leaves="live", joins=()):
    """Places, flags and berths of pieces of one source."""
    decoder = Decoder()

    def decoded(member, room, lands="live"):
        party = party_of(member, [NOTHING], staging=room or -1)
        layout = structs.replace(party.layout, lands=lands)
        return decoder.decode(Party(member, 1, layout))

    count = len(edge)
    targets = [decoded(engine_rank("e", n), room, lands) for n, room in enumerate(target_room)]
    cargo = load_cargo(
        np.array(edge), np.zeros(count, np.int32), np.array(target, np.int32), np.array(size), np.ones(count, np.int64),
        np.array(joins or [False] * count), COST, [decoded(trainer(0), source_room, leaves)], targets,
    )  # fmt: skip
    return cargo.place.tolist(), cargo.packed.tolist(), cargo.berths


@pytest.mark.parametrize(("leaves", "packed"), [("live", False), ("copy", False), ("flip", True)])
def test_what_lies_in_pages_is_packed_whatever_that_costs(leaves, packed):
    """No transport reads them; a piece of 5000 bytes is not worth it otherwise."""
    for lands in ("live", "copy"):
        assert loaded([0], [0], [5000], 16384, [16384], lands, leaves)[1] == [packed]


def test_each_edge_has_a_cargo_and_a_berth_of_its_own():
    """Pieces begin at multiples of 16 bytes: 30 are followed by 2 that nobody reads."""
    place, packed, berths = loaded([0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [30, 40, 500, 10, 10], 4096, [4096, 4096])
    assert place == [0, 32, -1, 0, 16]
    assert packed == [True, True, False, True, True]
    assert berths == (Berth(1, 0, 512, 1, 80), Berth(1, 0, 512, 1, 32))


def test_two_pieces_are_packed_only_if_they_are_smaller_than_the_descriptor_they_save():
    assert loaded([0, 0], [0, 0], [60, 50], 4096, [4096]) == ([-1, -1], [False, False], (None,))
    assert loaded([0, 0], [0, 0], [60, 39], 4096, [4096])[0] == [0, 64]


@pytest.mark.parametrize(("source_room", "target_room"), [(0, 4096), (4096, 0), (0, 0), (255, 4096), (4096, 255)])
def test_nothing_is_packed_without_room_for_a_chunk_on_both_sides(source_room, target_room):
    found = loaded([0, 0], [0, 0], [30, 40], source_room, [target_room])
    assert found == ([-1, -1], [False, False], (None,))


def test_cargo_of_any_length_is_packed_and_its_berth_gone_through_again():
    """80 pieces of 50 bytes at multiples of 64 fill 5120 bytes; the landing has 1024: five times four chunks."""
    place, packed, berths = loaded([0] * 80, [0] * 80, [50] * 80, 4096, [1024])
    assert place == list(range(0, 5120, 64))
    assert all(packed)
    assert berths == (Berth(1, 0, 256, 4, 5120, passes=True),)
    assert (berths[0].chunks, berths[0].wraps, berths[0].end) == (20, True, 1024)
    assert [berths[0].place(chunk) for chunk in (0, 3, 4, 19)] == [0, 768, 0, 768]


def test_of_a_landing_that_is_too_small_each_edge_has_what_it_wants_or_what_the_others_have():
    """Of 4096 bytes one edge wants 256. The other two share 3840: one has seven times 256 of them, one eight times."""
    sizes = [16] * 2 + [50] * 80 + [50] * 40
    edges = [0] * 2 + [1] * 80 + [2] * 40
    decoder = Decoder()

    def decoded(member, room):
        return decoder.decode(party_of(member, [NOTHING], staging=room))

    cargo = load_cargo(
        np.array(edges), np.array(edges, np.int32), np.zeros(122, np.int32), np.array(sizes), np.ones(122, np.int64),
        np.zeros(122, np.bool_), COST, [decoded(trainer(n), 8192) for n in range(3)], [decoded(engine_rank("e"), 4096)],
    )  # fmt: skip
    assert cargo.berths == (
        Berth(1, 0, 1024, 1, 32),
        Berth(1, 256, 512, 4, 5120, True),
        Berth(1, 2304, 256, 7, 2560, True),
    )


def test_pieces_that_share_a_descriptor_are_packed_together_or_not_at_all():
    """Three of 60 bytes are worth one descriptor, and each alone would not be."""
    sizes, alone = [60, 60, 60, 30, 30, 30], [False, True, True, False, False, False]
    for lands in ("live", "flip"):
        _, packed, _ = loaded([0] * 6, [0] * 6, sizes, 1 << 20, [1 << 20], lands, joins=alone)
        assert packed == [False] * 3 + [True] * 3
        _, packed, _ = loaded([0] * 6, [0] * 6, sizes, 1 << 20, [1 << 20], lands)
        assert packed == [True] * 6


def test_what_shares_one_descriptor_saves_none_by_packing():
    _, packed, _ = loaded([0] * 2, [0] * 2, [30, 30], 1 << 20, [1 << 20], joins=[False, True])
    assert packed == [False] * 2, "60 bytes in one descriptor, packed or not"


def test_runs_longer_than_a_chunk_are_not_packed():
    """Their chunks would be as many descriptors."""
    assert loaded([0] * 3, [0] * 3, [30, 30, 30], 4096, [4096])[1] == [True] * 3
    cost = CostModel(alpha_seconds=1e-3, bytes_per_second=1e9, pack_bytes_per_second=1e12)
    model = [Tensor(f"t{n}", "float8_e4m3fn", (300 if n else 5000,)) for n in range(40)]
    source = party_of(trainer(0), model[::-1], staging=1 << 16)
    plan = make_plan([source], [party_of(engine_rank("e"), model, staging=2048)], cost)
    staged = copies_of(plan, trainer(0))
    assert (staged[:, COPY_STAGED] < 0).sum() == 1


@pytest.mark.parametrize("lands", ["copy", "flip"])
def test_into_a_shadow_engine_everything_lands_packed_last(lands):
    place, packed, berths = loaded([0] * 3, [0] * 3, [500, 30, 40], 1 << 20, [1 << 20], lands)
    assert place == [0, 512, 544]
    assert packed == [False, True, True]
    assert berths == (Berth(1, 0, 1 << 17, 1, 592, lands == "flip"),)
    assert loaded([0], [0], [500], 0, [1 << 20], lands) == (
        [0],
        [False],
        (Berth(1, 0, 8 << 20, 1, 512, lands == "flip"),),
    )


def test_chunks_are_as_long_as_the_slower_kind_of_memory_allows():
    """Of a device's slots to a device's landing 256 MiB, with the host at either end 8."""
    model = [Tensor(f"model.layers.{n}.w", "bfloat16", (1 << 14, 1 << 14)) for n in range(4)]
    for here, there, expected in [("VRAM", "VRAM", 256), ("VRAM", "DRAM", 8), ("DRAM", "VRAM", 8)]:
        source, target = (
            in_memory(party_of(member, model, staging=room), memory)
            for member, room, memory in ((trainer(0), -1, here), (engine_rank("e"), 1 << 30, there))
        )
        layout = structs.replace(target.layout, lands="flip")
        plan = make_plan([source], [Party(target.member, 1, layout)])
        (berth,) = plan.part(trainer(0)).berths
        assert berth.chunk_bytes == expected << 20


def in_memory(party, memory):
    regions = tuple(structs.replace(region, memory=memory) for region in party.layout.regions)
    return Party(party.member, 1, structs.replace(party.layout, regions=regions))


def test_a_ring_in_front_of_pages_is_gone_through_again():
    place, packed, berths = loaded([0] * 5, [0] * 5, [1000] * 5, 1 << 20, [2048], "flip")
    assert place == [0, 1008, 2016, 3024, 4032]
    assert not any(packed)
    assert berths == (Berth(1, 0, 512, 4, 5040, passes=True),)


@pytest.mark.parametrize(("lands", "room", "words"), [
    ("copy", 1 << 20, r"e/0: its landing of 1.0 MiB is 4 MiB too small for the 5.0 MiB.*Fix: raise .* by 4, or unset"),
    ("flip", 0, "e/0: its landing of 0.0 MiB is 1 MiB too small"),
])  # fmt: skip
def test_a_landing_that_does_not_take_what_it_must_is_refused_by_name(lands, room, words):
    with pytest.raises(LandingTooSmall, match=words) as caught:
        loaded([0] * 5, [0] * 5, [1 << 20] * 5, 1 << 20, [room], lands)
    assert caught.value.member == engine_rank("e")
