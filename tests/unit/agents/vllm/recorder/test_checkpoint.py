"""Which tensors a checkpoint has: read from file headers, or derived from layers shaped like vLLM's."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.vllm.recorder.checkpoint import checkpoint_of, expected_checkpoint, read_header

BF16 = torch.bfloat16


def test_headers_give_every_file_s_names_shapes_and_dtypes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=BF16)}, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.zeros(4, dtype=torch.float8_e4m3fn), "c": torch.tensor(1)}, tmp_path / "model-2.safetensors")
    found = checkpoint_of(nn.Module(), SimpleNamespace(model=str(tmp_path)))
    assert sorted(found, key=lambda entry: entry.name) == [
        Checkpoint("a", (2, 3), BF16),
        Checkpoint("b", (4,), torch.float8_e4m3fn),
        Checkpoint("c", (), torch.int64),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "would be 0 bytes long"),
        (b"\xff" * 16, "bytes long"),
        ((5).to_bytes(8, "little") + b"{not}", "its header is no JSON"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_header(file)


def test_a_dtype_that_cannot_travel_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RecordError, match="x has dtype C64"):
        read_header(file)


class LinearBase(nn.Module):
    def __init__(self, rows: int, columns: int, **about: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=BF16), requires_grad=False)
        for name, value in about.items():
            setattr(self, name, value)


class QKVParallelLinear(LinearBase):
    pass


class MergedColumnParallelLinear(LinearBase):
    pass


class VocabParallelEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 8, dtype=BF16), requires_grad=False)
        self.org_vocab_size = 100


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.zeros(2, 8, 8, dtype=BF16), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.zeros(2, 8, 4, dtype=BF16), requires_grad=False)
        self.moe_config = SimpleNamespace(
            num_logical_experts=4, hidden_dim=8, intermediate_size=8, moe_parallel_config=SimpleNamespace(tp_size=2)
        )


def test_unsharded_shapes_and_unfused_names_are_derived_from_the_layers() -> None:
    model = nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # type: ignore[assignment]
    model.embed = VocabParallelEmbedding()
    model.qkv_proj = QKVParallelLinear(
        12, 8, total_num_heads=4, total_num_kv_heads=2, head_size=4, v_head_size=4, input_size=8
    )
    model.gate_up_proj = MergedColumnParallelLinear(8, 8, output_sizes=[8, 8], input_size=8)
    model.down_proj = LinearBase(8, 4, output_size=8, input_size=8)
    model.experts = nn.Module()
    model.experts.routed_experts = Experts()
    model.register_buffer("rotary", torch.zeros(2), persistent=False)
    model.k_scale = nn.Parameter(torch.zeros(()), requires_grad=False)
    shapes = {entry.name: entry.shape for entry in expected_checkpoint(model)}
    experts = {name: shape for name, shape in shapes.items() if name.startswith("experts.")}
    assert {name: shape for name, shape in shapes.items() if name not in experts} == {
        "embed.weight": (100, 8),
        "q_proj.weight": (16, 8),
        "k_proj.weight": (8, 8),
        "v_proj.weight": (8, 8),
        "gate_proj.weight": (8, 8),
        "up_proj.weight": (8, 8),
        "down_proj.weight": (8, 8),
    }
    assert len(experts) == 12
    assert experts["experts.3.down_proj.weight"] == experts["experts.0.gate_proj.weight"] == (8, 8)


def test_scales_of_blocks_have_a_rounded_up_shape() -> None:
    model = nn.Module()
    model.proj = LinearBase(300, 200, output_size=300, input_size=200, weight_block_size=[128, 128])
    model.proj.weight_scale_inv = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    shapes = {entry.name: entry.shape for entry in expected_checkpoint(model)}
    assert shapes == {"proj.weight": (300, 200), "proj.weight_scale_inv": (3, 2)}
