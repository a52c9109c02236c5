"""Adapter-only rounds: engines answer with the adapter as a fresh engine that loaded it from disk, bit for bit.

The base model's answers stay as they were.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import fleet
from lora_trainer import adapted, draw
from serving import VllmServer, answers
from transformers import AutoModelForCausalLM, Qwen2Config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

POLICY = "policy"
CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 503, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and beside it the adapter that engines begin with."""
    directory = tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(Qwen2Config(**CONFIG), dtype=torch.bfloat16).save_pretrained(directory / "base")
    draw(adapted(directory / "base", lora_alpha=4), 99).save_pretrained(directory / "adapter")
    return directory / "base"


def lora_arguments(adapter: Path) -> tuple[str, ...]:
    return ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{POLICY}={adapter}")


@pytest.mark.parametrize(
    ("tp", "world", "transport"),
    [
        (1, 1, "nixl"),
        pytest.param(2, 2, "nixl", marks=pytest.mark.long),
        pytest.param(1, 1, "filesystem", marks=pytest.mark.long),
    ],
    ids=["tp1", "tp2", "files"],
)
def test_the_adapter_alone_is_pushed(tp: int, world: int, transport: str, model: Path, tmp_path: Path) -> None:
    first = model.parent / "adapter"
    server = VllmServer(
        model,
        tp=tp,
        env={"WEIGHTSYNC_ADAPTER": f"{POLICY}={first}", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        arguments=lora_arguments(first),
        log=tmp_path / "vllm.log",
        prefix_caching=True,  # blocks of an old adapter would be answers of two
    ).start()
    try:
        with fleet(tmp_path / "fleet", {"engine": server}, settings={"transport": {"type": transport}}) as whole:
            trainer = whole.start_trainer(model, world, script="lora_trainer.py")
            server.wait_ready()
            assert server.is_paused(), "the engine must be held until a version is committed"
            assert trainer.hear()["ready"]
            said = []
            for step, alpha in ((1, 6), (2, 10)):
                assert trainer.publish(step, alpha=alpha).get("sequence") == step
                said.append((answers(server, model=POLICY), answers(server)))
            assert said[0][0] != said[1][0]
            assert said[0][1] == said[1][1], "the base answers as before"
            (left_out,) = whole.engine("engine")["left_out"]
            assert left_out["kind"] == "unwritten"
            assert left_out["count"] > 10
            status, refused = server.post(
                "/v1/load_lora_adapter",
                {"lora_name": POLICY, "lora_path": str(whole.checkpoints / "step_1"), "load_inplace": True},
            )
            assert status != 200
            assert "is written by rounds" in json.dumps(refused)
            assert answers(server, model=POLICY) == said[1][0]
    finally:
        server.close()
    saved = whole.checkpoints / "step_2"
    assert json.loads((saved / "adapter_config.json").read_text())["lora_alpha"] == 10
    with VllmServer(model, tp=tp, weightsync=False, arguments=lora_arguments(saved)) as fresh:
        assert (answers(fresh, model=POLICY), answers(fresh)) == said[1]
