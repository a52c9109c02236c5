"""Engines that make themselves members of a daemon whose configuration names none."""

from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, fleet
from ports import free_port
from serving import VllmServer, answers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LEAVE_SECONDS = 300
"""Long: whose processes are gone is let go before that."""


def server_of(whole: Fleet, name: str, model: Path) -> VllmServer:
    port = free_port()
    env = {
        "WEIGHTSYNC_HUB_URL": f"ws://127.0.0.1:{whole.port}/agents",
        "WEIGHTSYNC_TOKEN_FILE": str(whole.credentials / "engine.token"),
        "WEIGHTSYNC_RUN_ID": whole.run_id,
        "WEIGHTSYNC_ENGINE": name,
        "WEIGHTSYNC_ENGINE_URL": f"http://127.0.0.1:{port}",
    }
    return VllmServer(model, port=port, env=env, log=whole.directory / f"{name}.log").start()


def states(whole: Fleet) -> dict[str, Any]:
    return {engine["name"]: engine["state"] for engine in whole.status()["engines"]}


def test_engines_join_by_themselves_serve_and_leave(qwen3: Path, tmp_path: Path) -> None:
    admit = {"names": ["rollout-*"], "hosts": ["127.0.0.0/8"], "at_most": 2, "leave_seconds": LEAVE_SECONDS}
    servers: list[VllmServer] = []
    with fleet(tmp_path / "fleet", {}, settings={"engines_admit": admit}) as whole:
        try:
            assert states(whole) == {}
            first = server_of(whole, "rollout-0", qwen3)
            servers.append(first)
            trainer = whole.start_trainer(qwen3)
            assert trainer.hear()["ready"]
            assert trainer.publish(1)["sequence"] == 1
            assert whole.engine("rollout-0")["url"] == first.url
            served = answers(first)

            second = server_of(whole, "rollout-1", qwen3)
            servers.append(second)
            whole.until(lambda: states(whole) == dict.fromkeys(["rollout-0", "rollout-1"], "serving"), "a second one")
            assert answers(second) == served, "it has caught up"

            whole.restart_daemon()
            assert list(states(whole)) == ["rollout-0", "rollout-1"], "the journal knows them"
            assert trainer.publish(2)["sequence"] == 2
            whole.until(lambda: states(whole) == dict.fromkeys(["rollout-0", "rollout-1"], "serving"), "all to serve")

            second.close()
            whole.until(lambda: list(states(whole)) == ["rollout-0"], "the one that ends to leave", 30.0)
            assert trainer.publish(3)["sequence"] == 3
            served = answers(first)
        finally:
            for server in servers:
                server.close()
        with VllmServer(whole.checkpoints / "step_3", weightsync=False) as fresh:
            assert answers(fresh) == served
