"""A trainer rank's side of grants: which it refuses, what it says when it closes, whom it tells the fate."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from weightsync.agents.trainer import thread_side as bodies
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.thread_side import TrainerBody
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    FilesystemSettings,
    Grant,
    NixlSettings,
    Outcome,
    PeerTransfer,
    Staged,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version

MEMBER, TARGET = Member("trainer", "", 0), Member("inference", "e0", 0)
VERSION, ROUND = Version(7, 1), RoundName(3, 1)
GRANT = Grant(round=ROUND, version=VERSION, fingerprint="edges", members=(TARGET,), deadline_seconds=5.0)
SENT = PeerTransfer(TARGET, 100, 1, 0.1, (1, 2))


class Plan:
    """In the place of ``TransportPlan``: one peer, whose writes end as ``failure`` says."""

    fingerprint = "edges"

    def __init__(self, slots: Any) -> None:
        self.failure: Exception | None = None
        self.granted: list[Sequence[Member]] = []
        self.digests = 0

    def register(self, endpoint: Any) -> None:
        pass

    def digest(self) -> dict[Member, Digest]:
        self.digests += 1
        return {TARGET: (1, 2)}

    def bytes_per_peer(self) -> dict[Member, int]:
        return {TARGET: 100}

    async def push(
        self, members: Sequence[Member], seconds: float, digests: Mapping[Member, Digest]
    ) -> tuple[PeerTransfer, ...]:
        self.granted.append(members)
        if self.failure is not None:
            raise self.failure
        return (SENT,)


class Agent:
    """What the body says to the daemon, and which epoch counts."""

    epoch = 3

    def __init__(self) -> None:
        self.said: list[Any] = []

    def send(self, message: Any) -> bool:
        self.said.append(message)
        return True

    def spawn(self, work: Any) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(work)


class Endpoint:
    """A NIXL endpoint with writes in flight for as long as ``left`` says."""

    name = "endpoint"

    def __init__(self, *_: Any) -> None:
        self.left = 0
        self.closed = False

    @property
    def tainted_peers(self) -> frozenset[str]:
        self.left -= 1
        return frozenset({"e0/0"}) if self.left >= 0 else frozenset()

    def poll(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A body with its doubles beside it, welcomed over NIXL, holding VERSION."""
    monkeypatch.setattr(bodies, "TransportPlan", Plan)
    monkeypatch.setattr(bodies, "open_endpoint", Endpoint)
    slots: Any = SimpleNamespace(layout=Layout((), (), b""), arenas=[torch.zeros(8, dtype=torch.uint8)])
    body = TrainerBody(MEMBER, slots, tmp_path)
    agent = Agent()
    body.agent = agent  # type: ignore[assignment]
    body.welcomed(welcome(NixlSettings()))
    return SimpleNamespace(body=body, agent=agent, plan=body._plan, endpoint=body._endpoint, saved=[])


def welcome(transport: NixlSettings | FilesystemSettings) -> Welcome:
    return Welcome(
        epoch=3, journal_id="j", heartbeat_seconds=1.0, lost_after_heartbeats=3, transport=transport, rendezvous=None
    )


async def granted(rank: Any, grant: Grant = GRANT) -> Closed:
    """The CLOSED that follows a grant."""
    before = set(asyncio.all_tasks())
    rank.body.heard(grant)
    await asyncio.gather(*(asyncio.all_tasks() - before))
    closed = rank.agent.said[-1]
    assert isinstance(closed, Closed)
    return closed


async def test_a_grant_is_carried_out_and_closed(rank: Any) -> None:
    rank.body.staged(VERSION)
    assert await granted(rank) == Closed(round=ROUND, peers=(SENT,))
    assert rank.plan.granted == [(TARGET,)]
    assert rank.body.status().open_round is None


@pytest.mark.parametrize(
    ("grant", "reason"),
    [
        ({"round": RoundName(2, 1)}, "grant of epoch 2; this agent obeys epoch 3"),
        ({"fingerprint": "edges of another plan"}, "grant for the edges edges of ano; this rank has edges"),
        ({"version": Version(7, 2)}, "the slots hold step 1 (generation 7), not step 2 (generation 7)"),
    ],
)
async def test_a_grant_of_something_else_is_refused_and_nothing_written(
    rank: Any, grant: dict[str, Any], reason: str
) -> None:
    rank.body.staged(VERSION)
    closed = await granted(rank, replace(GRANT, **grant))
    assert closed.fault == "trainer"
    assert reason in closed.error
    assert rank.plan.granted == []


async def test_slots_in_the_making_are_written_by_nobody(rank: Any) -> None:
    rank.body.staged(VERSION)
    assert rank.body.claim()
    closed = await granted(rank)
    assert "the slots hold a version in the making" in closed.error
    assert rank.plan.granted == []


async def test_a_second_grant_waits_for_the_end_of_the_first(rank: Any) -> None:
    rank.body.staged(VERSION)
    rank.body._open = RoundName(3, 0)
    assert "round 3.0 is still being written" in (await granted(rank)).error
    assert not rank.body.claim(), "nor may the next version take the slots"


async def test_what_went_wrong_is_said(rank: Any) -> None:
    rank.body.staged(VERSION)
    rank.plan.failure = RuntimeError("e0/0: no route")
    closed = await granted(rank)
    assert (closed.error, closed.fault, closed.peers) == ("e0/0: no route", "network", ())


async def test_a_bug_closes_the_grant_too(rank: Any) -> None:
    """Else its targets were tainted until this process ends."""
    rank.body.staged(VERSION)
    rank.plan.failure = KeyError("e0/0")
    closed = await granted(rank)
    assert (closed.error, closed.fault) == ("KeyError('e0/0')", "trainer")
    assert rank.body.status().open_round is None


async def test_closed_is_said_when_nothing_is_in_flight_any_more(rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL cannot take a write back: after a failure the grant stays open until the last handle is DONE."""
    waits: list[RoundName | None] = []

    async def no_time_passes(seconds: float) -> None:
        waits.append(rank.body.status().open_round)

    monkeypatch.setattr(bodies.asyncio, "sleep", no_time_passes)
    rank.body.staged(VERSION)
    rank.plan.failure = RuntimeError("deadline")
    rank.endpoint.left = 3
    assert (await granted(rank)).error == "deadline"
    assert waits == [ROUND] * 3


def test_an_abort_does_not_close_what_may_still_be_written(rank: Any) -> None:
    rank.body.staged(VERSION)
    rank.body._open = ROUND
    rank.body.heard(Abort(round=ROUND, torn=True, reason="a rank was lost"))
    assert rank.body.status().open_round == ROUND


def test_staged_is_reported_with_its_cost(rank: Any) -> None:
    rank.body.timings = (0.5, 0.25)
    rank.body.staged(VERSION)
    assert rank.agent.said == [Staged(version=VERSION, bytes=8, convert_seconds=0.5, digest_seconds=0.25)]
    assert rank.body.status().staged == VERSION


def test_the_fate_of_the_version_ends_the_publish(rank: Any) -> None:
    committed = rank.body.staged(VERSION)
    rank.body.heard(Outcome(version=Version(7, 9), committed=True, sequence=1))
    assert not committed.done()
    rank.body.heard(Outcome(version=VERSION, committed=True, sequence=5))
    rank.body.heard(Outcome(version=VERSION, committed=True, sequence=6))
    assert committed.result(0) == 5
    failed = rank.body.staged(Version(7, 2))
    rank.body.heard(Outcome(version=Version(7, 2), committed=False, reason="no plan fits"))
    with pytest.raises(PublishError, match="no plan fits"):
        failed.result(0)


def test_a_closed_agent_leaves_nobody_waiting(rank: Any) -> None:
    waiting = rank.body.staged(VERSION)
    rank.body.shut()
    with pytest.raises(PublishError, match="closed before"):
        waiting.result(0)
    assert rank.endpoint.closed


async def test_a_version_is_digested_once_for_a_plan(rank: Any) -> None:
    """At STAGED; a grant finds it done, and a new plan does it again."""
    rank.body.prepare(VERSION)
    rank.body.staged(VERSION)
    await granted(rank)
    assert rank.plan.digests == 1
    rank.plan.fingerprint = "edges of another plan"
    await granted(rank, replace(GRANT, fingerprint="edges of another plan"))
    assert rank.plan.digests == 2


async def test_over_files_a_grant_writes_nothing_and_says_what_was_saved(
    rank: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(bodies, "save_checkpoint_part", lambda path, slots: saved.append(path))
    rank.body.welcomed(welcome(FilesystemSettings()))
    rank.body.prepare(VERSION)
    rank.body.staged(VERSION)
    closed = await granted(rank)
    assert closed.peers == (PeerTransfer(TARGET, 100, 0, 0.0, (1, 2)),)
    assert rank.plan.granted == []
    assert saved == [tmp_path / "broadcasts" / "step_1"]
