"""The reference trainer, alone and with a double in place of the agent: it learns, and publishes what it saved."""

import json

import pytest
import torch
from safetensors import safe_open
from weightsync.agents.trainer import demo
from weightsync.agents.trainer.agent import PublishError
from weightsync.agents.trainer.slots import TrainerSlots

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


class AgentDouble:
    """Converts as the real one does, and keeps what each published version was."""

    made: "AgentDouble"
    refuse: bool = False

    def __init__(self, source, table, *, options, **others):
        self.source, self.slots = source, TrainerSlots(source(), table, options=options)
        self.published, self.closed = {}, False
        AgentDouble.made = self

    def publish(self, step):
        if self.refuse:
            raise PublishError("no engine is left")
        self.slots.convert(self.source())
        self.published[step] = {e.tensor.name: self.read(e) for e in self.slots.entries()}
        return len(self.published)

    def read(self, entry):
        size = entry.box.volume * 2
        return self.slots.arenas[0][entry.offset : entry.offset + size].clone().view(torch.bfloat16)

    def close(self):
        self.closed = True


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "TrainerAgent", AgentDouble)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))

    def start(*options):
        needed = ["--run-dir", tmp_path, "--run-id", "r", "--hub", "ws://x", "--token-file", tmp_path / "token"]
        return demo.main([str(o) for o in (*needed, "--model-config", tmp_path / "model", *options)])

    return start


def test_it_learns_and_publishes_what_it_saves(run, tmp_path, capsys):
    assert run("--steps", 4, "--publish-every", 2, "--save-checkpoints", tmp_path / "saved") == 0
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if " loss " in line]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    agent = AgentDouble.made
    assert sorted(agent.published) == [2, 4]
    assert agent.closed
    for step, tensors in agent.published.items():
        with safe_open(tmp_path / "saved" / f"step_{step}" / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(tensors)
            assert all(torch.equal(file.get_tensor(n).flatten(), t) for n, t in tensors.items())
    assert json.loads((tmp_path / "saved" / "step_2" / "config.json").read_text())["dtype"] == "bfloat16"
    assert any(not torch.equal(agent.published[2][n], agent.published[4][n]) for n in agent.published[2])


def test_it_trains_on_when_a_version_is_not_taken_and_says_so_in_its_exit_code(run, monkeypatch, capsys):
    monkeypatch.setattr(AgentDouble, "refuse", True)
    assert run("--steps", 2) == 1
    out = capsys.readouterr().out
    assert "step 1 was not published: no engine is left" in out
    assert "step 2 loss" in out


def test_ranks_share_the_rows_of_a_file(tmp_path):
    (tmp_path / "tokens.json").write_text("[[1, 2], [3, 4], [5, 6]]")
    rows = [demo.training_tokens(None, tmp_path / "tokens.json", 0, rank, 2).tolist() for rank in range(2)]
    assert rows == [[[1, 2], [5, 6]], [[3, 4]]]
