"""Commands are performed in their order, each record durable before any later command; what fails ends the daemon."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from weightsync.orchestrator.core.commands import (
    Accept,
    Append,
    CallEngine,
    Command,
    Drop,
    LookForStable,
    MakeNeeds,
    MakePlan,
    OpenGroup,
    Refuse,
    Say,
    Send,
    SendPlan,
    WriteMarker,
)
from weightsync.orchestrator.core.events import Appended, Call, Event, NeedsReady, PlanFacts, PlanReady, PlanRejected
from weightsync.orchestrator.core.records import Committed, LiveDirty, RoundBegan, RoundEnded
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.outbox import STUCK_SECONDS, Outbox
from weightsync.orchestrator.planner import PlanError
from weightsync.orchestrator.planner.needs import NeedsFound
from weightsync.orchestrator.protocol.messages import (
    Connect,
    Heartbeat,
    Needs,
    NixlSettings,
    Refused,
    TcpStoreRendezvous,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

MEMBER, ENGINE = Member("trainer", "", 0), Member("inference", "e0", 0)
NAME, VERSION = RoundName(1, 1), Version(7, 1)
CONNECT = Connect(fingerprint="edges", root="root", peers=(), copies=b"", expected_bytes=0)
WELCOME = Welcome(
    epoch=1, journal_id="j", heartbeat_seconds=1.0, lost_after_heartbeats=3, transport=NixlSettings(), rendezvous=None
)
REFUSED = Refused(reason="no", fault="config", retry=False)
STORE = TcpStoreRendezvous("127.0.0.1", 1, 0, 2, 1.0)
CALL = CallEngine("e0", Call.PAUSE, 1, 1.0)
FOUND = NeedsFound(Needs(tensors=(), quantized=(), fingerprint="f"), {"e1": "why"})
DIRTY = Append(LiveDirty(round=NAME, writers={}), answer=True)
BEGAN = Append(RoundBegan(round=NAME, version=VERSION, attempt=1, engines=("e0",)))
COMMITTED = Append(Committed(round=NAME, version=VERSION, sequence=1))
ENDED = Append(RoundEnded(
    round=NAME, version=VERSION, attempt=1, engines=("e0",), left_out=(), outcome="committed", reason="", bytes=1,
    descriptors=1, times={},
))  # fmt: skip


class Desk:
    """An outbox whose whole surroundings write down, in one list, what they are told."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.events: list[Event] = []
        self.journal_error: Exception | None = None
        self.in_group = False
        self.pieces, self.compacted = 1, 0
        self.plan: PlanFacts | Exception = PlanFacts("root", {}, {}, True)
        self.history, self.meters = History(), Meters()
        self.audited: list[Any] = []
        self.inbox = Inbox(self.events.extend)

        def note(name: str, result: Any = None) -> Any:
            return lambda *args: (self.done.append((name, *args)), result)[1]

        hub = SimpleNamespace(accept=note("accept"), refuse=note("refuse"), drop=note("drop"), send=note("send"))
        group = SimpleNamespace(open=note("open"), deliver=lambda *args: self.in_group)
        self.outbox = Outbox(
            inbox=self.inbox, journal=self, history=self.history, hub=hub, group=group,  # type: ignore[arg-type]
            engines=SimpleNamespace(call=note("call")),  # type: ignore[arg-type]
            planning=SimpleNamespace(make=self._make, needs=lambda _: FOUND),  # type: ignore[arg-type]
            markers=SimpleNamespace(write=note("marker")), stable=SimpleNamespace(look=self._look),  # type: ignore[arg-type]
            meters=self.meters, trail=SimpleNamespace(durable=self.audited.append),  # type: ignore[arg-type]
        )  # fmt: skip

    async def _look(self, after_seconds: float, step: int) -> None:
        self.done.append(("look", after_seconds, step))

    @property
    def failures(self) -> list[BaseException]:
        return [] if self.inbox.failure is None else [self.inbox.failure]

    async def append(self, entries: Sequence[tuple[str, bytes]]) -> list[int]:
        await asyncio.sleep(0)  # what must wait for it gets the chance not to
        if self.journal_error is not None:
            raise self.journal_error
        self.done.append(("durable", *(kind for kind, _ in entries)))
        return [1] * len(entries)

    async def compact(self) -> bool:
        await asyncio.sleep(0)
        self.compacted += 1
        return self.compacted < self.pieces

    def _make(self, command: MakePlan) -> PlanFacts:
        if isinstance(self.plan, Exception):
            raise self.plan
        return self.plan

    async def performs(self, *batches: list[Command]) -> None:
        """Until all batches are through, or one of them has failed."""
        for batch in batches:
            self.outbox.put(batch)
        self.outbox.put([Say("info", "the end")])
        running = asyncio.create_task(self.outbox.run())
        while not self.inbox.stopped.is_set() and not self.outbox._batches.empty():  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(
            running, *(asyncio.all_tasks() - {asyncio.current_task(), running}), return_exceptions=True
        )
        await asyncio.sleep(0)  # what was posted last is decided in a turn of its own


@pytest.fixture
async def desk() -> Desk:
    return Desk()


async def test_each_command_goes_where_it_belongs(desk: Desk) -> None:
    await desk.performs([
        Accept(MEMBER, 5, WELCOME), Refuse(MEMBER, 6, REFUSED), Drop(MEMBER, 5, "rude"),
        Send(MEMBER, Heartbeat()), SendPlan(MEMBER, CONNECT), CALL, OpenGroup(STORE, ((MEMBER, 5),)),
        LookForStable(0.02, 5),
    ])  # fmt: skip
    assert desk.done == [
        ("accept", MEMBER, 5, WELCOME), ("refuse", MEMBER, 6, REFUSED), ("drop", MEMBER, 5, "rude"),
        ("send", MEMBER, Heartbeat()), ("send", MEMBER, CONNECT), ("call", CALL), ("open", STORE, {MEMBER: 5}),
        ("look", 0.02, 5),
    ]  # fmt: skip


async def test_a_record_is_durable_before_anything_later(desk: Desk) -> None:
    await desk.performs([DIRTY, Send(MEMBER, Heartbeat())], [CALL])
    assert [word[0] for word in desk.done] == ["durable", "send", "call"]
    assert desk.events == [Appended(1, "LiveDirty", NAME)]


async def test_the_journal_is_compacted_piece_by_piece_and_between_rounds_only(desk: Desk) -> None:
    desk.pieces = 3
    await desk.performs([BEGAN, DIRTY])
    assert desk.compacted == 0
    await desk.performs([ENDED], *[[CALL]] * 9)
    assert desk.compacted == 3
    desk.pieces = 10_000
    await desk.performs([ENDED], *[[CALL]] * 9, [BEGAN])
    assert 3 < desk.compacted < 30, "a round that begins ends it"


async def test_neighbours_share_one_commit_and_only_those_that_ask_are_answered(desk: Desk) -> None:
    await desk.performs([COMMITTED, ENDED, CALL, DIRTY])
    assert desk.done == [("durable", "Committed", "RoundEnded"), ("call", CALL), ("durable", "LiveDirty")]
    assert desk.audited == [COMMITTED.record, ENDED.record, DIRTY.record]
    assert [event.kind for event in desk.events if isinstance(event, Appended)] == ["LiveDirty"]
    assert [row.round for row in desk.history.rounds] == ["1.1"]
    assert desk.history.committed is not None
    assert desk.history.committed.unix_time > 0


async def test_after_a_lost_journal_nothing_is_performed(desk: Desk) -> None:
    desk.journal_error = OSError("the disk is gone")
    await desk.performs([DIRTY, Send(MEMBER, Heartbeat())], [CALL])
    assert desk.failures == [desk.journal_error]
    assert desk.done == []
    assert desk.events == []


async def test_an_unknown_command_ends_the_daemon(desk: Desk) -> None:
    await desk.performs([Command(), CALL])
    assert isinstance(desk.failures[0], TypeError)
    assert desk.done == []


async def test_a_group_delivers_what_the_hub_would(desk: Desk) -> None:
    desk.in_group = True
    await desk.performs([SendPlan(MEMBER, CONNECT)])
    assert desk.done == []


async def test_markers_are_written_later_by_their_thread(desk: Desk) -> None:
    await desk.performs([WriteMarker("COMMITTED", VERSION, {"sequence": 3}), CALL])
    assert desk.done == [("marker", "COMMITTED", VERSION, {"sequence": 3}), ("call", CALL)]


@pytest.mark.parametrize(("member", "engine"), [(ENGINE, "e0"), (MEMBER, ""), (None, "")])
async def test_layouts_that_do_not_fit_are_an_event(desk: Desk, member: Member | None, engine: str) -> None:
    desk.plan = PlanError("tensor 'w' has two shapes", member)
    await desk.performs([MakePlan(4, (), ())])
    assert desk.events == [PlanRejected(1, 4, "tensor 'w' has two shapes", engine)]
    assert desk.failures == []


async def test_so_is_a_plan(desk: Desk) -> None:
    await desk.performs([MakePlan(4, (), ())])
    assert desk.events == [PlanReady(1, 4, PlanFacts("root", {}, {}, True))]
    await desk.performs([MakePlan(5, (), (), lends=True)])
    assert desk.events[1:] == [PlanReady(2, 5, PlanFacts("root", {}, {}, True), lends=True)]


async def test_so_is_what_engines_need(desk: Desk) -> None:
    await desk.performs([MakeNeeds(4, ())])
    assert desk.events == [NeedsReady(1, 4, FOUND.needs, FOUND.misfits)]


async def test_layouts_that_break_the_planner_are_an_event(desk: Desk) -> None:
    desk.plan = IndexError("a bug\ud800")
    await desk.performs([MakePlan(4, (), ())])
    reason = "the planner broke: IndexError('a bug\\ud800')"
    assert desk.events == [PlanRejected(1, 4, reason, "", "daemon")]
    assert desk.failures == []


async def test_what_breaks_the_needs_costs_the_needs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: MakeNeeds) -> NeedsFound:
        raise OverflowError("a bug")

    monkeypatch.setattr(desk.outbox._planning, "needs", broken)
    with structlog.testing.capture_logs() as logs:
        await desk.performs([MakeNeeds(4, ()), CALL])
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "what the engines need cannot be put together"
    ]
    assert desk.done == [("call", CALL)]
    assert desk.failures == []


async def test_what_becomes_durable_is_counted_and_a_disk_that_does_not_answer_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk()
    await desk.performs([BEGAN, ENDED])
    assert desk.meters.registry.get_sample_value("weightsync_journal_records_total") == 2
    labels = {"outcome": "committed", "fault": ""}
    assert desk.meters.registry.get_sample_value("weightsync_rounds_total", labels) == 1
    assert desk.outbox.obstacle == ""
    asked: list[str] = []
    clock = [100.0]
    monkeypatch.setattr("weightsync.orchestrator.daemon.outbox.time.monotonic", lambda: clock[0])

    async def slow(entries: Sequence[tuple[str, bytes]]) -> list[int]:
        for seconds in (STUCK_SECONDS, STUCK_SECONDS + 7):
            clock[0] = 100.0 + seconds
            asked.append(desk.outbox.obstacle)
        return [1] * len(entries)

    monkeypatch.setattr(desk, "append", slow)
    await desk.performs([BEGAN])
    assert asked == ["", "the journal's disk has not answered for 12 s"]
    assert desk.outbox.obstacle == ""
