"""Versions that land beside the weights of a real vLLM: it serves until it switches, between two steps.

What streams say proves it: a muted version says token 0 whatever the keys and values are, and no mixture of two
versions does. So each stream is the old version's tokens up to some point, and token 0 from there on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fleet import Fleet, Trainer, fleet
from serving import DEFAULT_PROMPTS, VllmServer
from streams import Streams, require_whole_versions
from test_push import fresh_answers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROMPT = DEFAULT_PROMPTS[0]
LONG_PROMPT = tuple(range(20, 170))
"""Longer than a block of the prefix cache, so that a second request finds what the first has left there."""
TOKENS = 200


@dataclass
class Pushed:
    """A fleet of one engine in ``copy``, which serves its first version."""

    whole: Fleet
    server: VllmServer
    trainer: Trainer
    steps: list[int] = field(default_factory=lambda: [1])

    def push(self, mute: bool = False) -> int:
        step = self.steps[-1] + 1
        assert self.trainer.publish(step, mute=mute)["sequence"] == step
        self.steps.append(step)
        return step


@pytest.fixture(scope="module", params=["keep", pytest.param("drop", marks=pytest.mark.long), "recompute"])
def pushed(request: pytest.FixtureRequest, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    directory = tmp_path_factory.mktemp(request.param)
    server = VllmServer(qwen3, prefix_caching=True, log=directory / "vllm.log").start()
    try:
        settings = {"pause": {"cache": request.param}}
        with fleet(directory / "fleet", {"engine": server}, settings=settings) as whole:
            trainer = whole.start_trainer(qwen3)
            server.wait_ready()
            assert trainer.hear()["ready"]
            assert trainer.publish(1)["sequence"] == 1
            yield Pushed(whole, server, trainer)
    finally:
        server.close()


def test_streams_go_on_across_a_push_with_tokens_of_whole_versions(pushed: Pushed) -> None:
    old = [*pushed.server.complete(PROMPT, TOKENS).tokens]
    assert 0 not in old
    with Streams(pushed.server, [PROMPT] * 3, TOKENS) as streams:
        pushed.push(mute=True)
    require_whole_versions(streams, old)


def test_the_engine_was_never_paused_for_it(pushed: Pushed) -> None:
    said = pushed.server.log_path.read_text()
    assert "POST /pause" not in said.split("POST /v1/completions", 1)[1], "it is paused for its first version at most"
    assert "serving step 2" in said
    row = pushed.whole.ask("/rounds?last=1")["rounds"][0]
    assert (row["outcome"], row["step"]) == ("committed", pushed.steps[-1])


def test_whoever_asks_anew_gets_answers_of_the_new_weights_alone(pushed: Pushed) -> None:
    """Also beside a stream that keeps its own keys and values: nobody else finds these."""
    policy = pushed.whole.settings["pause"]["cache"]
    before = pushed.server.complete(LONG_PROMPT, 8)
    with Streams(pushed.server, [LONG_PROMPT[:140]], 100) as streams:
        step = pushed.push()
    assert streams.errors == []
    told = pushed.server.complete(LONG_PROMPT, 8)
    assert told != before
    with VllmServer(pushed.whole.checkpoints / f"step_{step}", weightsync=False, prefix_caching=True) as fresh:
        right = fresh.complete(LONG_PROMPT, 8)
    assert (told == right) is (policy != "keep"), "with keep, what the old weights computed is still found"


def test_pushes_one_after_the_other_end_with_the_answers_of_a_fresh_engine(pushed: Pushed) -> None:
    for _ in range(5):
        step = pushed.push()
    if pushed.whole.settings["pause"]["cache"] == "keep":
        assert pushed.server.post("/reset_prefix_cache")[0] == 200
    told = tuple(pushed.server.complete(prompt) for prompt in DEFAULT_PROMPTS)
    assert told == fresh_answers(pushed.whole.checkpoints / f"step_{step}", 1)
