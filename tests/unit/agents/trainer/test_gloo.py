"""Real processes: two gloo ranks train with FSDP2, convert, and what all hold is what the model computes with."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.publisher import source_of
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.state import current_state
from weightsync.agents.transport.filesystem import load_checkpoint_parts, save_checkpoint_part
from weightsync.orchestrator.protocol.names import Member

pytestmark = pytest.mark.e2e  # trainer ranks in processes of their own

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 64,
}


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(128, 128, bias=False))

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = torch.nn.Linear(128, 192, bias=False)
        self.up_proj = torch.nn.Linear(128, 192, bias=False)
        self.down_proj = torch.nn.Linear(192, 128, bias=False)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = torch.nn.RMSNorm(128), torch.nn.RMSNorm(128)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm = torch.nn.Embedding(67, 128), torch.nn.RMSNorm(128)
        self.layers = torch.nn.ModuleList([Layer()])

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Causal(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.lm_head = Decoder(), torch.nn.Linear(128, 67, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.model(tokens))


def train_and_save(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Causal()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.model.layers[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    slots = TrainerSlots(current_state(model), model_table(CONFIG, fp8=False), options=SlotOptions(8192))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.arange(64).view(2, 32) % 67
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    slots.convert(current_state(model))
    save_checkpoint_part(folder / "parts", source_of(slots, Member("trainer", "", rank), 2))
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    if rank == 0:
        torch.save(full, folder / "masters.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_and_save_what_their_forward_uses(tmp_path: Path):
    multiprocessing.spawn(train_and_save, (free_port(), tmp_path), nprocs=2)
    masters = torch.load(tmp_path / "masters.pt", weights_only=True)
    parts = dict(load_checkpoint_parts(tmp_path / "parts"))
    assert parts.keys() == masters.keys()
    assert all(torch.equal(parts[name], masters[name].to(torch.bfloat16)) for name in masters)
    torch.manual_seed(0)
    initial = Causal().state_dict()
    assert not any(torch.equal(initial[name], masters[name]) for name in masters), "it did train"
