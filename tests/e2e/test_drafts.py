"""Speculative decoding: drafters are written with their model, and guess as those of a fresh engine do.

The judge is a fresh engine that loaded both checkpoints: the same answers bit for bit, and as many accepted guesses.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fleet import fleet
from serving import Answer, VllmServer, answers, qwen3_config, qwen3_shapes, random_state, save_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

WORDS = 16
"""A small vocabulary, so that also a drafter that knows nothing is right at times."""
PROMPTS = ((1, 2, 3, 4), (5, 11, 7, 0, 9, 3), tuple(range(WORDS)))
ACCEPTED = re.compile(r"^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position=\"(\d+)\".*\} (\S+)$", re.M)

MIMO = """
from transformers import Qwen2Config

class MiMoConfig(Qwen2Config):
    model_type = "mimo"

    def __init__(self, num_nextn_predict_layers=1, **others):
        super().__init__(**others)
        self.num_nextn_predict_layers = num_nextn_predict_layers
"""
"""The configuration that MiMo's repositories bring along."""


@dataclass(frozen=True)
class Drafted:
    """A model and its drafter: directories, and what ``--speculative-config`` says beside the drafter's."""

    model: Path
    draft: Path | None
    method: Mapping[str, Any]
    arguments: tuple[str, ...] = ()

    def server(self, model: Path, draft: Path | None, **options: Any) -> VllmServer:
        speculative = {**self.method, **({"model": str(draft)} if draft is not None else {})}
        arguments = (*self.arguments, "--speculative-config", json.dumps(speculative))
        return VllmServer(model, arguments=arguments, **options)


def drafter_of_its_own(directory: Path) -> Drafted:
    """A drafter that is its model, so that nearly all that it guesses is right."""
    config = qwen3_config(vocab_size=WORDS)
    state = random_state(qwen3_shapes(config), 1)
    model, draft = (save_model(directory / name, config, state) for name in ("model", "draft"))
    return Drafted(model, draft, {"method": "draft_model", "num_speculative_tokens": 3})


def llama(**more: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = qwen3_config(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=WORDS, **more)
    return config, {name: shape for name, shape in qwen3_shapes(config).items() if not re.search("[qk]_norm", name)}


def eagle(directory: Path) -> Drafted:
    """EAGLE: a layer and ``fc``; embedding and head are its model's."""
    config, shapes = llama()
    model = save_model(directory / "model", config, random_state(shapes, 1))
    config, shapes = llama(num_hidden_layers=1)
    layer = re.compile(r"model\.(layers\.0\.(?!input_layernorm).*)")
    own = {found[1]: shape for name, shape in shapes.items() if (found := layer.fullmatch(name))}
    draft = save_model(directory / "draft", config, random_state({**own, "fc.weight": (128, 256)}, 2))
    return Drafted(model, draft, {"method": "eagle", "num_speculative_tokens": 2})


def eagle3(directory: Path) -> Drafted:
    """EAGLE-3: a layer on the hidden states of three of its model's (from 7 on they differ), and a head of its own."""
    config, shapes = llama(num_hidden_layers=7)
    model = save_model(directory / "model", config, random_state(shapes, 1))
    config, shapes = llama(num_hidden_layers=1)
    config["architectures"] = ["LlamaForCausalLMEagle3"]
    own = {
        name.replace("model.layers.0.", "midlayer."): (shape[0], 256) if re.search("[qkv]_proj", name) else shape
        for name, shape in shapes.items()
        if name.startswith("model.layers.0.")
    }
    own |= {"midlayer.hidden_norm.weight": (128,), "fc.weight": (128, 384), "norm.weight": (128,)}
    own["lm_head.weight"] = (WORDS, 128)
    draft = save_model(directory / "draft", config, random_state(own, 2))
    return Drafted(model, draft, {"method": "eagle3", "num_speculative_tokens": 2})


def mtp(directory: Path) -> Drafted:
    """MiMo: dense, with one MTP layer in the checkpoint of the model."""
    config, shapes = llama(num_nextn_predict_layers=1)
    config |= {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "auto_map": {"AutoConfig": "mimo.MiMoConfig"},
    }
    for layer in range(2):
        for name, rows in (("q", 128), ("k", 64), ("v", 64)):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (rows,)
    block = {n.replace("model.layers.0.", "model.mtp_layers.0."): s for n, s in shapes.items() if ".layers.0." in n}
    norms = {f"model.mtp_layers.0.{name}_layernorm.weight": (128,) for name in ("token", "hidden", "final")}
    shapes |= block | norms | {"model.mtp_layers.0.input_proj.weight": (128, 256)}
    model = save_model(directory / "model", config, random_state(shapes, 1))
    (model / "mimo.py").write_text(MIMO)
    return Drafted(model, None, {"method": "mtp", "num_speculative_tokens": 1}, ("--trust-remote-code",))


def said(server: VllmServer) -> tuple[tuple[Answer, ...], dict[str, float]]:
    """Answers, and how many guesses at which position they took."""
    before = guesses(server)
    answered = answers(server, PROMPTS, 24)
    return answered, {position: number - before.get(position, 0.0) for position, number in guesses(server).items()}


def guesses(server: VllmServer) -> dict[str, float]:
    status, text = server.get("/metrics")
    assert status == 200
    return {position: float(number) for position, number in ACCEPTED.findall(text)}


@pytest.mark.parametrize(
    ("kind", "tp"),
    [
        pytest.param(drafter_of_its_own, 2, marks=pytest.mark.long),
        pytest.param(eagle, 1, marks=pytest.mark.long),
        pytest.param(eagle3, 1, marks=pytest.mark.long),
        (mtp, 1),
    ],
    ids=["draft_model at tp 2", "eagle", "eagle3", "mtp"],
)
def test_a_drafter_is_written_with_its_model(kind: Any, tp: int, tmp_path: Path) -> None:
    drafted = kind(tmp_path / "start")
    server = drafted.server(drafted.model, drafted.draft, tp=tp, log=tmp_path / "vllm.log").start()
    env = {} if drafted.draft is None else {"DRAFT": str(drafted.draft)}
    try:
        with fleet(tmp_path / "fleet", {"engine": server}) as whole:
            trainer = whole.start_trainer(drafted.model, script="drafted_trainer.py", env=env)
            server.wait_ready()
            assert trainer.hear()["ready"]
            pushed = []
            for step in (1, 2):
                assert trainer.publish(step).get("sequence") == step
                pushed.append(said(server))
            assert pushed[0][0] != pushed[1][0]
            assert "unneeded" not in {entry["kind"] for entry in whole.engine("engine")["left_out"]}
    finally:
        server.close()
    checkpoint, draft = whole.checkpoints / "step_2", whole.checkpoints / "draft_2"
    fresh = drafted.server(checkpoint, draft if drafted.draft else None, tp=tp, weightsync=False)
    with fresh:
        assert said(fresh) == pushed[1]
    assert sum(pushed[1][1].values()) > 0, "without a right guess nothing is seen of the drafter"


@pytest.mark.long
def test_a_drafter_that_nobody_trains_may_stay(tmp_path: Path) -> None:
    """A trainer of MiMo without its MTP layer, as transformers has it; the layer stays as the engine loaded it."""
    drafted = mtp(tmp_path / "start")
    env = {"WEIGHTSYNC_DRAFTER": "keep"}
    server = drafted.server(drafted.model, None, env=env, log=tmp_path / "vllm.log").start()
    try:
        with fleet(tmp_path / "fleet", {"engine": server}) as whole:
            trainer = whole.start_trainer(drafted.model, script="drafted_trainer.py", env={"LACKS": "mtp_layers"})
            server.wait_ready()
            assert trainer.hear()["ready"]
            assert trainer.publish(1).get("sequence") == 1
            pushed = said(server)
            left_out = {entry["reason"]: entry for entry in whole.engine("engine")["left_out"]}
            (stays,) = (entry for reason, entry in left_out.items() if "WEIGHTSYNC_DRAFTER=keep" in reason)
            assert stays["kind"] == "unwritten"
    finally:
        server.close()
    # The checkpoint that was saved has the layer of the start.
    with drafted.server(whole.checkpoints / "step_1", None, weightsync=False) as fresh:
        assert said(fresh) == pushed
