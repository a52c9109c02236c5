"""An agent for streams: what it refuses before any byte moves, on all ranks at once, leaving nobody waiting."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.stream_agent import StreamAgent
from weightsync.agents.trainer.streamed import StreamedTensor

NOBODY = "ws://127.0.0.1:9/agents"
"""The discard port, where nothing listens."""


def stream_agent(folder: Path, rank: int = 0, world: int = 1) -> StreamAgent:
    token = folder / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    return StreamAgent(
        hub_url=NOBODY, token_file=token, run_id="r", run_dir=folder, rank=rank, world=world,
        connect_seconds=0.3,
    )  # fmt: skip


def counted(passed: list[str], *pairs: tuple[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for pair in pairs:
        yield pair
        passed.append(pair[0])


def test_a_refused_stream_is_read_to_its_end_and_names_the_tensor(tmp_path: Path) -> None:
    agent, passed = stream_agent(tmp_path), []
    bad = ("codes", torch.ones(2, dtype=torch.int8))
    with pytest.raises(PublishError, match=r"rank 0: StreamError: tensor 'codes' has the dtype torch\.int8"):
        agent.publish_stream(1, counted(passed, ("w", torch.ones(2)), bad, ("z", torch.ones(2))))
    assert passed == ["w", "codes", "z"]
    assert not (tmp_path / "broadcasts").exists()


def test_contradicting_metadata_is_refused_and_the_stream_read_to_its_end(tmp_path: Path) -> None:
    agent, passed = stream_agent(tmp_path), []
    twice = [StreamedTensor("w", torch.float32, (2,))] * 2
    with pytest.raises(PublishError, match="declares 'w' twice"):
        agent.publish_stream(1, counted(passed, ("w", torch.ones(2))), metadata=twice)
    assert passed == ["w"]


def test_nan_and_infinity_are_refused_by_name_in_every_pass(tmp_path: Path) -> None:
    agent = stream_agent(tmp_path)
    bad = [("fine", torch.ones(2)), ("w", torch.tensor([1.0, float("nan"), float("-inf")]))]
    for step in (1, 2):
        with pytest.raises(PublishError, match=rf"step {step} .*w \(2 of 3 values\)"):
            agent.publish_stream(step, bad)


def test_without_a_daemon_the_first_pass_says_so_and_the_next_one_tries_again(tmp_path: Path) -> None:
    agent = stream_agent(tmp_path)
    for step in (1, 1):
        with pytest.raises(PublishError, match=r"no Welcome from ws://127\.0\.0\.1:9/agents within 0\.3 s"):
            agent.publish_stream(step, [("w", torch.ones(2))])
    agent.close()


def test_a_refusal_at_one_rank_reaches_all_after_everybodys_pass(in_ranks, tmp_path: Path) -> None:
    def body(rank: int) -> str:
        (tmp_path / str(rank)).mkdir()
        agent = stream_agent(tmp_path / str(rank), rank, 2)

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for name in ("a", "b", "c"):  # each tensor is a collective, as FSDP2's full_tensor() is
                value = torch.ones(2)
                dist.all_reduce(value)
                yield name, value.to(torch.int32) if (rank, name) == (1, "a") else value

        with pytest.raises(PublishError) as caught:
            agent.publish_stream(1, gathered())
        dist.barrier()
        return str(caught.value)

    said = in_ranks(2, body)
    assert said[0] == said[1]
    assert "1 of 2 ranks; rank 1: StreamError: tensor 'a' has the dtype torch.int32" in said[0]


def test_it_has_no_model_to_publish(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"step 1: this agent has no model to publish; call publish_stream"):
        stream_agent(tmp_path).publish(1)
