"""The one judge: after a push the engine answers as a fresh one that loaded the same weights from disk, bit for bit.

The trainer's masters are fp32 with bits that bf16 cannot hold; the fresh engine loads what its cast to bf16 gives.
"""

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, fleet
from serving import DEFAULT_PROMPTS, Answer, VllmServer, answers
from watched import require_metrics, require_surroundings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


LIVE, FLIP = {"WEIGHTSYNC_MODE": "live"}, {"WEIGHTSYNC_MODE": "flip"}


def fresh_answers(checkpoint: Path, tp: int) -> tuple[Answer, ...]:
    """Of an ordinary vLLM that loads ``checkpoint``."""
    with VllmServer(checkpoint, tp=tp, weightsync=False) as server:
        return answers(server)


def asked_of_every_replica(server: VllmServer) -> tuple[Answer, ...]:
    """All answers are alike, whichever data-parallel replica gives them."""
    first = answers(server)
    for _ in range(server.dp * 2 - 1):
        assert answers(server) == first
    return first


def push_and_compare(whole: Fleet, server: VllmServer, model: Path, world: int) -> None:
    trainer = whole.start_trainer(model, world)
    server.wait_ready()
    assert server.is_paused(), "the engine must be held until a version is committed"
    assert trainer.hear()["ready"]
    served = {}
    for step in (1, 2, 3, 4, 5):
        assert trainer.publish(step)["sequence"] == step
        served[step] = asked_of_every_replica(server)
    assert served[1] != served[5], "changed weights must change what is said"
    status, told = server.get("/weight_info")
    assert (status, told) == (200, {"weight_version": "5"})
    require_metrics(whole, rounds=5, step=5, trainers=world, ranks=server.tp * server.dp)
    require_surroundings(whole)
    if server.env.get("WEIGHTSYNC_MODE") == "flip":
        whole.command("rollback", "--config", str(whole.config))
        whole.until(lambda: whole.engine("engine")["version"]["step"] == 4, "the version before to be served")
        assert asked_of_every_replica(server) == served[4]
    for step in (1, 5):
        assert served[step] == fresh_answers(whole.checkpoints / f"step_{step}", server.tp)


def require_mode(whole: Fleet, engine: dict[str, Any], mode: str, tp: int) -> None:
    """How it lands, and why, is told by the daemon, by the engine itself, and of the plan."""
    named = {"live": "WEIGHTSYNC_MODE=live", "flip": "WEIGHTSYNC_MODE=flip"}
    why = named.get(mode, "no flip: pages of host memory are exchanged with WEIGHTSYNC_MODE=flip alone; ")
    assert engine["mode"] == mode
    assert engine["mode_because"].startswith(why)
    told = whole.command("config", "check", str(whole.config), "--probe")
    ranks = engine["ranks_connected"]
    # Of several engine cores the first answers, whose ranks are numbered anew in each.
    assert len(re.findall(rf"engine: rank \d lands {mode} with \d+ MiB \({re.escape(why)}", told)) == tp, told
    told = whole.command("plan", "explain", "--config", str(whole.config))
    assert re.search(rf"\nengine +{mode} +{ranks} +\S+ \S+ +{re.escape(why)}", told), told


@pytest.mark.parametrize(
    ("tp", "dp", "world", "env"),
    [
        pytest.param(1, 1, 1, {}, id="tp1"),
        pytest.param(2, 1, 2, {}, id="tp2"),
        pytest.param(1, 2, 2, {}, id="dp2"),
        pytest.param(1, 1, 1, LIVE, id="live-tp1", marks=pytest.mark.long),
        pytest.param(2, 1, 2, LIVE, id="live-tp2"),
        pytest.param(1, 1, 1, FLIP, id="flip-tp1"),
    ],
)
def test_answers_equal_those_of_a_fresh_engine(
    tp: int, dp: int, world: int, env: dict[str, str], qwen3: Path, tmp_path: Path
) -> None:
    server = VllmServer(qwen3, tp=tp, dp=dp, log=tmp_path / "vllm.log", env=env).start()
    try:
        with fleet(tmp_path / "fleet", {"engine": server}) as whole:
            push_and_compare(whole, server, qwen3, world)
            engine = whole.engine("engine")
            assert (engine["state"], engine["ranks_connected"], engine["paused"]) == ("serving", tp * dp, False)
            mode = env.get("WEIGHTSYNC_MODE", "copy")
            require_mode(whole, engine, mode, tp)
            assert whole.daemon is not None
            assert ("while the trainer converts it" in whole.daemon.tail(10_000)) == (mode != "live")
            assert [(entry["kind"], entry["reason"]) for entry in engine["left_out"]] == [
                ("unwritten", "a buffer that the model computes itself")
            ]
            assert any("cos_sin_cache" in name for name in engine["left_out"][0]["names"])
    finally:
        server.close()


def test_streams_go_on_while_versions_are_pushed(qwen3: Path, tmp_path: Path) -> None:
    """Nobody's request fails or hangs; the prefix cache never mixes two models."""
    server = VllmServer(qwen3, prefix_caching=True, log=tmp_path / "vllm.log").start()
    try:
        with fleet(tmp_path / "fleet", {"engine": server}) as whole:
            trainer = whole.start_trainer(qwen3)
            server.wait_ready()
            assert trainer.hear()["ready"]
            assert trainer.publish(1)["sequence"] == 1
            stop, lengths, errors = threading.Event(), [], []

            def hammer() -> None:
                while not stop.is_set():
                    try:
                        lengths.append(sum(len(chunk) for chunk in server.stream(DEFAULT_PROMPTS[0], 64)))
                    except Exception as error:
                        errors.append(error)
                        return

            clients = [threading.Thread(target=hammer) for _ in range(2)]
            for client in clients:
                client.start()
            for step in range(2, 7):
                assert trainer.publish(step)["sequence"] == step
            stop.set()
            for client in clients:
                client.join()
            assert errors == []
            assert lengths
            assert set(lengths) == {64}
            assert answers(server) == fresh_answers(whole.checkpoints / "step_6", 1)
    finally:
        server.close()
