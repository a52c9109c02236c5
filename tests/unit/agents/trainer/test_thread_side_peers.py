"""A trainer rank over real NIXL among three real processes, one of which is killed, frozen, cut off, and comes back.

What the daemon says is said by the test; what it would hear is looked at: Ready and CLOSED, and when.
"""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weightsync.agents.link.edges import PlanEdges
from weightsync.agents.memory.arena import region_of
from weightsync.agents.trainer.thread_side import TrainerSide
from weightsync.agents.transport.interface import SourceMemory
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.edges import EdgeFailure, Peer
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Connect,
    Grant,
    NixlSettings,
    Ready,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

SIZE = 32 << 20
"""So much takes TCP on one host several turns of the loop: a peer can stop in the middle."""

PATIENCE = 20.0
"""For what is expected. Generous: the machine may be busy."""

TRAINER, VERSION = Member("trainer", "", 0), Version(7, 1)
A, B, C = (Member("inference", name, 0) for name in "abc")
NIXL_PEER = Path(__file__).parents[1] / "transport" / "nixl" / "nixl_peer.py"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]  # three processes each: seconds


class Engine:
    """An inference rank's memory in a process of its own."""

    def __init__(self, member: Member, stack: ExitStack) -> None:
        command = [sys.executable, str(NIXL_PEER), str(SIZE)]
        self.process: subprocess.Popen[str] = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PEER_TLS": "tcp"},
            )
        )
        stack.callback(self.process.kill)
        assert self.process.stdout is not None
        facts = json.loads(self.process.stdout.readline())
        region = Region(facts["base"], facts["length"])
        self.layout = layout_of(region)
        self.peer = Peer(member, 1, facts["name"], bytes.fromhex(facts["card"]), (region,))

    def freeze(self) -> None:
        """From here on it takes no byte. (One that watches for the first may be late, and have all of them by then.)"""
        self.process.send_signal(signal.SIGSTOP)
        while not self.stopped():
            time.sleep(0.001)

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def stopped(self) -> bool:
        return Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").split()[2] == "T"


def layout_of(region: Region) -> Layout:
    rows = np.array([row(0, 0, 0, (0,), (SIZE,), (1,))], dtype="<i8").tobytes()
    return Layout((Tensor("w", "uint8", (SIZE,)),), (region,), rows)


class Trainer:
    """A rank whose slots hold ``bytes``; ``said`` is what the daemon would hear, with the time of each word."""

    epoch = 3

    def __init__(self) -> None:
        self.bytes = np.random.default_rng(1).integers(2, 256, SIZE, dtype=np.uint8)
        arena = torch.from_numpy(self.bytes)
        layout = layout_of(region_of(arena))
        self.side = TrainerSide(self, SourceMemory(TRAINER, 1, layout, [arena], (True,)), SIZE)
        self.side.welcomed(
            Welcome(
                epoch=3,
                journal_id="j",
                heartbeat_seconds=1.0,
                lost_after_heartbeats=3,
                transport=NixlSettings(),
                rendezvous=None,
            )
        )
        self.said: list[tuple[float, Any]] = []
        self.edges: PlanEdges | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None

    def send(self, message: Any) -> bool:
        self.said.append((time.monotonic(), message))
        return True

    def say_once(self, word: Any) -> None:
        self.send(word)

    def announce(self) -> None: ...

    def spawn(self, work: Any) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def reconnect(self) -> None:
        if self.edges is not None:
            self.edges.changed()

    def connect_message(self, *engines: Engine) -> Connect:
        layout = (self.side.announcement() or pytest.fail("no layout")).layout
        parties = [Party(engine.peer.member, 1, engine.layout) for engine in engines]
        part = make_plan([Party(TRAINER, 1, layout)], parties, CostModel()).part(TRAINER)
        peers = {engine.peer.member: engine.peer for engine in engines}
        return Connect(
            fingerprint=part.fingerprint,
            root="root",
            peers=tuple(peers[member] for member in part.peers),
            copies=part.copies,
            expected_bytes=part.expected_bytes,
        )

    async def connect(self, *engines: Engine) -> Ready:
        """What is ready first under the plan for ``engines``; what follows is in ``said``."""
        if self._keeping is not None:
            self._keeping.cancel()
        self.edges = PlanEdges(TRAINER, self.side, self.connect_message(*engines))
        ready = await self.edges.prepare()
        self._keeping = self.spawn(self.edges.keep(self.send))
        self.fingerprint = ready.fingerprint
        return ready

    def grant(self, number: int, *members: Member, seconds: float = PATIENCE) -> None:
        if self.side.status().staged is None:
            self.side.prepare(VERSION)
            self.side.staged(VERSION, 0.0, 0.0, Future())
        self.side.heard(
            Grant(
                round=RoundName(3, number),
                version=VERSION,
                fingerprint=self.fingerprint,
                members=members,
                deadline_seconds=seconds,
            )
        )

    async def until(self, found: Callable[[Any], bool]) -> tuple[float, Any]:
        """The first word that is as ``found`` says, and when it was said."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for at, word in self.said:
                    if found(word):
                        return at, word
                await asyncio.sleep(0.002)

    async def closed(self, number: int, *members: Member, final: bool | None = None) -> tuple[float, dict[Member, str]]:
        """When CLOSED of a round has named ``members`` (``final``: said so), and every peer's error in it."""

        def found(word: Any) -> bool:
            return (
                isinstance(word, Closed)
                and word.round.number == number
                and {peer.peer for peer in word.peers} >= set(members)
                and (final is None or word.final is final)
            )

        at, word = await self.until(found)
        assert word.error == ""
        return at, {peer.peer: peer.error for peer in word.peers}

    async def ready_with(self, *failed: Member) -> Ready:
        """The last Ready, once it names ``failed``."""

        def found(word: Any) -> bool:
            return word is self.last_ready and [each.peer for each in word.failed] == list(failed)

        _, ready = await self.until(found)
        assert isinstance(ready, Ready)
        return ready

    @property
    def last_ready(self) -> Ready | None:
        return next((word for _, word in reversed(self.said) if isinstance(word, Ready)), None)

    def holds(self, *engines: Engine) -> None:
        """These engines' memory is what the slots hold."""
        digest = hashlib.sha256(self.bytes).hexdigest()
        for engine in engines:
            assert engine.ask("digest") == digest, engine.peer.member


@pytest.fixture
def start() -> Iterator[Callable[..., list[Engine]]]:
    with ExitStack() as stack:
        yield lambda *members: [Engine(member, stack) for member in members]


@pytest.fixture
async def trainer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Trainer]:
    monkeypatch.setenv("UCX_TLS", "tcp")
    rank = Trainer()

    async def poll() -> None:
        while True:
            rank.side.poll()
            await asyncio.sleep(0.001)

    polling = rank.spawn(poll())
    yield rank
    for task in list(rank.tasks):
        task.cancel()
    await asyncio.gather(polling, *rank.tasks, return_exceptions=True)
    rank.side.shut()


@asynccontextmanager
async def frozen(engine: Engine) -> AsyncIterator[None]:
    engine.process.send_signal(signal.SIGSTOP)
    yield
    engine.process.send_signal(signal.SIGCONT)


def names(failed: Sequence[EdgeFailure]) -> list[Member]:
    return [each.peer for each in failed]


# ------------------------------------------------------------------------------------------------------ in a write
async def test_a_peer_that_is_killed_before_the_post_costs_only_its_own_edge(trainer: Trainer, start: Any) -> None:
    a, b, c = engines = start(A, B, C)
    assert (await trainer.connect(*engines)).failed == ()
    b.process.kill()
    b.process.wait()
    trainer.grant(1, A, B, C)
    _, errors = await trainer.closed(1, A, B, C, final=True)
    assert (errors[A], errors[C]) == ("", "")
    assert "the peer's process or its connection is gone" in errors[B]
    trainer.holds(a, c)
    assert trainer.side.status().open_rounds == ()
    assert names((await trainer.ready_with(B)).failed) == [B], "the dead edge is named without being asked for"
    assert trainer.side.reserve() == "", "the next version may take the slots"


async def test_a_peer_that_dies_in_the_middle_of_a_write_costs_only_its_own_edge(trainer: Trainer, start: Any) -> None:
    a, b, c = engines = start(A, B, C)
    await trainer.connect(*engines)
    b.freeze()
    trainer.grant(1, A, B, C)
    await trainer.closed(1, A, C)
    b.process.kill()
    _, errors = await trainer.closed(1, A, B, C, final=True)
    assert (errors[A], errors[C]) == ("", "")
    assert errors[B]
    trainer.holds(a, c)
    assert trainer.side.reserve() == ""


async def test_a_peer_that_freezes_in_the_middle_of_a_write_holds_up_nobody(trainer: Trainer, start: Any) -> None:
    """Not the others' CLOSED, not the next round, not the next plan; only the slots that are read for it."""
    a, b, c = engines = start(A, B, C)
    await trainer.connect(*engines)
    b.freeze()
    began = time.monotonic()
    trainer.grant(1, A, B, C, seconds=600.0)
    at, errors = await trainer.closed(1, A, C)
    assert errors == {A: "", C: ""}
    assert at - began < PATIENCE / 2
    assert b.stopped()
    trainer.holds(a, c)

    trainer.side.heard(Abort(round=RoundName(3, 1), torn=True, reason="b is left out", members=(B,)))
    trainer.grant(2, A, C)
    _, errors = await trainer.closed(2, A, C, final=True)
    assert errors == {A: "", C: ""}
    ready = await trainer.ready_with(B)
    assert "edge to b/0 has not ended" in ready.failed[0].error
    assert trainer.side.reserve() == "", "an engine that was left out keeps no version from the others"
    trainer.side.release()
    assert (await trainer.connect(a, c)).failed == (), "a plan without it needs nothing of it"
    trainer.grant(3, A, C)
    await trainer.closed(3, A, C, final=True)
    assert trainer.side.status().open_rounds == (RoundName(3, 1),)

    b.process.send_signal(signal.SIGCONT)
    _, errors = await trainer.closed(1, A, B, C, final=True)
    assert "the daemon ended it: b is left out" in errors[B]
    assert trainer.side.status().open_rounds == ()
    assert (await trainer.connect(*engines)).failed == (), "and it comes back into the plan"
    trainer.grant(4, A, B, C)
    _, errors = await trainer.closed(4, A, B, C, final=True)
    assert not any(errors.values())
    trainer.holds(*engines)
    assert trainer.side.reserve() == ""


async def test_the_edge_of_a_frozen_peer_ends_when_it_wakes_or_dies(trainer: Trainer, start: Any) -> None:
    a, b, c = engines = start(A, B, C)
    await trainer.connect(*engines)
    async with frozen(b):
        c.process.send_signal(signal.SIGSTOP)
        trainer.grant(1, A, B, C, seconds=3.0)
        _, errors = await trainer.closed(1, A)
        assert errors == {A: ""}
        await trainer.ready_with(B, C)
        assert trainer.side.status().open_rounds == (RoundName(3, 1),)
        c.process.kill()
        _, errors = await trainer.closed(1, A, C)
        assert "the deadline passed" in errors[C]
        assert trainer.side.reserve() == "edge to b/0 has not ended (round 3.1)"
    _, errors = await trainer.closed(1, A, B, C, final=True)
    assert "the deadline passed" in errors[B]
    await trainer.ready_with(C)
    assert trainer.side.reserve() == ""
    trainer.holds(a)


# ------------------------------------------------------------------------------------------------------- at connect
async def test_a_plan_with_a_dead_peer_serves_the_others_and_those_that_come_back(trainer: Trainer, start: Any) -> None:
    """The plan between fails for one of its peers; the edge that it gave back is not written by afterwards."""
    a, b, dead = start(A, B, C)
    await trainer.connect(a, b)
    dead.process.kill()
    dead.process.wait()
    ready = await trainer.connect(a, dead)
    assert names(ready.failed) == [C]
    assert "at the first word: the peer's process or its connection is gone" in ready.failed[0].error
    trainer.grant(1, A, C)
    _, errors = await trainer.closed(1, A, C, final=True)
    assert errors[A] == ""
    assert errors[C].startswith("there is no edge to c/0")
    assert b.ask("clear") == "cleared"
    assert (await trainer.connect(a, b)).failed == ()
    trainer.grant(2, A, B)
    _, errors = await trainer.closed(2, A, B, final=True)
    assert errors == {A: "", B: ""}
    trainer.holds(a, b)


async def test_a_peer_that_is_frozen_at_connect_is_named_and_used_when_it_wakes(trainer: Trainer, start: Any) -> None:
    a, b = engines = start(A, B)
    async with frozen(b):
        ready = await trainer.connect(*engines)
        assert names(ready.failed) == [B]
        assert "has not taken the first word" in ready.failed[0].error
        trainer.grant(1, A, B)
        _, errors = await trainer.closed(1, A, B, final=True)
        assert errors[A] == ""
        assert errors[B].startswith("there is no edge to b/0")
        assert trainer.side.reserve() == "", "a first word is no write from the slots"
        trainer.side.release()
    await trainer.ready_with()
    trainer.grant(2, A, B)
    _, errors = await trainer.closed(2, A, B, final=True)
    assert errors == {A: "", B: ""}
    trainer.holds(a, b)


async def test_a_connection_that_breaks_is_made_anew_in_the_same_round(trainer: Trainer, start: Any) -> None:
    a, b = engines = start(A, B)
    await trainer.connect(*engines)
    for number in (1, 2):
        assert b.ask("sever") == "severed"
        trainer.grant(number, A, B)
        _, errors = await trainer.closed(number, A, B, final=True)
        assert errors == {A: "", B: ""}
        trainer.holds(a, b)


async def test_a_restarted_engine_is_reached_in_the_place_of_the_frozen_one(trainer: Trainer, start: Any) -> None:
    """What is in flight to the process before it counts no longer."""
    a, old = start(A, B)
    await trainer.connect(a, old)
    old.process.send_signal(signal.SIGSTOP)
    trainer.grant(1, A, B, seconds=3.0)
    await trainer.ready_with(B)
    [new] = start(B)
    assert (await trainer.connect(a, new)).failed == ()
    _, errors = await trainer.closed(1, A, B, final=True)
    assert errors[A] == ""
    assert errors[B]
    trainer.grant(2, A, B)
    await trainer.closed(2, A, B, final=True)
    trainer.holds(a, new)
    assert trainer.side.reserve() == ""
