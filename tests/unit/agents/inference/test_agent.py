"""Experts that were rebalanced between rounds: the plan no longer fits, so the layout is announced anew."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.inference.agent import AgentStuck, InferenceAgent
from weightsync.agents.inference.calls import InfoError, InitInfo, LiveModel, SwitchInfo, UpdateInfo
from weightsync.agents.inference.landing import LANDING_VARIABLE
from weightsync.agents.inference.window import UpdateFailed
from weightsync.agents.link.thread import AgentThread
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.kernels.digest import tensor_key
from weightsync.orchestrator.protocol.layout import Layout, Tensor, row
from weightsync.orchestrator.protocol.messages import EngineStatus, Fault, Holding, Left, Quiesced, Verify
from weightsync.orchestrator.protocol.names import RoundName, Version

UPDATE = UpdateInfo(token="1.1", round_epoch=1, round_number=1, generation=1, step=1, deadline_seconds=5.0)


@dataclass(frozen=True)
class Ranks:
    """An engine that tells its workers everything; nothing of vLLM."""

    rank: int = 0
    world: int = 1

    def with_world(self, world: int) -> "Ranks":
        return self


class Thread:
    """In place of the agent's thread: what is posted to it is kept."""

    ended = ""
    epoch = 1
    lease: tuple[float, float] | None = None

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.said: list[Any] = []
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def say_once(self, word: Any) -> None:
        self.said.append(word)

    def post(self, work: Any) -> None:
        self.posted.append(work)

    def announce(self) -> None:
        """Never called here; only named."""


@dataclass(frozen=True)
class Model:
    """Live weights that only have a layout; ``find`` answers ``rebalanced``."""

    layout: Layout
    tensors: list[torch.Tensor]
    checks: list[bool] = field(default_factory=list, kw_only=True)
    find: Callable[[str], LiveModel | None] = lambda known: None

    def check(self) -> None:
        self.checks.append(True)

    def refresh(self) -> None: ...

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def rebalanced(self, known: str) -> LiveModel | None:
        return self.find(known)


def model(memory: torch.Tensor, expert: int, find: Callable[[str], LiveModel | None] = lambda known: None) -> Model:
    """One expert's weight of 16 bytes in the first slot."""
    rows = np.array([row(0, 0, 0, (0,), (8,), (2,))], dtype="<i8")
    tensor = Tensor(f"experts.{expert}.weight", "bfloat16", (8,))
    layout = Layout((tensor,), (region_of(memory),), rows.tobytes(), expert_map=f"map of {expert}")
    return Model(layout, [memory], find)


@pytest.fixture(autouse=True)
def _no_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LANDING_VARIABLE, "0")


def test_a_round_is_refused_before_the_worker_stands_still() -> None:
    memory, thread = host_arena(16), Thread()
    memory.copy_(torch.arange(16, dtype=torch.uint8))
    moved = {"map of 3": model(memory, 5)}
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(memory, 3, moved.get))
    before = agent._weights.digest()
    agent._agent = thread  # type: ignore[assignment]
    agent._holdings.keep(Version(1, 1), before)
    with pytest.raises(UpdateFailed, match="rebalanced"):
        agent.update(UPDATE)
    assert thread.posted == [thread.announce]
    assert agent.status.standby is None, "what waits there was laid out for other experts"
    assert agent.status.window is None
    assert not agent.status.torn
    assert agent._weights.layout.tensors[0].name == "experts.5.weight"
    assert agent._weights.digest() != before, "the same bytes count for another expert now"
    assert tensor_key("experts.3.weight") != tensor_key("experts.5.weight")


def test_an_engine_without_expert_maps_is_never_asked() -> None:
    def asked(known: str) -> LiveModel | None:
        raise AssertionError("a walk over all modules in every pause, for nothing")

    memory = host_arena(16)
    mapped = model(memory, 3).layout
    plain = Model(Layout(mapped.tensors, mapped.regions, mapped.rows), [memory], asked)
    agent = InferenceAgent(Ranks(), torch.device("cpu"), plain)
    assert not agent._weights.follow_experts()


class Lost(AgentError):
    fault: Fault = "trainer"


@pytest.mark.parametrize(
    ("error", "fault", "retry"),
    [(Lost("part 2"), "trainer", False), (torch.cuda.OutOfMemoryError("3 GiB"), "engine", True)],
)
def test_a_rank_that_cannot_verify_says_whose_fault_it_is(error: Exception, fault: str, retry: bool) -> None:
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3))

    def arrive(version: Version) -> None:
        raise error

    agent._weights.arrive = arrive  # type: ignore[method-assign]
    verified = agent._verify(Verify(round=RoundName(1, 1), version=Version(1, 1), deadline_seconds=1.0))
    assert (verified.error, verified.fault, verified.retry) == (repr(error), fault, retry)


def test_a_worker_that_nobody_introduced_refuses() -> None:
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3))
    with pytest.raises(UpdateFailed, match="no daemon has been introduced"):
        agent.update(UPDATE)
    assert not agent.may_run


@pytest.mark.parametrize("epoch", [0, 2, 9])
def test_a_round_of_a_daemon_that_is_not_obeyed_is_refused_before_anything_stands_still(epoch: int) -> None:
    """Its call may come late, or from a second daemon; nobody here would ever hear how it ends."""
    drained: list[float] = []
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3), drained.append)
    agent._agent = thread = Thread()  # type: ignore[assignment]
    with pytest.raises(UpdateFailed, match=f"epoch is {epoch}, and this worker obeys a daemon of epoch 1"):
        agent.update(msgspec.structs.replace(UPDATE, round_epoch=epoch))
    assert thread.posted == drained == []
    assert not agent.status.torn


@pytest.mark.parametrize("exposes", [True, False])
def test_the_words_of_a_round_are_said_until_the_next(exposes: bool) -> None:
    agent, thread = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3)), Thread()
    agent._agent = thread  # type: ignore[assignment]
    with pytest.raises(UpdateFailed, match="nothing was decided"):
        agent.update(msgspec.structs.replace(UPDATE, exposes=exposes, deadline_seconds=0.01))
    for post in thread.posted:
        post()
    name = RoundName(1, 1)
    assert thread.said == [Quiesced(round=name), Left(round=name, status=EngineStatus(torn=not exposes))]


def test_a_daemon_that_is_gone_for_longer_than_its_lease_ends_a_round_in_which_nobody_was_granted() -> None:
    agent, thread = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3)), Thread()
    assert (agent.lease, agent.incarnation) == (None, 0)
    agent._agent = thread  # type: ignore[assignment]
    thread.lease = (20.0, 20.5)
    assert agent.lease == (20.0, 20.5)
    with pytest.raises(UpdateFailed, match="gone for longer than its lease"):
        agent.update(msgspec.structs.replace(UPDATE, exposes=True, deadline_seconds=60.0))
    assert not agent.status.torn


def test_a_round_ends_with_the_agents_thread(introduced: tuple[InferenceAgent, InitInfo]) -> None:
    """A worker that is told to end while it stands still does not stand there until the round's deadline."""
    agent, _ = introduced
    failures: list[BaseException] = []

    def update() -> None:
        try:
            agent.update(msgspec.structs.replace(UPDATE, round_epoch=0, deadline_seconds=600.0))
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=update, daemon=True)
    worker.start()
    while agent.status.window is None:
        time.sleep(0.01)
    agent.close()
    worker.join(30.0)
    [failure] = failures
    assert isinstance(failure, UpdateFailed)
    assert "the agent of this worker was closed" in str(failure)
    assert agent.status == EngineStatus(torn=True), "a round that does not tell may have been granted"


def test_a_hold_has_a_reason() -> None:
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3))
    assert agent.held_because == ""
    agent._holdings.hold(True, "to look at it")
    assert agent.held_because == "to look at it"
    agent._holdings.hold(True, "")
    assert agent.held_because == "the daemon said so"


def test_holders_of_copies_are_drained_before_the_experts_are_looked_at() -> None:
    story: list[object] = []

    def find(known: str) -> LiveModel | None:
        story.append("looked")
        return None

    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3, find), story.append)
    agent._agent = Thread()  # type: ignore[assignment]
    with pytest.raises(UpdateFailed, match="nothing was decided"):
        agent.update(msgspec.structs.replace(UPDATE, deadline_seconds=0.001))
    assert story == [0.001, "looked"]


def test_who_does_not_let_go_of_copies_keeps_the_worker_from_standing_still() -> None:
    def drain(seconds: float) -> None:
        raise Lost("copies in flight")

    thread = Thread()
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3), drain)
    agent._agent = thread  # type: ignore[assignment]
    with pytest.raises(Lost, match="copies in flight"):
        agent.update(UPDATE)
    assert thread.posted == []
    assert not agent.status.torn


@pytest.fixture
def serving() -> tuple[InferenceAgent, torch.Tensor, Thread]:
    """An agent on whose memory a version was committed."""
    memory, thread = host_arena(16), Thread()
    memory.copy_(torch.arange(16, dtype=torch.uint8))
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(memory, 3))
    agent._agent = thread  # type: ignore[assignment]
    agent._holdings.committed(Version(1, 1))
    return agent, memory, thread


def test_a_call_that_leaves_the_weights_alone_is_told_to_nobody(
    serving: tuple[InferenceAgent, torch.Tensor, Thread],
) -> None:
    agent, memory, thread = serving
    assert agent.around(lambda: int(memory[3])) == 3
    assert agent.may_run
    assert thread.posted == []


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_call_that_changed_them_nothing_runs_and_the_daemon_is_told(
    serving: tuple[InferenceAgent, torch.Tensor, Thread], fails: bool
) -> None:
    agent, memory, thread = serving

    def change() -> str:
        memory[15] ^= 1
        if fails:
            raise RuntimeError("and then it failed")
        return "done"

    if fails:
        with pytest.raises(RuntimeError, match="and then it failed"):
            agent.around(change)
    else:
        assert agent.around(change) == "done"
    assert agent.status.torn
    assert not agent.may_run
    agent._holdings.hold(True, "meanwhile")
    (word,) = thread.posted
    word()
    assert thread.sent == [Holding(status=agent.status)]


def test_nothing_is_compared_where_nothing_may_run(serving: tuple[InferenceAgent, torch.Tensor, Thread]) -> None:
    agent, memory, thread = serving
    agent._holdings.tear(True)
    agent.around(memory.zero_)
    assert thread.posted == []


@pytest.fixture
def introduced(tmp_path: Path) -> Iterator[tuple[InferenceAgent, InitInfo]]:
    """An agent whose thread runs and finds nobody at the hub's address."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    info = InitInfo(hub_url="ws://127.0.0.1:1/agents", token_file=str(token), run_id="run", engine="engine-0", world=1)
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3))
    agent.begin(info)
    yield agent, info
    agent.close()


def thread_of(agent: InferenceAgent) -> AgentThread[Any]:
    assert agent._agent is not None
    assert agent._agent.alive
    return agent._agent


def test_the_same_introduction_again_does_nothing(introduced: tuple[InferenceAgent, InitInfo]) -> None:
    agent, info = introduced
    thread = thread_of(agent)
    agent.begin(info)
    assert thread_of(agent) is thread


def test_an_agent_that_was_closed_comes_back_as_itself(introduced: tuple[InferenceAgent, InitInfo]) -> None:
    agent, info = introduced
    first = thread_of(agent)
    first.obedience.epoch = 7  # as after a Welcome
    agent.close()
    assert not first.alive
    with pytest.raises(UpdateFailed, match="was closed"):
        agent.update(UPDATE)
    agent.begin(info)
    second = thread_of(agent)
    assert second is not first
    assert second.obedience is first.obedience
    assert second.epoch == 7


def test_a_daemon_may_move(introduced: tuple[InferenceAgent, InitInfo]) -> None:
    agent, info = introduced
    first = thread_of(agent)
    first.obedience.epoch = 7
    agent.begin(msgspec.structs.replace(info, hub_url="ws://127.0.0.1:2/agents"))
    assert not first.alive
    assert thread_of(agent).obedience is first.obedience
    assert thread_of(agent).epoch == 7


def test_but_not_while_the_one_before_is_connected(
    introduced: tuple[InferenceAgent, InitInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, info = introduced
    thread = thread_of(agent)
    assert agent.incarnation == thread.obedience.incarnation > 0
    monkeypatch.setattr(AgentThread, "connected", True)
    moved = msgspec.structs.replace(info, hub_url="ws://127.0.0.1:2/agents")
    with pytest.raises(InfoError, match=r"init_info\.hub_url: .*:1/agents'.*:2/agents'.*end one of the two"):
        agent.begin(moved)
    assert thread_of(agent) is thread


@pytest.mark.parametrize("other", [{"run_id": "another"}, {"engine": "engine-1"}, {"world": 2}])
def test_who_has_obeyed_is_not_given_to_another_run(
    introduced: tuple[InferenceAgent, InitInfo], other: dict[str, Any]
) -> None:
    agent, info = introduced
    (field,) = other
    thread = thread_of(agent)
    thread.obedience.epoch = 7
    with pytest.raises(InfoError, match=rf"init_info\.{field}: .* restart the engine"):
        agent.begin(msgspec.structs.replace(info, **other))
    assert thread_of(agent) is thread


def test_who_has_obeyed_nobody_is_free(introduced: tuple[InferenceAgent, InitInfo]) -> None:
    agent, info = introduced
    agent.begin(msgspec.structs.replace(info, run_id="another"))
    assert thread_of(agent).identity.run_id == "another"


def test_no_second_thread_beside_one_that_does_not_end(
    introduced: tuple[InferenceAgent, InitInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, info = introduced
    thread = thread_of(agent)
    with monkeypatch.context() as patch:
        patch.setattr(thread, "close", lambda reason: None)
        with pytest.raises(AgentStuck, match="has not ended"):
            agent.begin(msgspec.structs.replace(info, hub_url="ws://127.0.0.1:2/agents"))
    assert thread_of(agent) is thread


# -------------------------------------------------------------------------------------------------------------- switch
ORDER = SwitchInfo(
    round=RoundName(1, 2), version=Version(1, 2), incarnations={0: 9}, cache="keep", deadline_seconds=5.0
)


def test_a_switch_needs_a_daemon_that_is_obeyed() -> None:
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3))
    assert agent.ready(ORDER) == agent.switchable(ORDER) == "no daemon has been introduced to this worker yet"
    with pytest.raises(UpdateFailed, match="no daemon has been introduced"):
        agent.switch(ORDER)
    agent._agent = thread = Thread()  # type: ignore[assignment]
    late = msgspec.structs.replace(ORDER, round=RoundName(7, 2))
    refusal = "the round's epoch is 7, and this worker obeys a daemon of epoch 1"
    assert agent.ready(late) == agent.switchable(late) == refusal
    with pytest.raises(UpdateFailed, match=refusal):
        agent.switch(late)
    thread.ended = "the agent of this worker has ended: its token is refused"
    assert agent.switchable(ORDER) == thread.ended


def standing_by(agent: InferenceAgent) -> None:
    """As after the digest of what has landed."""
    agent._holdings.committed(Version(1, 1))
    agent._holdings.keep(ORDER.version, agent._weights.digest())


@pytest.mark.parametrize("moving", [False, True])
def test_a_switch_is_told_when_live_memory_was_audited(moving: bool) -> None:
    of_experts = model(host_arena(16), 3)
    held = (
        of_experts if moving else Model(msgspec.structs.replace(of_experts.layout, expert_map=""), of_experts.tensors)
    )
    agent, thread = InferenceAgent(Ranks(), torch.device("cpu"), held), Thread()
    agent._agent = thread  # type: ignore[assignment]
    for asked in (agent.ready, agent.switchable):
        assert asked(ORDER) == "what waits in standby is nothing, not step 2 (generation 1)"
    standing_by(agent)
    assert not held.checks
    assert agent.ready(ORDER) == ""
    assert len(held.checks) == 1, "whether what is switched to is what the engine reads"
    taken: list[Version] = []
    agent._weights.take = taken.append  # type: ignore[method-assign]
    audits: list[Callable[[], None]] = []
    agent._shadow._beside = audits.append
    assert agent.switchable(ORDER) == ""
    agent.switch(ORDER)
    assert taken == [ORDER.version]
    assert bool(thread.posted) == moving, "before a batch could move experts, or beside it"
    for audit in audits:
        audit()
    for post in thread.posted:
        post()
    (left,) = thread.said
    assert (left.round, left.status) == (ORDER.round, EngineStatus(applied=ORDER.version))
    assert left.switch_seconds > 0.0
    assert left.audit_seconds > 0.0
    assert agent.switchable(ORDER) == "", "it has taken place"
    assert agent.ready(ORDER) == ""
    assert len(held.checks) == 1


def test_experts_that_moved_since_the_plan_end_what_has_landed_before_anything_changes() -> None:
    memory, thread = host_arena(16), Thread()
    moved = {"map of 3": model(memory, 5)}
    drained: list[float] = []
    agent = InferenceAgent(Ranks(), torch.device("cpu"), model(memory, 3, moved.get), drained.append)
    agent._agent = thread  # type: ignore[assignment]
    standing_by(agent)
    assert agent.switchable(ORDER) == "experts were rebalanced since the plan was made; the layout is announced anew"
    assert (drained, thread.posted) == ([5.0], [thread.announce])
    assert agent.status == EngineStatus(applied=Version(1, 1))
    with pytest.raises(UpdateFailed, match="nothing"):
        agent.switch(ORDER)


def test_what_the_agents_thread_has_changed_meanwhile_is_not_told_away() -> None:
    """The daemon holds the engine while the main thread leaves a round: it must not hear of the state before last."""
    agent, thread = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3)), Thread()
    agent._agent = thread  # type: ignore[assignment]
    agent._holdings.committed(Version(1, 1))
    agent._tell(Left(round=ORDER.round, status=agent.status))
    held = agent._holdings.hold(True, "maintenance")
    for post in thread.posted:
        post()
    assert thread.said == [Left(round=ORDER.round, status=held)]


def test_a_word_that_no_loop_takes_is_kept_for_the_next() -> None:
    agent, thread = InferenceAgent(Ranks(), torch.device("cpu"), model(host_arena(16), 3)), Thread()
    kept: list[Any] = []

    def ended(work: Any) -> None:
        raise RuntimeError("Event loop is closed")

    thread.post = ended  # type: ignore[method-assign]
    thread.obedience = SimpleNamespace(keep=kept.append)  # type: ignore[attr-defined]
    agent._agent = thread  # type: ignore[assignment]
    word = Left(round=RoundName(1, 1), status=EngineStatus())
    agent._tell(word)
    assert kept == [word]
