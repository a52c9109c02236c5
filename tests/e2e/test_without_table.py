"""A transformers model is pushed without a table: names, ties and stacked experts are found from what engines need.

The judge is a fresh engine that loaded what ``save_pretrained`` wrote.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import fleet
from serving import VllmServer, answers
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 503, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
TIED_AND_BIASED = Qwen2Config(tie_word_embeddings=True, **SMALL)
STACKED = MixtralConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=32, **SMALL)


@pytest.mark.parametrize(
    ("config", "tp", "world"),
    [
        pytest.param(TIED_AND_BIASED, 2, 1, id="qwen2 at tp 2", marks=pytest.mark.long),  # also one of the families
        pytest.param(STACKED, 1, 2, id="mixtral from fsdp2"),
    ],
)
def test_answers_equal_those_of_what_was_saved(config: Any, tp: int, world: int, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    server = VllmServer(tmp_path / "model", tp=tp, log=tmp_path / "vllm.log").start()
    try:
        with fleet(tmp_path / "fleet", {"engine": server}) as whole:
            trainer = whole.start_trainer(tmp_path / "model", world, script="hf_trainer.py")
            server.wait_ready()
            assert trainer.hear()["ready"]
            assert trainer.publish(1).get("sequence") == 1
            first = answers(server)
            assert trainer.publish(2).get("sequence") == 2
            second = answers(server)
    finally:
        server.close()
    assert first != second
    # A server of the same parallelism: sums over two ranks are rounded otherwise than those of one.
    with VllmServer(whole.checkpoints / "step_2", tp=tp, weightsync=False) as fresh:
        assert answers(fresh) == second
