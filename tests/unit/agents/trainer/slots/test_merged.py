"""Merged weights: the sum in float32, of whole tensors and of shards, never more of them at a time than allowed."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from weightsync.agents.trainer.errors import AdapterError, UnfitTensor
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots, merged
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.merged import Adapter, Merge, MergedState, together
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, QuantizationSpec

FP8 = QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX)


class Table:
    layers = 0

    def __init__(self, names, treatment=QuantizationSpec()):  # noqa: B008  (frozen)
        self.names, self.treatment = names, treatment

    def for_keys(self, keys):
        return self

    def non_layer_specs(self):
        for name in self.names:
            yield ConversionSpec(name, (Source(name),), quantization=self.treatment)


def parts(rows=256, columns=384, rank=8, dtype=torch.float32):
    return {
        "q.weight": torch.randn(rows, columns).to(dtype),
        "a": torch.randn(rank, columns).to(dtype),
        "b": torch.randn(rows, rank).to(dtype),
    }


def state_of(tensors, *, scale=0.3, transposed=False):
    bare = {"q.weight": tensors["q.weight"], "other": torch.randn(4)}
    return MergedState(bare, {"q.weight": Merge("q.base", (Adapter("a", "b", scale, transposed),))}, tensors)


def weight(state, name="q.weight"):
    """A merged weight itself."""
    state.gather()
    return state.local(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_made_in_float32_and_rounded_once(dtype):
    tensors = parts(dtype=dtype)
    state = state_of(tensors)
    base, a, b = (tensors[name].float() for name in ("q.weight", "a", "b"))
    assert torch.equal(weight(state), base + (b @ a) * 0.3)
    assert weight(state).dtype == torch.float32
    assert torch.equal(tensors["q.weight"].float(), base), "the base is left as it is"
    slots = TrainerSlots(state, Table(["q.weight"]), options=SlotOptions(staging_bytes=0))
    slots.convert(state)
    held = slots.arenas[0][: 2 * base.numel()].view(torch.bfloat16).view(256, 384)
    assert torch.equal(held, (base + (b @ a) * 0.3).to(torch.bfloat16))


def test_a_weight_that_is_quantised_is_merged_first(fp8_reference):
    tensors = parts()
    state = state_of(tensors)
    slots = TrainerSlots(state, Table(["q.weight"], FP8), options=SlotOptions(staging_bytes=0))
    slots.convert(state)
    codes, _ = fp8_reference(tensors["q.weight"] + (tensors["b"] @ tensors["a"]) * 0.3)
    assert torch.equal(slots.arenas[0][: 256 * 384].view(256, 384), codes.view(torch.uint8))


def test_several_adapters_are_added_in_their_order_and_transposed_ones_turned():
    tensors = parts() | {"c": torch.randn(2, 256), "d": torch.randn(384, 2)}
    adapters = (Adapter("a", "b", 0.5), Adapter("c", "d", -2.0, transposed=True))
    state = MergedState({"q.weight": tensors["q.weight"]}, {"q.weight": Merge("q.weight", adapters)}, tensors)
    once = tensors["q.weight"] + (tensors["b"] @ tensors["a"]) * 0.5
    assert torch.equal(weight(state), once + (tensors["d"] @ tensors["c"]).T * -2.0)


def test_an_autocast_around_the_publish_rounds_nothing():
    tensors = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged_now = weight(state_of(tensors))
    assert torch.equal(merged_now, tensors["q.weight"] + (tensors["b"] @ tensors["a"]) * 0.3)


@pytest.mark.parametrize("rows", [256, 251])
@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)], [Replicate()]])
@pytest.mark.parametrize("smallest", [0, 1 << 30], ids=["sharded", "gathered"])
def test_each_rank_merges_what_it_holds(in_ranks, rows, placements, smallest):
    torch.manual_seed(3)
    tensors = parts(rows=rows)
    expected = (tensors["q.weight"] + (tensors["b"] @ tensors["a"]) * 0.3).to(torch.bfloat16)

    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        cut = {"q.weight": placements, "a": [Shard(0)], "b": [Shard(0)]}
        spread = {n: distribute_tensor(t, mesh, cut[n], src_data_rank=None) for n, t in tensors.items()}
        state = state_of(spread)
        slots = TrainerSlots(state, Table(["q.weight"]), options=SlotOptions(smallest, staging_bytes=0))
        slots.convert(state)
        whole = torch.zeros(rows, 384, dtype=torch.bfloat16)
        for entry in slots.entries():
            memory = slots.arenas[0].view(torch.bfloat16)
            stride = [step // 2 for step in entry.stride]
            whole[entry.box.slices] = torch.as_strided(memory, entry.box.extent, stride, entry.offset // 2)
        return whole

    one, other = in_ranks(2, body)
    joined = torch.where(one != 0, one, other)
    # A part of a product may be added up in another order than the whole; after rounding that is rarely seen at all.
    different = (joined != expected).float().mean()
    assert different < 1e-3, different
    assert torch.allclose(joined.float(), expected.float(), rtol=2**-7, atol=1e-6)


def test_adapters_may_come_and_go_between_publishes():
    """The same base as it is, then with adapters, then as it is: of bfloat16, which a merged weight is not."""
    tensors = parts(dtype=torch.bfloat16)
    adapted, plain = state_of(tensors), {"q.weight": tensors["q.weight"]}
    expected = (tensors["q.weight"].float() + (tensors["b"].float() @ tensors["a"].float()) * 0.3).to(torch.bfloat16)
    options = SlotOptions(staging_bytes=0)
    for table in (Table(["q.weight"]), Table(["q.weight"], FP8)):
        slots = TrainerSlots(plain, table, options=options)
        for state, wanted in ((plain, tensors["q.weight"]), (adapted, expected), (plain, tensors["q.weight"])):
            slots.convert(state)
            whole = TrainerSlots({"q.weight": wanted}, table, options=options)
            whole.convert({"q.weight": wanted})
            assert torch.equal(slots.arenas[0], whole.arenas[0])


WRONG = {
    "rank": ({"b": torch.randn(256, 4)}, r"b \(256, 4\) times a \(8, 384\) is no addition to q\.base \(256, 384\)"),
    "rows": ({"b": torch.randn(128, 8)}, "is no addition"),
    "columns": ({"a": torch.randn(8, 100)}, "is no addition"),
    "stacked": ({"q.weight": torch.randn(2, 256, 384)}, "only matrices are merged"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_factors_that_do_not_fit_are_named(kind):
    change, words = WRONG[kind]
    with pytest.raises(AdapterError, match=f"^'q.weight': .*{words}"):
        state_of(parts() | change)


@pytest.mark.parametrize(("name", "shown"), [("q.weight", "q.base"), ("a", "a"), ("b", "b")])
def test_codes_are_merged_into_nothing(name, shown):
    tensors = parts()
    with pytest.raises(UnfitTensor, match=f"^'{shown}' is int8"):
        state_of(tensors | {name: tensors[name].to(torch.int8)})


def test_slots_ask_for_what_a_base_became_before_they_are_written():
    tensors = parts()
    slots = TrainerSlots(state_of(tensors), Table(["q.weight"]), options=SlotOptions(staging_bytes=0))
    with pytest.raises(UnfitTensor, match=r"q\.base"):
        slots.check(state_of(tensors | {"q.weight": tensors["q.weight"].to(torch.uint8)}))


def test_a_base_that_is_not_there_is_named():
    with pytest.raises(AdapterError, match=r"the state has no q\.base"):
        MergedState({}, {"q.weight": Merge("q.base", (Adapter("a", "b", 1.0),))}, parts())


def test_merged_weights_are_made_a_few_at_a_time(monkeypatch):
    tensors = {f"{n}.{part}": t for n in range(6) for part, t in parts(16, 16, 2).items()}
    names = [f"{n}.q.weight" for n in range(6)]
    merges = {f"{n}.q.weight": Merge(f"{n}.q.weight", (Adapter(f"{n}.a", f"{n}.b", 1.0),)) for n in range(5)}
    state = MergedState({name: tensors[name] for name in names}, merges, tensors)
    monkeypatch.setattr(merged, "MERGED_BYTES", 2 * 16 * 16 * 4)
    assert list(together([1024, 1024, 1024, 1024, 1024, 0])) == [[5], [0, 1], [2, 3], [4]]
    assert list(together([0, 0])) == [[0, 1]]
    assert list(together([9999, 1, 0])) == [[2], [0], [1]], "one that is larger by itself"
    slots = TrainerSlots(state, Table(names), options=SlotOptions(staging_bytes=0))
    slots.convert(state)
    for n, entry in enumerate(slots.entries()):
        held = slots.arenas[0][entry.offset : entry.offset + 512].view(torch.bfloat16).view(16, 16)
        expected = weight(state, names[n]) if n < 5 else tensors[names[n]]
        assert torch.equal(held, expected.to(torch.bfloat16))


def test_it_is_a_mapping_of_bases_that_merges_only_when_it_is_asked():
    tensors = parts()
    state = state_of(tensors)
    assert list(state) == ["q.weight", "other"]
    assert len(state) == 2
    assert "other" in state
    assert "q.base" not in state
    assert state["q.weight"] is tensors["q.weight"]
    assert state.is_merged("q.weight")
    assert not state.is_merged("other")
