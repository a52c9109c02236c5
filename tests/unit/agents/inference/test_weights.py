"""The weights of a rank: their digest, staging as one more region, and what rebalanced experts change."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from weightsync.agents.inference.calls import LiveModel
from weightsync.agents.inference.weights import LiveWeights, landing_arenas
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.tables.runs import digest_table
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.registry import TRANSPORTS, Transport
from weightsync.kernels.digest import digest
from weightsync.orchestrator.protocol.layout import Layout, LeftOut, Quantized, Tensor, row
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member, Version

CPU = torch.device("cpu")
MEMBER = Member("inference", "a", 1)


@dataclass
class Model:
    layout: Layout
    tensors: list[torch.Tensor]
    find: Callable[[str], LiveModel | None] = lambda known: None

    def refresh(self) -> None: ...

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def rebalanced(self, known: str) -> LiveModel | None:
        return self.find(known)


def model(name: str, expert_map: str = "", find: Callable[[str], LiveModel | None] = lambda known: None) -> Model:
    """Eight bfloat16 of the tensor ``name``."""
    memory = host_arena(16)
    memory.copy_(torch.arange(16, dtype=torch.uint8))
    rows = np.array([row(0, 0, 0, (0,), (8,), (2,))], dtype="<i8")
    tensor = Tensor(name, "bfloat16", (8,))
    return Model(Layout((tensor,), (region_of(memory),), rows.tobytes(), expert_map=expert_map), [memory], find)


class Recorder(Receiver):
    """Writes down what it is asked."""

    def __init__(self, memory: TargetMemory) -> None:
        self.memory = memory
        self.story: list[Any] = []

    def open(self, settings: Any) -> None:
        self.story.append("opened")

    def renew(self, memory: TargetMemory) -> None:
        self.memory = memory
        self.story.append("renewed")

    def arrive(self, version: Version) -> None:
        self.story.append(version)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSPORTS, NixlSettings, Transport(NixlSender, Recorder))


def test_the_digest_is_of_the_live_memory_and_not_of_the_staging() -> None:
    live = model("norm")
    weights = LiveWeights(live, CPU, landing_arenas(4096, CPU))
    assert weights.digest() == digest(live.tensors, digest_table(live.layout.matrix(), live.layout))
    assert weights.bytes == 16
    live.tensors[0][3] += 1
    assert weights.digest() == digest(live.tensors, digest_table(live.layout.matrix(), live.layout))


@pytest.mark.parametrize(("size", "regions", "staging"), [(0, 1, -1), (4096, 2, 1)])
def test_staging_is_the_last_region(size: int, regions: int, staging: int) -> None:
    weights = LiveWeights(model("norm"), CPU, landing_arenas(size, CPU))
    assert (len(weights.layout.regions), weights.layout.staging) == (regions, staging)
    if size:
        assert weights.layout.regions[1].length == size


def test_all_else_that_the_layout_says_stays_beside_the_staging() -> None:
    live = model("norm")
    live.layout = structs.replace(
        live.layout,
        quantized=(Quantized(0, 0, (1, 8)),),
        quantization="fp8",
        left_out=(LeftOut("unwritten", "a buffer", ("cache",), 1),),
    )
    told = LiveWeights(live, CPU, landing_arenas(4096, CPU)).layout
    assert structs.replace(told, regions=told.regions[:1], staging=-1) == live.layout


@pytest.mark.usefixtures("recorder")
def test_the_receiver_is_given_the_memory_under_the_members_name() -> None:
    live = model("norm")
    weights = LiveWeights(live, CPU, landing_arenas(4096, CPU))
    weights.open(MEMBER, NixlSettings())
    receiver: Any = weights.receivers.current
    assert (receiver.memory.name, receiver.memory.layout) == ("a/1", weights.layout)
    assert receiver.memory.tensors[0] is live.tensors[0]
    assert receiver.memory.tensors[1].numel() == 4096
    weights.arrive(Version(1, 2))
    assert receiver.story == ["opened", Version(1, 2)]


@pytest.mark.usefixtures("recorder")
def test_receivers_learn_that_experts_have_moved() -> None:
    fresh = model("experts.5.weight", "map of 5")
    weights = LiveWeights(model("experts.3.weight", "map of 3", {"map of 3": fresh}.get), CPU, ())
    weights.open(MEMBER, NixlSettings())
    before = weights.digest()
    assert weights.follow_experts()
    receiver: Any = weights.receivers.current
    assert receiver.story == ["opened", "renewed"]
    assert receiver.memory.layout == weights.layout == fresh.layout
    assert receiver.memory.name == "a/1"
    assert weights.digest() != before
    assert not weights.follow_experts(), "they have not moved again"
