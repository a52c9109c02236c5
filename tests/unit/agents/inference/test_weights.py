"""The weights of a rank: their digest, staging as one more region, and what rebalanced experts change."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from weightsync.agents.inference.calls import LiveModel
from weightsync.agents.inference.shadow import Superseded
from weightsync.agents.inference.weights import LiveWeights, NotLanded, landing_arenas
from weightsync.agents.memory import quarantine
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.memory.errors import FlipFailed, MemoryPlacementError
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.tables.runs import digest_table
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.registry import TRANSPORTS, Transport
from weightsync.kernels.digest import digest
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_COLUMNS,
    COPY_PEER,
    COPY_ROW,
    COPY_STAGED,
    Layout,
    LeftOut,
    Matrix,
    Quantized,
    Tensor,
    row,
)
from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings
from weightsync.orchestrator.protocol.names import Member, Version

CPU = torch.device("cpu")
MEMBER = Member("inference", "a", 1)


@dataclass
class Model:
    layout: Layout
    tensors: list[torch.Tensor]
    find: Callable[[str], LiveModel | None] = lambda known: None
    refreshed: int = 0
    replaced: bool = False

    def check(self) -> None:
        if self.replaced:
            raise RecordError("norm: it lies elsewhere")

    def refresh(self) -> None:
        self.refreshed += 1

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

    def reopen(self) -> None:
        self.story.append("reopened")

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


# ------------------------------------------------------------------------------------------------- beside live memory
class Beside(Recorder):
    """A transport by which a version lands in the landing memory."""

    lands_beside = True


def copies(*places: tuple[int, int, int]) -> Matrix:
    """First element, number of elements and place in the landing of each piece of the tensor."""
    table = np.zeros((len(places), COPY_COLUMNS), np.int64)
    for copy, (first, count, place) in zip(table, places, strict=True):
        copy[[COPY_PEER, COPY_ROW, COPY_STAGED]] = 0, 0, place
        shape = rows_of_box(first, count)
        copy[COPY_BOX : COPY_BOX + len(shape)] = shape
    return table


def rows_of_box(first: int, count: int) -> list[int]:
    """The box columns of one dimension, padded in front as rows are."""
    padded = row(0, 0, 0, (first,), (count,), (2,))
    box = np.asarray(padded)[3:].reshape(-1, 3)[:, :2]
    return [int(value) for value in box.reshape(-1)]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, LiveWeights, Any]:
    """Weights beside which NIXL would land a version, its halves in the other order."""
    monkeypatch.setitem(TRANSPORTS, NixlSettings, Transport(NixlSender, Beside))
    live = model("norm")
    weights = LiveWeights(live, CPU, landing_arenas(64, CPU), "copy", boundary=False, why="there is room")
    weights.open(MEMBER, NixlSettings())
    receiver: Any = weights.receivers.current
    receiver.landed = copies((0, 4, 16), (4, 4, 0))
    landing = receiver.memory.tensors[1]
    landing.zero_()
    landing[16:24] = torch.arange(100, 108, dtype=torch.uint8)
    landing[:8] = torch.arange(108, 116, dtype=torch.uint8)
    return live, weights, receiver


def test_the_layout_says_how_versions_land(beside: tuple[Model, LiveWeights, Any]) -> None:
    _, weights, receiver = beside
    assert (weights.layout.lands, weights.layout.boundary) == ("copy", False)
    assert weights.layout.lands_because == "there is room"
    assert receiver.memory.layout.lands == "copy", "by which NIXL knows what peers may reach"
    assert not weights.swaps


def test_what_has_landed_has_the_digest_that_live_memory_has_afterwards(
    beside: tuple[Model, LiveWeights, Any],
) -> None:
    live, weights, receiver = beside
    before = weights.digest()
    landed = weights.landed(Version(1, 2))
    assert landed != before
    assert weights.digest() == before, "nothing was changed"
    receiver.landed = copies((0, 4, 32), (4, 4, 40))  # another plan, by which nothing has landed yet
    weights.take(Version(1, 2))
    assert live.tensors[0].tolist() == list(range(100, 116))
    assert live.refreshed == 1
    assert weights.digest() == landed
    assert receiver.story == ["opened"]


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("lands", ["copy", "flip"])
def test_an_engine_that_reads_other_memory_is_found_before_it_stands_still(lands: str, beside: Any) -> None:
    live, weights = paged() if lands == "flip" else beside[:2]
    live.replaced = True
    with pytest.raises(RecordError, match="elsewhere"):
        weights.landed(Version(1, 2))
    assert live.refreshed == 0


@pytest.mark.usefixtures("recorder")
def test_a_paused_engine_that_reads_other_memory_is_not_verified() -> None:
    live = model("norm")
    weights = LiveWeights(live, CPU, ())
    weights.open(MEMBER, NixlSettings())
    target = weights.receivers.current.memory
    target.refresh()
    live.replaced = True
    with pytest.raises(RecordError, match="elsewhere"):
        target.refresh()
    assert live.refreshed == 1


def test_the_digest_of_what_has_landed_follows_the_plan(beside: tuple[Model, LiveWeights, Any]) -> None:
    _, weights, receiver = beside
    landed = weights.landed(Version(1, 2))
    receiver.landed = copies((0, 4, 0), (4, 4, 16))
    assert weights.landed(Version(1, 2)) != landed


def test_a_plan_by_which_less_than_everything_lands_is_no_version(beside: tuple[Model, LiveWeights, Any]) -> None:
    _, weights, receiver = beside
    receiver.landed = copies((0, 4, 16))
    with pytest.raises(NotLanded, match="8 bytes land by the present plan, and this rank has 16"):
        weights.landed(Version(1, 2))


def test_by_a_transport_that_cannot_land_beside_the_weights_are_live(
    beside: tuple[Model, LiveWeights, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights, _ = beside
    monkeypatch.setitem(TRANSPORTS, FilesystemSettings, Transport(NixlSender, Recorder))
    weights.open(MEMBER, FilesystemSettings("/runs/a"))
    assert weights.layout.lands == "live"
    assert weights.layout.lands_because.startswith("by this transport versions are read into the weights of a paused")
    weights.open(MEMBER, NixlSettings())
    assert (weights.layout.lands, weights.layout.lands_because) == ("copy", "there is room")


@dataclass
class Paged(Model):
    """Weights in two sets of pages: a flip exchanges what is in them."""

    standby_tensors: tuple[torch.Tensor, ...] = ()
    no_flip: str = ""
    settled: int = 0

    def flip(self) -> None:
        for one, other in zip(self.tensors, self.standby_tensors, strict=True):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    def settle(self) -> None:
        self.settled += 1


@pytest.mark.usefixtures("recorder")
def test_pages_are_written_and_digested_in_standby_and_flipped() -> None:
    plain = model("norm")
    other = host_arena(16)
    other.copy_(torch.arange(100, 116, dtype=torch.uint8))
    live = Paged(plain.layout, plain.tensors, standby_tensors=(other,))
    weights = LiveWeights(live, CPU, landing_arenas(64, CPU), "flip")
    weights.open(MEMBER, NixlSettings())
    receiver: Any = weights.receivers.current
    assert receiver.memory.tensors[0] is other, "bytes are brought to standby"
    before, landed = weights.digest(), weights.landed(Version(1, 2))
    assert before != landed
    weights.take(Version(1, 2))
    assert live.settled == 0, "the engine stands still for what it is to serve alone"
    weights.settle()
    assert live.settled == 1
    assert (weights.digest(), weights.landed(Version(1, 1))) == (landed, before)
    assert weights.swaps
    assert weights.audit() == landed
    assert live.refreshed == 1, "what is derived is made of live memory alone"
    receiver.memory.refresh()
    assert live.refreshed == 1
    assert receiver.story == ["opened", Version(1, 2), Version(1, 1)]


def paged(expert_map: str = "", find: Callable[[str], LiveModel | None] = lambda known: None) -> Any:
    """Two sets of pages, half of whose bytes are padding that no round writes."""
    plain = model("norm", expert_map, find)
    rows = np.array([row(0, 0, 2, (0,), (4,), (4,))], dtype="<i8")
    other = host_arena(16)
    other.copy_(torch.arange(100, 116, dtype=torch.uint8))
    layout = structs.replace(plain.layout, tensors=(Tensor("norm", "bfloat16", (4,)),), rows=rows.tobytes())
    live = Paged(layout, plain.tensors, find, standby_tensors=(other,))
    weights = LiveWeights(live, CPU, landing_arenas(64, CPU), "flip")
    weights.open(MEMBER, NixlSettings())
    return live, weights


@pytest.mark.usefixtures("recorder")
def test_samples_tell_which_of_two_sets_is_served_and_leave_padding_to_the_engine() -> None:
    live, weights = paged()
    weights.landed(Version(1, 2))
    live.tensors[0][0], live.standby_tensors[0][1] = 99, 99  # carried, or the engine's own
    weights.take(Version(1, 2))
    assert weights.shown()
    weights.take(Version(1, 1))
    assert weights.shown(), "what was served before, which nothing has landed on"
    live.flip()
    assert not weights.shown()
    live.flip()
    assert weights.shown()
    live.tensors[0][2] ^= 1
    assert not weights.shown()


@pytest.mark.usefixtures("recorder")
def test_pages_that_are_exchanged_end_an_audit_and_a_flip_that_failed_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live, weights = paged()
    weights.landed(Version(1, 2))
    prepared, launched = weights._digest, []

    class InParts:
        parts = 3

        def launch(self, part: int) -> None:
            launched.append(part)

        def wait(self) -> None:
            between()

        def result(self) -> tuple[int, int]:
            return prepared()

    def failing() -> None:
        raise FlipFailed("no")

    def in_vain() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(live, "flip", failing)
            with pytest.raises(FlipFailed):
                weights.take(Version(1, 2))

    monkeypatch.setattr(weights, "_digest", InParts())
    between: Callable[[], None] = in_vain
    assert weights.audit() == prepared()
    assert launched == [0, 1, 2]
    between = lambda: weights.take(Version(1, 2))  # noqa: E731
    with pytest.raises(Superseded, match="served no more"):
        weights.audit()
    assert launched == [0, 1, 2, 0]


@pytest.mark.usefixtures("recorder")
def test_experts_that_moved_since_a_flip_are_no_fault_of_its_pages() -> None:
    moved: list[LiveModel] = []
    live, weights = paged("0,1", lambda known: moved[0] if moved else None)
    weights.landed(Version(1, 2))
    weights.take(Version(1, 2))
    weights.audit()
    moved.append(live)
    with pytest.raises(Superseded, match="experts"):
        weights.audit()


@pytest.mark.usefixtures("recorder")
def test_a_digest_that_was_taken_on_the_way_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights = paged()
    receiver, whole = weights.receivers.current, weights.landed(Version(1, 2))
    monkeypatch.setattr(receiver, "digest", lambda: (5, 55))
    monkeypatch.setattr(weights, "_standby_digest", None)
    assert weights.landed(Version(1, 2)) == (5, 55) != whole
    assert weights._standby_digest is None
    weights.take(Version(1, 2))
    assert weights.shown()


def test_other_memory_takes_the_place_of_the_landing(beside: tuple[Model, LiveWeights, Any]) -> None:
    """And of nothing else: live memory and what is digested of it stay."""
    _, weights, receiver = beside
    before, spares, served = weights.layout, weights.spares, weights.digest()
    kept, old = weights.tensors[0], weights.tensors[-1]
    old.fill_(7)
    weights.replace_landing()
    landing = weights.tensors[-1]
    assert (weights.tensors[0] is kept, weights.digest()) == (True, served)
    assert (landing.numel(), bool(landing.any()), bool(old.any())) == (old.numel(), False, False)
    assert landing.data_ptr() != old.data_ptr()
    assert weights.layout == structs.replace(before, regions=(before.regions[0], region_of(landing)))
    assert weights.spares == spares - 1
    assert receiver.story[-2:] == ["renewed", "reopened"], "an endpoint is made for the new memory"
    assert receiver.memory.layout == weights.layout


def test_a_landing_that_was_replaced_is_quarantined_although_the_transport_fails(
    beside: tuple[Model, LiveWeights, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights, receiver = beside
    old, spares = weights.tensors[-1], weights.spares

    def fail() -> None:
        raise NotLanded("the endpoint cannot be destroyed")

    monkeypatch.setattr(receiver, "reopen", fail, raising=False)
    with pytest.raises(NotLanded, match="cannot be destroyed"):
        weights.replace_landing()
    assert any(kept is old for kept in quarantine._kept)
    assert weights.spares == spares - 1


def test_live_memory_has_no_spare() -> None:
    weights = LiveWeights(model("norm"), CPU, landing_arenas(64, CPU))
    assert weights.spares == 0
    with pytest.raises(MemoryPlacementError, match=r"no other memory can take the place of the landing \(live, cpu\)"):
        weights.replace_landing()
