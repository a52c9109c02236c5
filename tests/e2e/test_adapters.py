"""Loops of other projects' trainers over a real engine: it answers as a fresh one that loaded ``save_pretrained``'s."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Fleet, fleet
from reference import plain, reference_answers
from serving import VllmServer, answers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def served(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, VllmServer]]:
    """One engine and one daemon for all adapters; their trainers come one after the other."""
    directory = tmp_path_factory.mktemp("adapters")
    server = VllmServer(qwen3, log=directory / "vllm.log").start()
    try:
        with fleet(directory / "fleet", {"engine": server}) as whole:
            server.wait_ready()
            yield whole, server
    finally:
        server.close()


@pytest.mark.parametrize(
    ("adapter", "world"),
    [("trl", 1), ("trl", 2), ("verl", 2), ("vllm 0.32", 2), ("vllm 0.33 pieces", 2), ("vllm 0.33 whole", 2)],
)
def test_a_loop_in_ten_lines(
    adapter: str, world: int, served: tuple[Fleet, VllmServer], qwen3: Path, tmp_path: Path
) -> None:
    whole, server = served
    trainer = whole.start_trainer(qwen3, world, script="adapter_trainer.py", env={"ADAPTER": adapter})
    assert trainer.hear() == {"published": 1}
    assert trainer.hear() == {"published": 2}
    said = plain(answers(server))
    for rank in trainer.ranks:
        assert rank.child is not None
        assert rank.child.wait(60) == 0, rank.tail()
    folder = whole.checkpoints / adapter
    first, second = reference_answers(qwen3, [folder / "step_1", folder / "step_2"], tmp_path)
    assert said == second
    assert first != second, "a step of training must change what is said"
