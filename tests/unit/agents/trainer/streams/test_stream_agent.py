"""An agent for streams: what it refuses before any byte moves, on all ranks at once, leaving nobody waiting."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from trainer_ranks import Run, daemon, weights
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.replicas import ALONE, Group
from weightsync.agents.trainer.routes.routes import NeededTable
from weightsync.agents.trainer.streams.stream_agent import StreamAgent
from weightsync.agents.trainer.streams.streamed import StreamedTensor
from weightsync.orchestrator.protocol.layout import Quantized, Tensor
from weightsync.orchestrator.protocol.markers import decode_manifest
from weightsync.orchestrator.protocol.messages import Needs

NOBODY = "ws://127.0.0.1:9/agents"
"""The discard port, where nothing listens."""


def stream_agent(folder: Path, group: Group = ALONE) -> StreamAgent:
    """With a table, an empty one, so that the daemon is not asked before the first pass."""
    token = folder / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    return StreamAgent(
        NeededTable([]), hub_url=NOBODY, token_file=token, run_id="r", run_dir=folder, process_group=group,
        connect_seconds=0.3,
    )  # fmt: skip


def counted(passed: list[str], *pairs: tuple[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for pair in pairs:
        yield pair
        passed.append(pair[0])


def test_a_refused_stream_is_read_to_its_end_and_names_the_tensor(tmp_path: Path) -> None:
    agent, passed = stream_agent(tmp_path), []
    bad = ("codes", torch.ones(2, dtype=torch.int8))
    with pytest.raises(PublishError, match=r"rank 0: StreamError: tensor 'codes' is int8; "):
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
        with pytest.raises(PublishError, match=r"no Welcome from ws://127\.0\.0\.1:9/agents within 0 s"):
            agent.publish_stream(step, [("w", torch.ones(2))])
    agent.close()


def test_a_refusal_at_one_rank_reaches_all_after_everybodys_pass(in_ranks, tmp_path: Path) -> None:
    def body(rank: int) -> str:
        (tmp_path / str(rank)).mkdir()
        agent = stream_agent(tmp_path / str(rank), None)

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
    assert "step 1 was not published: rank 1: StreamError: tensor 'a' is int32; " in said[0]


def test_one_rank_of_a_job_enters_no_collective(in_ranks, tmp_path: Path) -> None:
    def body(rank: int) -> str:
        if rank != 1:
            return ""
        with pytest.raises(PublishError) as caught:
            stream_agent(tmp_path).publish_stream(1, [("a", torch.ones(2, dtype=torch.int32))])
        return str(caught.value)

    said = in_ranks(3, body)
    assert "rank 0: StreamError: tensor 'a'" in said[1]


def test_a_rank_that_is_refused_before_its_pass_lets_the_others_drain_theirs(in_ranks, tmp_path: Path) -> None:
    """Rank 1 has metadata that contradict themselves: nobody waits for it, and every stream is read to its end."""

    def body(rank: int) -> tuple[list[str], str]:
        (tmp_path / str(rank)).mkdir()
        agent, passed = stream_agent(tmp_path / str(rank), None), []
        metadata = [StreamedTensor("w", torch.float32, (2,))] * (1 + rank)

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            value = torch.ones(2)
            dist.all_reduce(value)
            yield from counted(passed, ("w", value))

        with pytest.raises(PublishError) as caught:
            agent.publish_stream(1, gathered(), metadata=metadata)
        return passed, str(caught.value)

    for passed, said in in_ranks(2, body):
        assert passed == ["w"]
        assert "rank 1: StreamError: the metadata declares 'w' twice" in said


# ------------------------------------------------------------------------------------------------ beside a real daemon
@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A daemon that fails a version whose engine has not come within a second."""
    with daemon(tmp_path_factory.mktemp("impatient") / "d", join_seconds=1) as made:
        yield made


def beside(run: Run, monkeypatch: pytest.MonkeyPatch, table: NeededTable | None) -> StreamAgent:
    """Its settings come from the environment."""
    for name, value in run.environment().items():
        monkeypatch.setenv(name, value)
    return StreamAgent(table, connect_seconds=20.0, publish_seconds=120.0)


def test_a_step_that_failed_may_be_streamed_again(impatient: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with beside(impatient, monkeypatch, NeededTable([])) as agent:
        for _ in range(3):
            with pytest.raises(PublishError, match="nobody"):
                agent.publish_stream(9, weights().items())
    step = impatient.run_dir / "broadcasts" / "step_9"
    ends = time.monotonic() + 20
    while restaged(step / "FAILED") != 2 and time.monotonic() < ends:  # the daemon writes it beside its answer
        time.sleep(0.05)
    assert (restaged(step / "FAILED"), restaged(step / "STABLE")) == (2, 2)


def restaged(marker: Path) -> int:
    """What a marker says; -1 while it is not there."""
    manifest = decode_manifest(marker.read_bytes()) if marker.exists() else None
    return manifest.restaged if manifest is not None else -1


def needs(name: str, fingerprint: str) -> Needs:
    """``name`` in FP8 with one scale for each row, the norm in float16, and one tensor that does not pass."""
    tensors = (
        Tensor(name, "float8_e4m3fn", (24, 16)), Tensor(f"{name}_scale", "float32", (24,)),
        Tensor("model.norm.weight", "float16", (16,)), Tensor("elsewhere", "bfloat16", (2,)),
    )  # fmt: skip
    return Needs(tensors=tensors, quantized=(Quantized(0, 1, (1, 16), "float32"),), fingerprint=fingerprint * 64)


def test_what_engines_need_decides_what_travels_and_other_needs_make_other_slots(
    impatient: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    passing = {name: tensor for name, tensor in weights().items() if name != "lm_head.weight"}
    told: list[Needs] = []
    monkeypatch.setattr(StreamAgent, "_told", lambda _: told[-1])
    with beside(impatient, monkeypatch, None) as agent:
        for step, name in ((20, up), (21, up), (22, gate)):
            told.append(needs(name, "b" if name == up else "c"))
            before = agent.slots
            with pytest.raises(PublishError, match="nobody"):
                agent.publish_stream(step, passing.items())
            assert (agent.slots is before) == (step == 21)
            found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in agent.slots.layout.tensors}
            assert found.pop(name) == ("float8_e4m3fn", (24, 16))
            assert found.pop(f"{name}_scale") == ("float32", (24,))
            assert found.pop("model.norm.weight") == ("float16", (16,))
            assert {dtype for dtype, _ in found.values()} == {"float32"}, "what is not needed travels as it is"
            assert len(found) == len(passing) - 2
            assert agent._agent is not None
            announced = agent._agent.call(agent._agent.side.announcement)
            assert announced is not None
            assert announced.layout is agent.slots.layout


def test_needs_that_are_never_told_end_the_call_and_the_stream_is_read(
    impatient: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    with beside(impatient, monkeypatch, None) as agent:
        agent._publish_seconds = 0.5
        with pytest.raises(PublishError, match=r"did not say within 0\.5 s what the engines need"):
            agent.publish_stream(30, counted(passed, *weights().items()))
    assert passed == list(weights())
