"""An engine that is killed and comes back while no trainer is there takes the version from one that serves it."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fleet import Fleet, Trainer, fleet
from serving import DEFAULT_PROMPTS, VllmServer, several
from test_push import fresh_answers

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]


@dataclass
class Pair:
    """Two engines that serve step 1."""

    whole: Fleet
    servers: dict[str, VllmServer]
    trainer: Trainer

    def restart(self, name: str) -> None:
        """Its processes are killed, and others take their place."""
        self.servers[name].kill()
        self.servers[name].start()

    def answers(self, name: str) -> object:
        return tuple(self.servers[name].complete(prompt) for prompt in DEFAULT_PROMPTS)

    def last_round(self) -> dict[str, object]:
        return dict(self.whole.ask("/rounds?last=1")["rounds"][0])


@pytest.fixture(params=["copy", "live"])
def pair(request: pytest.FixtureRequest, qwen3: Path, tmp_path: Path) -> Iterator[Pair]:
    env = {"WEIGHTSYNC_MODE": request.param}
    servers = several(["a", "b"], qwen3, env=env)
    for server in servers.values():
        server.start()
    try:
        with fleet(tmp_path / "fleet", servers, settings={"fan_out": "auto"}) as whole:
            trainer = whole.start_trainer(qwen3)
            for server in servers.values():
                server.wait_ready()
            assert trainer.hear()["ready"]
            assert trainer.publish(1)["sequence"] == 1
            yield Pair(whole, servers, trainer)
    finally:
        for server in servers.values():
            server.close()


def test_an_engine_that_returns_is_fed_by_its_peer_with_a_trainer_and_without_one(pair: Pair) -> None:
    right = fresh_answers(pair.whole.checkpoints / "step_1", 1)
    assert pair.answers("a") == right

    pair.restart("b")
    pair.servers["b"].wait_ready()
    pair.whole.until(lambda: pair.whole.engine("b").get("state") == "serving", "b to serve beside a trainer")
    row = pair.last_round()
    assert (row["outcome"], row["kind"], row["lenders"], row["step"]) == ("committed", "catch-up", {"b": "a"}, 1)
    assert pair.answers("b") == right

    for rank in pair.trainer.ranks:
        rank.kill(signal.SIGKILL)
    pair.restart("a")  # now the one that borrowed lends
    pair.servers["a"].wait_ready()
    pair.whole.until(lambda: pair.whole.engine("a").get("state") == "serving", "a to serve without a trainer")
    row = pair.last_round()
    assert (row["outcome"], row["lenders"]) == ("committed", {"a": "b"})
    assert row["bytes"] > 0
    assert pair.answers("a") == pair.answers("b") == right
