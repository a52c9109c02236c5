"""A real vLLM whose weights change between two steps while it streams: no token is lost, none is of a mixture.

The workers' agents are doubles (``weightsync_cpu_test_plugin.FlagAgent``), so that no daemon takes part; their new
weights say token 0 whatever the keys and values are, and every mixture of old and new says something else.
"""

import contextlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import RequestFailed, VllmServer
from streams import Streams, require_whole_versions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = (5, 6, 7, 8)
TOKENS = 160


@dataclass
class Switchable:
    """A server that serves, and the files that its workers follow."""

    server: VllmServer
    flag: Path

    def switch(self, number: int, **changes: Any) -> tuple[int, Any]:
        """As the daemon switches."""
        order = {
            "round": [1, number],
            "version": [1, number],
            "incarnations": {"0": 100, "1": 101},
            "cache": "keep",
            "deadline_seconds": 20.0,
            **changes,
        }
        return self.server.post("/collective_rpc", {"method": "weightsync_switch", "kwargs": order})


WAYS = {
    "steps": ((1, 1), ("--no-async-scheduling",)),
    "async": ((1, 1), ("--async-scheduling",)),
    "tp2": ((2, 1), ()),
    "pp2": ((1, 1), ("--pipeline-parallel-size", "2")),
    "dp2": ((1, 2), ()),
}


@pytest.fixture(params=WAYS)
def engine(request: pytest.FixtureRequest, qwen3: Path, tmp_path: Path) -> Any:
    """Serving, in one of the ways in which vLLM takes its steps."""
    (tp, dp), arguments = WAYS[request.param]
    flag = tmp_path / "servable"
    flag.touch()
    env = {"WEIGHTSYNC_TEST_SERVABLE": str(flag)}
    if request.param == "pp2":
        env["WEIGHTSYNC_TEST_PIPELINE"] = "1"
    with VllmServer(qwen3, tp=tp, dp=dp, env=env, arguments=arguments, log=tmp_path / "vllm.log") as server:
        assert server.post("/resume")[0] == 200
        yield Switchable(server, flag)


def test_streams_go_on_across_the_switch_with_tokens_of_whole_versions(engine: Switchable) -> None:
    old = [*engine.server.complete(PROMPT, TOKENS).tokens]
    assert 0 not in old
    engine.flag.with_suffix(".empty1").touch()
    engine.flag.with_suffix(".empty0").touch()
    status, body = engine.switch(1)
    assert status == 500
    assert "nothing waits in standby" in json.dumps(body)
    assert not engine.server.is_paused(), "nothing was changed"
    engine.flag.with_suffix(".empty0").unlink()
    engine.flag.with_suffix(".empty1").unlink()
    with Streams(engine.server, [PROMPT] * 6, TOKENS) as streams:
        status, body = engine.switch(2)
    assert status == 200, body
    (answer,) = body["results"]
    assert not answer["paused"]
    assert 0.0 < answer["seconds"] < 5.0
    require_whole_versions(streams, old)
    assert engine.switch(2) == (200, {"results": [answer]}), "asked again, it changes nothing"
    for _ in range(4):  # whichever replica answers
        assert engine.server.complete(PROMPT, 4).tokens == (0, 0, 0, 0)
    assert engine.server.get("/weight_info") == (200, {"weight_version": "2"})


@pytest.mark.parametrize("engine", ["tp2"], indirect=True)
def test_a_rank_that_fails_leaves_the_engine_paused_and_its_calls_in_step(engine: Switchable) -> None:
    engine.flag.with_suffix(".broken1").touch()

    def hang() -> None:
        with contextlib.suppress(RequestFailed, OSError):  # when the server ends
            list(engine.server.stream(PROMPT, TOKENS))

    threading.Thread(target=hang, daemon=True).start()
    status, body = engine.switch(1)
    assert status == 500
    assert "switch failed in 1 of 2 workers: rank 1: RuntimeError: the device is lost" in json.dumps(body)
    assert engine.server.is_paused()
    status, body = engine.switch(2, incarnations={"0": 100, "1": 5})
    assert "rank 1: it is incarnation 101, and the call means 5" in json.dumps(body)
    assert engine.server.is_paused()
