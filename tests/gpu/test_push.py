"""The whole product on a GPU, by the one judge: after a push the engine answers as a fresh one that loaded the same
version from disk, bit for bit.

fp32 masters in a trainer with expandable segments, FP8 blocks quantised, digested and packed by the kernels, NIXL from
device memory into the live parameters of a vLLM that was held from its start. The checkpoints beside them are quantised
on the CPU by the reference.
"""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from fleet import Fleet, Trainer, fleet
from serving import GRAPHS, Hammer, VllmServer, answers
from streams import Streams
from tiny_models import (
    FP8_BLOCKS,
    FP8_ROWS,
    checkpoint_state,
    model_shapes,
    qwen3_config,
    qwen3_moe_config,
    random_state,
    save_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="there is no vLLM here"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 4096,
}  # fmt: skip
"""Every dimension a multiple of the FP8 block."""
Runs = Literal["eager", "graphs", "compiled"]
"""``graphs``: captured CUDA graphs of the kernels that an eager engine runs. What two engines compile, each for itself,
rounds apart, also of a dense model and in Inductor's deterministic mode: of 40 answers of nine fresh engines of one
checkpoint up to 11 differed between two, and of three with graphs none."""


def dense() -> dict[str, Any]:
    return qwen3_config(**SIZES, **FP8_BLOCKS)


def rows() -> dict[str, Any]:
    """A scale for each row of a weight, as compressed-tensors has them."""
    return qwen3_config(**SIZES, **FP8_ROWS)


def experts() -> dict[str, Any]:
    """32 experts a layer; the router stays bf16."""
    routers = {"modules_to_not_convert": [f"model.layers.{layer}.mlp.gate" for layer in range(4)]}
    blocks = {"quantization_config": FP8_BLOCKS["quantization_config"] | routers}
    return qwen3_moe_config(**SIZES, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=512, **blocks)


@dataclass
class Bench:
    """A held engine on the GPU, its fleet and its trainer; fresh engines beside it load what the trainer saves."""

    whole: Fleet
    server: VllmServer
    trainer: Trainer

    def fresh(self, step: int) -> VllmServer:
        """Starts an ordinary engine on the checkpoint of ``step``, which no round has touched."""
        self.trainer.save(step)
        checkpoint = self.whole.checkpoints / f"step_{step}"
        log = self.whole.directory / f"fresh-{step}.log"
        return self._ordinary(checkpoint, log)

    def fresh_with_its_kernels(self, step: int) -> VllmServer:
        """As ``fresh``, with what the held engine has compiled: vLLM finds that by the model's directory, so the
        checkpoint takes the place of what the held engine was started from."""
        self.trainer.save(step)
        for file in self.server.model_dir.glob("*.safetensors"):
            file.unlink()  # not overwritten: the held engine may map it
        for file in (self.whole.checkpoints / f"step_{step}").glob("*.safetensors"):
            shutil.copy(file, self.server.model_dir)
        return self._ordinary(self.server.model_dir, self.whole.directory / f"fresh-{step}.log")

    def _ordinary(self, checkpoint: Path, log: Path) -> VllmServer:
        tp, eager, arguments = self.server.tp, self.server.eager, self.server.arguments
        return VllmServer(checkpoint, tp=tp, weightsync=False, device="cuda", eager=eager, arguments=arguments, log=log)


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """``request.param``: the model's configuration, how it runs, ranks on either side, and the mode."""
    config, runs, *more = request.param
    ranks, mode = more[0] if more else 1, more[1] if len(more) > 1 else "live"
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"there are not {ranks} GPUs here")
    state = random_state(model_shapes(config), seed=100)
    model = save_model(tmp_path / "model", config, checkpoint_state(config, state))
    log = tmp_path / "engine.log"
    arguments = ("--compilation-config", GRAPHS) if runs == "graphs" else ()
    env, eager = {"WEIGHTSYNC_MODE": mode}, runs == "eager"
    server = VllmServer(model, tp=ranks, device="cuda", eager=eager, arguments=arguments, env=env, log=log).start()
    try:
        with fleet(tmp_path / "fleet", {"engine": server}) as whole:
            yield Bench(whole, server, whole.start_trainer(model, ranks, device="cuda"))
    finally:
        server.close()


def outcomes(whole: Fleet) -> list[str]:
    """Of all rounds, whose figures are printed."""
    rounds = whole.ask("/rounds?last=64")["rounds"]
    for row in rounds:
        print(json.dumps({name: row[name] for name in ("step", "bytes", "descriptors", "wire_gb_per_s", "times_ms")}))
    return [row["outcome"] for row in rounds]


@pytest.mark.parametrize(
    "bench",
    [
        (dense(), "eager"),
        (dense(), "graphs"),
        (rows(), "eager"),
        (experts(), "eager"),
        (dense(), "eager", 2),
        (experts(), "eager", 2),
    ],
    ids=["dense", "graphs", "rows", "experts", "nccl", "nccl-moe"],
    indirect=True,
)
def test_answers_equal_those_of_a_fresh_engine(bench: Bench) -> None:
    whole, server, trainer = bench.whole, bench.server, bench.trainer
    assert trainer.hear()["ready"]
    fresh = {step: bench.fresh(step) for step in (1, 3)}
    try:
        for one in fresh.values():
            one.start()
        server.wait_ready()
        assert server.is_paused(), "the engine must be held until a version is committed"
        served = {}
        for step in (1, 2, 3):
            told = trainer.publish(step, save=False)
            assert told.get("sequence") == step, told
            served[step] = answers(server)
        assert served[1] != served[3], "changed weights must change what is said"
        for step, one in fresh.items():
            assert served[step] == answers(one.wait_ready()), f"version {step}"
    finally:
        for one in fresh.values():
            one.close()
    engine = whole.engine("engine")
    assert (engine["state"], engine["ranks_connected"], engine["paused"]) == ("serving", server.tp, False)
    assert outcomes(whole) == ["committed"] * 3


@pytest.mark.parametrize(
    ("bench", "mode"),
    [
        ((dense(), "graphs", 1, "flip"), "flip"),
        ((experts(), "eager", 1, "flip"), "flip"),
        ((dense(), "graphs", 1, "copy"), "copy"),
        ((dense(), "eager", 2, "flip"), "flip"),
    ],
    ids=["flipped", "flip-experts", "copied", "flip-nccl"],
    indirect=["bench"],
)
def test_versions_land_beside_what_is_served_and_the_one_before_comes_back(bench: Bench, mode: str) -> None:
    """Streams go on meanwhile, and every answer is a fresh engine's."""
    whole, server, trainer = bench.whole, bench.server, bench.trainer
    assert trainer.hear()["ready"]
    fresh = {step: bench.fresh(step) for step in (1, 3)}
    try:
        for one in fresh.values():
            one.start()
        server.wait_ready()
        assert trainer.publish(1, save=False).get("sequence") == 1
        served = {1: answers(server)}
        for step in (2, 3):
            with Streams(server, [(5, 6, 7, 8)] * 2, 200) as streams:
                assert trainer.publish(step, save=False).get("sequence") == step
            assert streams.errors == []
            served[step] = answers(server)
        for step, one in fresh.items():
            assert served[step] == answers(one.wait_ready()), f"version {step}"
    finally:
        for one in fresh.values():
            one.close()
    rounds = whole.ask("/rounds?last=64")["rounds"]
    assert [(row["step"], row["modes"]) for row in rounds] == [(step, {"engine": mode}) for step in (1, 2, 3)]
    assert server.log_path.read_text().count("POST /pause") <= 1, "it is paused for its first version at most"
    if mode == "flip":
        whole.order("rollback")
        whole.until(lambda: len(whole.ask("/rounds?last=64")["rounds"]) == 4, "the rollback to end")
        assert answers(server) == served[2]
        whole.order("rollback", "3")
        whole.until(lambda: len(whole.ask("/rounds?last=64")["rounds"]) == 5, "the way forward again")
        assert answers(server) == served[3]
    assert set(outcomes(whole)) == {"committed"}
    engine = whole.engine("engine")
    assert (engine["state"], engine["mode"], engine["paused"]) == ("serving", mode, False)


@pytest.mark.parametrize("bench", [(dense(), "compiled", 1, "flip")], ids=["compiled"], indirect=True)
def test_a_compiled_engine_answers_as_a_fresh_one_with_its_kernels(bench: Bench) -> None:
    whole, server, trainer = bench.whole, bench.server, bench.trainer
    assert trainer.hear()["ready"]
    server.wait_ready()
    for step in (1, 2):
        assert trainer.publish(step, save=False).get("sequence") == step
    with bench.fresh_with_its_kernels(2) as fresh:
        assert "Directly load AOT compilation" in fresh.log_path.read_text(), "it has kernels of its own"
        assert answers(server) == answers(fresh)
    assert set(outcomes(whole)) == {"committed"}


@pytest.mark.parametrize("bench", [(dense(), "compiled")], ids=["returns"], indirect=True)
def test_clients_notice_no_push_and_a_killed_engine_comes_back(bench: Bench) -> None:
    """What returns is a new process with other memory; the trainer still maps that of the dead one."""
    whole, server, trainer = bench.whole, bench.server, bench.trainer
    assert trainer.hear()["ready"]
    server.wait_ready()
    assert trainer.publish(1, save=False).get("sequence") == 1
    with Hammer(server) as clients:
        assert clients.wait_answer()
        for step in range(2, 8):
            assert trainer.publish(step, save=False).get("sequence") == step
        heard = len(clients.answers)
        whole.until(lambda: len(clients.answers) > heard, "an answer after the last push")
    assert clients.failures == 0
    committed = answers(server)
    server.kill()
    server.start().wait_ready()
    whole.until(lambda: not server.is_paused(), "the returned engine to serve the committed version")
    assert answers(server) == committed
    assert trainer.publish(8, save=False).get("sequence", 0) > 7
    assert answers(server) != committed
    assert outcomes(whole) == ["committed"] * 9
