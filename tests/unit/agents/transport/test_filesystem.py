"""Parts of a checkpoint: what all ranks save is what the trainer has; a gap, an overlap or a lost part is named."""

import json
import os

import pytest
import tiny_fleet
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.publisher import source_of
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots
from weightsync.agents.transport.filesystem import (
    CheckpointError,
    FilesystemReceiver,
    FilesystemSender,
    load_checkpoint_parts,
    parts_of,
    save_checkpoint_part,
)
from weightsync.agents.transport.interface import HandedOver, TargetMemory
from weightsync.agents.transport.shares import Shares
from weightsync.orchestrator.protocol.messages import FilesystemSettings
from weightsync.orchestrator.protocol.names import Member, Version

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 130,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (130, 128),
    "model.norm.weight": (128,),
    "lm_head.weight": (130, 128),
    LAYER + "input_layernorm.weight": (128,),
    LAYER + "post_attention_layernorm.weight": (128,),
    LAYER + "self_attn.q_proj.weight": (128, 128),
    LAYER + "self_attn.k_proj.weight": (64, 128),
    LAYER + "self_attn.v_proj.weight": (64, 128),
    LAYER + "self_attn.o_proj.weight": (128, 128),
    LAYER + "mlp.gate_proj.weight": (256, 128),
    LAYER + "mlp.up_proj.weight": (256, 128),
    LAYER + "mlp.down_proj.weight": (128, 256),
}


def memory_of(slots):
    return source_of(slots, Member("trainer", "", slots.rank), slots.world)


@pytest.fixture
def saved(in_ranks, weights, tmp_path):
    """(directory, masters): saved by an HSDP trainer of 2 × 2 ranks, in FP8."""
    masters = weights.state(SHAPES)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        state = {n: distribute_tensor(t, mesh, [Replicate(), Shard(0)], src_data_rank=None) for n, t in masters.items()}
        slots = TrainerSlots(state, model_table(CONFIG, fp8=True), options=SlotOptions(1000, staging_bytes=0))
        slots.convert(state)
        save_checkpoint_part(tmp_path / "step_7", memory_of(slots))

    in_ranks(4, body)
    return tmp_path / "step_7", masters


def edit(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_all_parts_together_are_the_checkpoint(saved, fp8_reference):
    folder, masters = saved
    whole = dict(load_checkpoint_parts(folder))
    for name, master in masters.items():
        if "proj" in name:
            values, scales = fp8_reference(master)
            assert torch.equal(whole.pop(name).view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(whole.pop(name + "_scale_inv"), scales)
        else:
            assert torch.equal(whole.pop(name), master.to(torch.bfloat16))
    assert not whole
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == [], "no temporary file stays"


def test_replicas_save_nothing_twice(saved):
    folder, _ = saved
    boxes = [box for index in folder.glob("*.json") for box in json.loads(index.read_text())["boxes"]]
    places = [(box["tensor"][0], tuple(box["offset"])) for box in boxes]
    assert len(places) == len(set(places))


def test_a_lost_part_is_named(saved):
    folder, _ = saved
    (folder / "part-00002-of-00004.boxes.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the parts of ranks \[2\]"):
        load_checkpoint_parts(folder)
    with pytest.raises(CheckpointError, match="holds no finished part"):
        load_checkpoint_parts(folder.parent)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", ["boxes.json", "safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(saved, suffix):
    folder, _ = saved
    place = folder / f"part-00000-of-00004.{suffix}"
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(CheckpointError, match=f"{suffix} is no plain file"):
        dict(load_checkpoint_parts(folder))


def test_a_world_without_bound_is_no_index(saved):
    folder, _ = saved
    edit(folder / "part-00000-of-00004.boxes.json", lambda content: content.update(world=10**12))
    with pytest.raises(CheckpointError, match="is no index of a part"):
        load_checkpoint_parts(folder)


def test_a_lost_box_is_named(saved):
    folder, _ = saved

    def lose(content):
        content["boxes"] = [b for b in content["boxes"] if b["tensor"][0] != "model.embed_tokens.weight"]

    edit(folder / "part-00001-of-00004.boxes.json", lose)
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' of shape \(130, 128\) lacks 8320 elements"):
        load_checkpoint_parts(folder)


def test_boxes_that_overlap_or_reach_outside_are_named(saved):
    folder, _ = saved

    def move(offset):
        def change(content):
            box = next(b for b in content["boxes"] if b["tensor"][0] == "model.embed_tokens.weight")
            box["offset"] = offset

        edit(folder / "part-00001-of-00004.boxes.json", change)

    move([64, 0])
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight'.*overlaps"):
        load_checkpoint_parts(folder)
    move([100, 0])
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight'.*outside its shape"):
        load_checkpoint_parts(folder)


def test_parts_of_two_worlds_or_kinds_do_not_mix(saved):
    folder, _ = saved
    index = folder / "part-00001-of-00004.boxes.json"
    edit(index, lambda content: content.update(world=8))
    with pytest.raises(CheckpointError, match=r"trainers of \[4, 8\] ranks"):
        load_checkpoint_parts(folder)
    edit(index, lambda content: (content.update(world=4), content["boxes"][0]["tensor"].__setitem__(1, "float16")))
    with pytest.raises(CheckpointError, match="several shapes or dtypes"):
        load_checkpoint_parts(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="no index of a part"):
        load_checkpoint_parts(folder)


def test_a_trainer_of_other_ranks_that_comes_to_the_same_step_leaves_its_own_parts_only(saved):
    folder, masters = saved
    later = {name: -tensor for name, tensor in masters.items()}
    slots = TrainerSlots(later, model_table(CONFIG, fp8=False), rank=0, world=1, options=SlotOptions(staging_bytes=0))
    slots.convert(later)
    save_checkpoint_part(folder, memory_of(slots))
    whole = dict(load_checkpoint_parts(folder))
    assert {name: torch.equal(whole[name], later[name].to(torch.bfloat16)) for name in whole} == dict.fromkeys(
        masters, True
    )
    assert sorted(file.name for file in folder.iterdir()) == [
        "part-00000-of-00001.boxes.json",
        "part-00000-of-00001.safetensors",
    ]


def test_a_torn_file_is_named_when_it_is_read(saved):
    folder, _ = saved
    save_file({"other": torch.zeros(1)}, folder / "part-00001-of-00004.safetensors")
    with pytest.raises(CheckpointError, match="part-00001"):
        list(load_checkpoint_parts(folder))
    (folder / "part-00001-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="part-00001"):
        list(load_checkpoint_parts(folder))


def test_a_rank_that_holds_nothing_saves_an_empty_part(weights, tmp_path):
    state = weights.state(SHAPES)
    full = TrainerSlots(state, model_table(CONFIG), rank=0, world=2)
    full.convert(state)
    empty = TrainerSlots({}, model_table(CONFIG), options=SlotOptions(pipeline=True), rank=1, world=2)
    save_checkpoint_part(tmp_path, memory_of(full))
    save_checkpoint_part(tmp_path, memory_of(empty))
    assert {name for name, _ in load_checkpoint_parts(tmp_path)} == SHAPES.keys()


async def test_what_a_sender_stages_is_what_a_receiver_loads(weights, tmp_path):
    """Two trainer ranks, one of which holds nothing; the directory is all that both ends share."""
    state = weights.state(SHAPES)
    full = TrainerSlots(state, model_table(CONFIG), rank=0, world=2)
    full.convert(state)
    empty = TrainerSlots({}, model_table(CONFIG), options=SlotOptions(pipeline=True), rank=1, world=2)
    settings, version = FilesystemSettings(str(tmp_path)), Version(9, 4)
    for slots in (full, empty):
        sender = FilesystemSender(memory_of(slots))
        sender.open(settings)
        sender.stage(version)
        assert sender.announcement() == ("", b"")
        assert not sender.in_flight()
    assert parts_of(tmp_path, version) == tmp_path / "broadcasts" / "step_4"
    loaded = {}
    memory = TargetMemory("a/0", torch.device("cpu"), full.layout, [], lambda: None, loaded.update)
    receiver = FilesystemReceiver(memory)
    receiver.open(settings)
    receiver.arrive(version)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], master.to(torch.bfloat16)) for name, master in state.items())
    with pytest.raises(CheckpointError, match="holds no finished part") as caught:
        receiver.arrive(Version(9, 5))
    assert (caught.value.fault, caught.value.retry) == ("trainer", True)


async def test_a_write_hands_over_what_the_files_hold(weights, tmp_path):
    """The bytes have left with ``stage``: nothing is posted, and each granted peer counts with all that it is owed."""
    slots = tiny_fleet.made_slots(weights.state(tiny_fleet.SHAPES), 0)
    targets = [tiny_fleet.Target.of("a", rank, 0) for rank in range(2)]
    shares = Shares(slots.layout, slots.arenas).replan(tiny_fleet.planned(slots, targets)[1])
    sender = FilesystemSender(memory_of(slots))
    assert await sender.connect(shares) == {}
    stranger = Member("inference", "stranger", 0)
    ends = await tiny_fleet.handed_over(sender, [targets[1].member, stranger], 1.0)
    [end] = ends.values()
    assert end == HandedOver(targets[1].member, shares[1].bytes, descriptors=0, seconds=0.0, link="files")
    assert all(target.untouched() for target in targets)
