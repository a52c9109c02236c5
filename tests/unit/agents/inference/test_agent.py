"""Experts that were rebalanced between rounds: the plan no longer fits, so the layout is announced anew."""

from typing import Any

import numpy as np
import pytest
import torch
from weightsync.agents.inference.agent import STAGING_VARIABLE, InferenceAgent
from weightsync.agents.inference.window import UpdateFailed
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.vllm.adapter.common import UpdateInfo
from weightsync.agents.vllm.ranks import EngineRanks
from weightsync.agents.vllm.recorder.recorded import Recorded
from weightsync.kernels.digest import tensor_key
from weightsync.orchestrator.protocol.layout import Layout, Tensor, row

UPDATE = UpdateInfo(token="1.1", round_epoch=1, round_number=1, generation=1, step=1, deadline_seconds=5.0)


class Thread:
    """In place of the agent's thread: what is posted to it is kept."""

    failure = None

    def __init__(self) -> None:
        self.posted: list[Any] = []

    def post(self, work: Any) -> None:
        self.posted.append(work)

    def announce(self) -> None:
        """Never called here; only named."""


def recorded(memory: torch.Tensor, expert: int) -> Recorded:
    """One expert's weight of 16 bytes in the first slot."""
    rows = np.array([row(0, 0, 0, (0,), (8,), (2,))], dtype="<i8")
    tensor = Tensor(f"experts.{expert}.weight", "bfloat16", (8,))
    layout = Layout((tensor,), (region_of(memory),), rows.tobytes(), expert_map=f"map of {expert}")
    return Recorded(layout, [memory], lambda: None, lambda tensors: None, (), (), ())


def test_a_round_is_refused_before_the_worker_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STAGING_VARIABLE, "0")
    memory, thread = host_arena(16), Thread()
    memory.copy_(torch.arange(16, dtype=torch.uint8))
    moved = {"map of 3": recorded(memory, 5)}
    agent = InferenceAgent(EngineRanks(0, 1), torch.device("cpu"), recorded(memory, 3), moved.get)
    before = agent._digest()
    agent._agent = thread  # type: ignore[assignment]
    with pytest.raises(UpdateFailed, match="rebalanced"):
        agent.update(UPDATE)
    assert thread.posted == [thread.announce]
    assert agent.status.window is None
    assert not agent.status.torn
    assert agent._layout.tensors[0].name == "experts.5.weight"
    assert agent._digest() != before, "the same bytes count for another expert now"
    assert tensor_key("experts.3.weight") != tensor_key("experts.5.weight")


def test_an_engine_without_expert_maps_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STAGING_VARIABLE, "0")
    memory = host_arena(16)
    plain = recorded(memory, 3)
    plain = Recorded(
        Layout(plain.layout.tensors, plain.layout.regions, plain.layout.rows), [memory], plain.refresh, plain.load,
        (), (), (),
    )  # fmt: skip

    def asked(known: str) -> Recorded | None:
        raise AssertionError("a walk over all modules in every pause, for nothing")

    agent = InferenceAgent(EngineRanks(0, 1), torch.device("cpu"), plain, asked)
    agent._refuse_moved_experts(Thread())  # type: ignore[arg-type]
