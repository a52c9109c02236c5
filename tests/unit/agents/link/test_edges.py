"""One plan's edges: what Ready says of them, and how often those that are not ready are tried again."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from weightsync.agents.errors import AgentError
from weightsync.agents.link import edges as link_edges
from weightsync.agents.link.edges import FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, PlanEdges
from weightsync.orchestrator.protocol.edges import EdgeFailure, Peer
from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS
from weightsync.orchestrator.protocol.messages import Connect, Fault, Ready
from weightsync.orchestrator.protocol.names import Member

MEMBER, FIRST, SECOND = Member("trainer", "", 0), Member("inference", "e0", 0), Member("inference", "e1", 0)
CONNECT = Connect(
    fingerprint="edges",
    root="root",
    peers=tuple(Peer(member, 1, f"{member}-1", b"", ()) for member in (SECOND, FIRST)),
    copies=b"",
    expected_bytes=0,
)


class Passing(AgentError):
    fault: Fault = "network"
    retry = True


class Hopeless(AgentError):
    fault: Fault = "daemon"


class Side:
    """Answers ``connect`` with one of ``answers`` after the other, and with the last one from then on."""

    here: Fault = "trainer"

    def __init__(self, *answers: Mapping[Member, Exception] | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        assert connect == CONNECT
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def edges(side: Any) -> PlanEdges:
    return PlanEdges(MEMBER, side, CONNECT)


def ready(*failed: tuple[Member, str]) -> Ready:
    return Ready(fingerprint="edges", failed=tuple(EdgeFailure(member, error) for member, error in failed))


class Time:
    """Passes at once while a plan's edges rest, and not at all after the last of ``waits``."""

    def __init__(self, waits: int) -> None:
        self.left = waits
        self.asked: list[float | None] = []
        self.over = asyncio.Event()

    async def happened(self, event: asyncio.Event, seconds: float | None) -> None:
        self.asked.append(seconds)
        self.left -= 1
        if self.left < 0 or seconds is None:
            self.over.set()
            await event.wait()


@asynccontextmanager
async def keeping(plan: PlanEdges, time: Time, monkeypatch: pytest.MonkeyPatch, said: list[Ready]) -> Any:
    monkeypatch.setattr(link_edges, "_happened", time.happened)
    task = asyncio.create_task(plan.keep(said.append))
    await time.over.wait()
    yield
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        ({}, []),
        ({SECOND: Passing("no route"), FIRST: ValueError("no such region")},
         [(FIRST, "ValueError('no such region')"), (SECOND, "no route")]),
        (Hopeless("a copy outside its row"), [(FIRST, "a copy outside its row"), (SECOND, "a copy outside its row")]),
        (RuntimeError("full"), [(FIRST, "RuntimeError('full')"), (SECOND, "RuntimeError('full')")]),
    ],
    ids=["all ready", "two peers", "a plan that does not fit", "our own side"],
)  # fmt: skip
async def test_every_edge_that_cannot_be_used_is_named_with_the_reason(
    answer: Mapping[Member, Exception] | Exception, failed: Sequence[tuple[Member, str]]
) -> None:
    assert await edges(Side(answer)).prepare() == ready(*failed)


async def test_a_rank_without_peers_names_itself() -> None:
    alone = PlanEdges(MEMBER, Nobody(), Connect(fingerprint="f", root="r", peers=(), copies=b"", expected_bytes=0))
    assert (await alone.prepare()).failed == (EdgeFailure(MEMBER, "no layout"),)


class Nobody(Side):
    def __init__(self) -> None:
        super().__init__(Hopeless("no layout"))

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        raise Hopeless("no layout")


async def test_a_reason_is_cut_to_what_a_message_holds() -> None:
    [failure] = (await edges(Side({FIRST: Passing("x" * 2 * MAX_REASON_CHARS)})).prepare()).failed
    assert len(failure.error) == MAX_REASON_CHARS


async def test_a_dead_edge_is_tried_again_for_as_long_as_the_plan_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever less often, and told only when something has changed."""
    side, said, time = Side({FIRST: Passing("no route")}), list[Ready](), Time(waits=20)
    plan = edges(side)
    await plan.prepare()
    async with keeping(plan, time, monkeypatch, said):
        assert side.asked == 21
        assert said == []
        assert time.asked[:3] == [FIRST_RETRY_SECONDS, 2 * FIRST_RETRY_SECONDS, 4 * FIRST_RETRY_SECONDS]
        assert time.asked[-1] == LONGEST_RETRY_SECONDS


async def test_what_changes_is_told_and_tried_soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    both, one = {FIRST: Passing("no route"), SECOND: Passing("no route")}, {SECOND: Passing("no route")}
    side, said, time = Side(both, both, both, one, one, {}), list[Ready](), Time(waits=20)
    plan = edges(side)
    await plan.prepare()
    async with keeping(plan, time, monkeypatch, said):
        assert said == [ready((SECOND, "no route")), ready()]
        first = FIRST_RETRY_SECONDS
        assert time.asked == [first, 2 * first, 4 * first, first, 2 * first, None], "and no more once all are ready"


async def test_what_no_retry_helps_waits_for_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    side, said, time = Side({FIRST: Hopeless("a card of another schema")}, {}), list[Ready](), Time(waits=20)
    plan = edges(side)
    await plan.prepare()
    async with keeping(plan, time, monkeypatch, said):
        assert (side.asked, time.asked) == (1, [None])
        time.over.clear()
        plan.changed()
        await time.over.wait()
        assert (side.asked, said) == (2, [ready()])


async def test_a_change_during_a_try_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Side):
        async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
            if self.asked == 0:
                plan.changed()
            return await super().connect(connect)

    side, said, time = Late({}, {FIRST: Passing("lost")}), list[Ready](), Time(waits=0)
    plan = edges(side)
    await plan.prepare()
    async with keeping(plan, time, monkeypatch, said):
        await asyncio.sleep(0)
        assert said == [ready((FIRST, "lost"))]


@pytest.mark.parametrize("seconds", [0.001, None])
async def test_the_rest_between_two_looks_ends_by_time_or_by_a_change(seconds: float | None) -> None:
    event = asyncio.Event()
    if seconds is None:
        asyncio.get_running_loop().call_soon(event.set)
    await link_edges._happened(event, seconds)
    assert event.is_set() is (seconds is None)


async def test_a_plan_that_ends_as_something_changes_ends() -> None:
    plan = edges(Side({}))
    await plan.prepare()
    task = asyncio.create_task(plan.keep(lambda ready: pytest.fail("nothing is said")))
    await asyncio.sleep(0)
    plan.changed()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
