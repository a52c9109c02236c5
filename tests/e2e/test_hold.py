"""A real vLLM under the hold: nobody gets a token before the weights are servable, nor after they are torn.

The workers' agents are doubles that follow a file (``weightsync_cpu_test_plugin.FlagAgent``), so that no daemon takes
part: what is shown is the hold, the gate and the calls alone.
"""

import asyncio
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from serving import Answer, Hammer, VllmServer
from weightsync.orchestrator.cli.doctor import servers
from weightsync.orchestrator.cli.doctor.places import urls_of
from weightsync.orchestrator.settings.credentials import make_tokens
from weightsync.orchestrator.settings.settings import load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = (5, 6, 7, 8)
QUIET_SECONDS = 2.0
"""How long clients must get nothing; an answer of this model takes some 50 ms."""

UPDATE = {"token": "1.1", "round_epoch": 1, "round_number": 1, "generation": 1, "step": 1, "deadline_seconds": 5.0}


@dataclass
class Held:
    """A server whose workers follow ``flag``, and what clients got that asked it from its start on."""

    server: VllmServer
    flag: Path
    early: list[Any] = field(default_factory=list)

    @property
    def torn(self) -> Path:
        return self.flag.with_suffix(".torn")

    def ranks(self) -> list[dict[str, int]]:
        """What each worker took for its ranks, in their order."""
        found = [json.loads(path.read_text()) for path in self.flag.parent.glob("*.rank*")]
        return sorted(found, key=lambda ranks: ranks["rank"])

    def refused_to_resume(self) -> str:
        """Asks for a resume that must be refused, with the engine paused and healthy afterwards; the reason."""
        status, body = self.server.post("/resume")
        assert status >= 400, body
        assert self.server.is_paused()
        assert self.server.healthy()
        return str(body["error"])

    def resume(self, means: dict[str, int]) -> tuple[int, Any]:
        """As the daemon resumes."""
        return self.server.post("/collective_rpc", {"method": "weightsync_resume", "kwargs": {"incarnations": means}})

    def resume_of_all_but_rank_1(self) -> None:
        """Ranks of one engine core stay together; independent replicas each answer for their own weights."""
        if self.server.dp == 1:
            assert "not servable: rank 1: " in self.refused_to_resume()
        else:
            status, body = self.server.post("/resume")
            assert (status, "not servable: rank 1: " in body["error"]) == (500, True)

    def update(self, expect: int = 200) -> Any:
        """Start, update and finish as the daemon calls them; the answer to the update."""
        body = {"is_checkpoint_format": False}
        assert self.server.post("/start_weight_update", body)[0] == 200
        status, answer = self.server.post("/update_weights", {"update_info": UPDATE})
        assert status == expect, answer
        if status == 200:
            assert self.server.post("/finish_weight_update", {"weight_version": "v1"})[0] == 200
        return answer


@pytest.fixture(
    scope="module", params=[pytest.param((2, 1), id="tp2"), pytest.param((1, 2), id="dp2", marks=pytest.mark.long)]
)
def held(request: pytest.FixtureRequest, qwen3: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Held:
    """A server that clients hammered until it was ready and for a while longer."""
    tp, dp = request.param
    flag = tmp_path_factory.mktemp("held") / "servable"
    ready = ("--middleware", "weightsync.agents.vllm.readiness.Readiness")
    env = {"WEIGHTSYNC_TEST_SERVABLE": str(flag)}
    server = serve(qwen3, tp=tp, dp=dp, env=env, arguments=ready, log=flag.with_suffix(".log"))
    with Hammer(server, clients=1, timeout=QUIET_SECONDS) as hammer:
        server.wait_ready()
        hammer.wait_answer(QUIET_SECONDS)
    return Held(server, flag, hammer.answers)


def in_background(action: Callable[[], Answer]) -> tuple[threading.Thread, list[Answer]]:
    """Runs ``action`` in a thread; its result appears in the list."""
    results: list[Answer] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    return thread, results


def test_clients_that_hammer_from_the_start_get_nothing(held: Held) -> None:
    assert held.early == []
    assert held.server.is_paused()


def test_workers_know_their_ranks(held: Held) -> None:
    ranks = held.ranks()
    assert [r["rank"] for r in ranks] == [0, 1]
    assert [r["tp_rank"] for r in ranks] == ([0, 1] if held.server.tp == 2 else [0, 0])
    assert [r["dp_rank"] for r in ranks] == ([0, 1] if held.server.dp == 2 else [0, 0])
    assert held.server.get("/get_world_size") == (200, {"world_size": 2})


def test_a_load_balancer_is_told_that_it_is_held(held: Held) -> None:
    status, body = held.server.get("/weightsync/ready")
    assert (status, body["ready"]) == (503, False)
    assert re.search(r"not serving: rank [01]: no version has been committed", body["reason"])


def test_the_doctor_knows_it_by_what_it_says_of_itself(held: Held, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "run: {id: e2e, directory: .}\nstate_directory: state\ncredentials: credentials\nengines:\n"
        f"  - {{name: engine, url: '{held.server.url}'}}\n  - {{name: b, url: '{held.server.url}/v1'}}\n"
    )
    make_tokens(tmp_path / "credentials")
    (tmp_path / "credentials" / "engine.token").write_text(held.server.token)
    settings = load(config, {})
    urls = urls_of(settings)
    [seen] = asyncio.run(servers.ask_all(settings, 60, {held.server.url: urls[held.server.url]}))
    assert seen.info is not None
    several = held.server.dp > 1
    assert (seen.info.backend, bool(seen.info.identity)) == ("weightsync", not several)
    [told] = [finding.text for finding in seen.findings]
    assert told.startswith(f"engine engine: {held.server.url}: vLLM ")
    assert told.endswith("ranks, weightsync backend")
    twice = servers.together([seen, dataclasses.replace(seen, engine="b")])
    assert [(each.level, "are one server" in each.what) for each in twice] == [("error", True)] * (not several)


def test_a_strangers_resume_is_refused(held: Held) -> None:
    refusal = held.refused_to_resume()  # of whichever data-parallel replica is asked first
    assert re.search(r"not servable: rank [01]: no version has been committed", refusal)
    assert held.server.post("/pause?mode=wait&clear_cache=false")[0] >= 400
    assert held.server.post("/pause?mode=abort&clear_cache=false")[0] == 200
    assert "not servable" in held.refused_to_resume()


def test_calls_out_of_order_do_no_harm(held: Held) -> None:
    for path, body in (("/update_weights", {"update_info": UPDATE}), ("/finish_weight_update", {})):
        status, answer = held.server.post(path, body)
        assert status == 500
        assert "/start_weight_update first" in json.dumps(answer)
    for _ in range(2):  # as when a daemon dies after its start
        assert held.server.post("/start_weight_update", {"is_checkpoint_format": False})[0] == 200
    status, answer = held.server.post("/update_weights", {"update_info": {"token": 1}})
    assert status == 500
    assert "update_info" in json.dumps(answer)
    assert "not servable" in held.refused_to_resume()


def test_weights_cannot_be_changed_outside_of_a_round(held: Held) -> None:
    assert held.server.post("/collective_rpc", {"method": "reload_weights"})[0] == 500
    assert held.server.post("/sleep?level=1")[0] == 500
    assert "not servable" in held.refused_to_resume()


def test_a_request_of_the_hold_is_answered_after_the_release(held: Held) -> None:
    thread, results = in_background(lambda: held.server.complete(PROMPT, 4))
    assert held.server.post("/pause?mode=keep&clear_cache=true")[0] == 200
    assert held.server.post("/init_weight_transfer_engine", {"init_info": {"world": 2}})[0] == 200
    held.update()
    assert "not servable" in held.refused_to_resume()
    assert results == []
    refusal = held.flag.with_suffix(".refuse1")
    refusal.touch()
    held.flag.touch()
    held.resume_of_all_but_rank_1()
    refusal.unlink()
    status, body = held.resume({"0": 100, "1": 55})
    assert status == 500
    assert "not servable: rank 1: it is incarnation 101, and the call means 55" in json.dumps(body)
    assert held.resume({"0": 100, "1": 101}) == (200, {"results": []})
    assert not held.server.is_paused()
    assert held.server.get("/weightsync/ready") == (200, {"ready": True, "reason": ""})
    thread.join(60)
    assert results == [held.server.complete(PROMPT, 4)]


def test_an_update_needs_a_pause(held: Held) -> None:
    assert "pause" in json.dumps(held.update(expect=500))
    assert len(held.server.complete(PROMPT, 4).tokens) == 4


def test_a_torn_engine_stays_paused_until_it_is_repaired(held: Held) -> None:
    before = held.server.complete(PROMPT, 4)
    assert held.server.post("/pause?mode=keep&clear_cache=true")[0] == 200
    held.flag.unlink()
    held.torn.touch()
    answer = json.dumps(held.update(expect=500))
    assert "round 1 tore the weights" in answer
    if held.server.tp == 2:
        assert "2 of 2 workers: rank 0: " in answer
    thread, results = in_background(lambda: held.server.complete(PROMPT, 4))
    assert "torn" in held.refused_to_resume()
    held.torn.unlink()
    held.update()
    held.flag.touch()
    assert results == []
    assert held.server.post("/resume")[0] == 200
    thread.join(60)
    assert results == [before]


def paused_in_lease_of(held: Held, seconds: float) -> bool:
    """Whether the engine is still paused after so many seconds; both replicas have to agree to answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status, body = held.server.get("/is_paused")
        if (status, body) == (200, {"is_paused": False}):
            return False
        time.sleep(0.05)
    return True


def test_without_a_daemon_its_pause_ends_by_itself_and_nobody_elses_does(held: Held) -> None:
    abandoned = held.flag.with_suffix(".abandoned")
    before = held.server.complete(PROMPT, 4)
    assert held.server.post("/pause?mode=keep&clear_cache=true")[0] == 200  # an operator's, by hand
    abandoned.touch()
    assert paused_in_lease_of(held, QUIET_SECONDS)
    abandoned.unlink()
    assert held.server.post("/start_weight_update", {"is_checkpoint_format": False})[0] == 200
    assert paused_in_lease_of(held, QUIET_SECONDS), "the daemon is there"
    held.torn.touch()
    held.flag.unlink()
    abandoned.touch()
    assert paused_in_lease_of(held, QUIET_SECONDS), "torn"
    held.torn.unlink()
    held.flag.touch()
    assert not paused_in_lease_of(held, 2 * QUIET_SECONDS)
    abandoned.unlink()
    assert held.server.complete(PROMPT, 4) == before


def test_a_restarted_engine_is_held_again(held: Held) -> None:
    held.flag.unlink()
    held.server.kill()
    held.server.start()
    with Hammer(held.server, clients=1, timeout=QUIET_SECONDS) as hammer:
        held.server.wait_ready()
        assert held.server.is_paused()
        assert not hammer.wait_answer(QUIET_SECONDS)
    assert "not servable" in held.refused_to_resume()
    held.flag.touch()
    assert held.resume({"0": 7, "1": 8})[0] == 500, "the processes before the restart are meant"
    assert held.server.is_paused()
    assert held.resume({"0": 100, "1": 101})[0] == 200
    assert len(held.server.complete(PROMPT, 4).tokens) == 4


def test_the_gate_stops_what_the_hold_would_let_through(held: Held) -> None:
    """Last of all, because an engine whose worker refuses a batch ends."""
    held.flag.unlink()
    status, body = held.server.request(
        "POST", "/v1/completions", {"model": "tiny", "prompt": list(PROMPT), "max_tokens": 1}
    )
    assert status >= 500, body
    assert "a batch of 4 tokens is refused: no version has been committed" in held.server.log_path.read_text()
