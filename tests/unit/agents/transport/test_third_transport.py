"""A third transport, within one process: its two ends and one entry are all that it takes to carry a whole version.

Everything else is real: slots, planner, tables, both sides of the agents, digests.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import pytest
import torch
from tiny_fleet import SHAPES, TRAINER, Target, made_slots
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.lending import Lending
from weightsync.agents.inference.shadow import ShadowRounds
from weightsync.agents.inference.thread_side import InferenceSide
from weightsync.agents.inference.weights import LiveWeights, landing_arenas
from weightsync.agents.inference.window import Windows
from weightsync.agents.tables.cargo import plain_runs
from weightsync.agents.tables.runs import (
    RUN_LENGTH,
    RUN_LOCAL_OFFSET,
    RUN_LOCAL_REGION,
    RUN_REMOTE_OFFSET,
    RUN_REMOTE_REGION,
    pack_table,
    scatter_table,
)
from weightsync.agents.trainer.publisher import source_of
from weightsync.agents.trainer.thread_side import TrainerSide
from weightsync.agents.transport.interface import Ended, HandedOver, Receiver, Sender, SourceMemory, TargetMemory
from weightsync.agents.transport.registry import TRANSPORTS, Transport
from weightsync.agents.transport.shares import Share
from weightsync.kernels.columns import DST_REGION
from weightsync.kernels.copy import strided_copy
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.landing import landed
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Layout, as_matrix
from weightsync.orchestrator.protocol.messages import Closed, Connect, Grant, Welcome
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

VERSION, ROUND = Version(7, 3), RoundName(1, 1)


# ------------------------------------------------------------------------------------- the transport, as a whole
class MemorySettings(msgspec.Struct, frozen=True, tag="memory"):
    """No keys."""


REACHABLE: Final[dict[str, TargetMemory]] = {}
"""The memory of every receiver, by the name that it announces."""


class MemorySender(Sender):
    def __init__(self, memory: SourceMemory) -> None:
        self._memory = memory
        self._shares: dict[Member, Share] = {}

    def open(self, settings: MemorySettings) -> None: ...

    async def connect(self, shares: Sequence[Share]) -> Mapping[Member, Exception]:
        self._shares = {share.peer.member: share for share in shares}
        return {}

    async def write(
        self, round_name: RoundName, members: Sequence[Member], deadline_seconds: float, ended: Ended
    ) -> None:
        for member in members:
            if member in self._shares:
                ended(self._copy(self._shares[member]))

    def _copy(self, share: Share) -> HandedOver:
        arenas, there, berth = self._memory.arenas, REACHABLE[share.peer.endpoint_name].tensors, share.peer.berth
        for run in plain_runs(share.runs, berth).tolist():
            source = arenas[run[RUN_LOCAL_REGION]].narrow(0, run[RUN_LOCAL_OFFSET], run[RUN_LENGTH])
            there[run[RUN_REMOTE_REGION]].narrow(0, run[RUN_REMOTE_OFFSET], run[RUN_LENGTH]).copy_(source)
        if berth is not None:  # what is packed goes to its place in the landing, which takes all of it
            table = pack_table(share.copies, self._memory.layout)
            table[:, DST_REGION] = 0
            strided_copy(arenas, [there[berth.region].narrow(0, berth.offset, berth.bytes)], table)
        return HandedOver(share.peer.member, share.bytes)


class MemoryReceiver(Receiver):
    def __init__(self, memory: TargetMemory) -> None:
        self._memory = memory

    def open(self, settings: MemorySettings) -> None:
        REACHABLE[self._memory.name] = self._memory

    def announcement(self) -> tuple[str, bytes]:
        return self._memory.name, b""

    async def connect(self, connect: Connect) -> None:
        berths = [peer.berth for peer in connect.peers]
        self.landed = landed(as_matrix(connect.copies, COPY_COLUMNS), berths)

    def renew(self, memory: TargetMemory) -> None:
        self._memory, self.landed = memory, Receiver.landed

    def arrive(self, version: Version) -> None:
        tensors = self._memory.tensors
        strided_copy(tensors, tensors, scatter_table(self.landed, self._memory.layout))
        self._memory.refresh()


# ------------------------------------------------------------------------------------------ and a version over it
@dataclass(frozen=True)
class Model:
    """A rank's parameters as live weights."""

    target: Target
    refreshed: list[bool]

    @property
    def layout(self) -> Layout:
        return self.target.layout

    @property
    def tensors(self) -> list[torch.Tensor]:
        return self.target.memory

    def check(self) -> None: ...

    def refresh(self) -> None:
        self.refreshed.append(True)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise AssertionError("that is how files are read")

    def rebalanced(self, known: str) -> None:
        return None


class Thread:
    """In the place of the agent's thread: what the side says is kept."""

    epoch = ROUND.epoch

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, message: Any) -> bool:
        self.said.append(message)
        return True

    def say_once(self, word: Any) -> None:
        self.send(word)

    def spawn(self, work: Any) -> "asyncio.Task[None]":
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]


@pytest.mark.parametrize("staging", [0, 1 << 20], ids=["straight", "packed"])
async def test_a_whole_version_goes_over_a_transport_of_one_module(
    weights: Any, monkeypatch: pytest.MonkeyPatch, staging: int
) -> None:
    monkeypatch.setitem(TRANSPORTS, MemorySettings, Transport(MemorySender, MemoryReceiver))
    settings: Any = MemorySettings()
    welcome = Welcome(
        epoch=1, journal_id="j", heartbeat_seconds=1.0, lost_after_heartbeats=3, transport=settings, rendezvous=None
    )
    masters = weights.state(SHAPES)
    slots = made_slots(masters, staging)
    thread = Thread()
    trainer = TrainerSide(thread, source_of(slots, TRAINER, 1), slots.arenas[0].numel())
    trainer.welcomed(welcome)
    targets = [Target.of("a", rank, 0) for rank in range(2)]
    models = {target.member: Model(target, []) for target in targets}
    live = {
        member: LiveWeights(model, torch.device("cpu"), landing_arenas(staging, torch.device("cpu")))
        for member, model in models.items()
    }
    ranks = {}
    for member, weights_of in live.items():
        holdings = Holdings()
        shadow = ShadowRounds(holdings, weights_of, thread.say_once, lambda work: work(), lambda work: work())
        lending = Lending(weights_of, holdings)
        ranks[member] = InferenceSide(thread, member, weights_of, Windows(holdings), shadow, lending)
    for rank in ranks.values():
        rank.welcomed(welcome)

    # The rendezvous, as the daemon does it.
    announced = {member: rank.announcement() for member, rank in ranks.items()}
    parties = [Party(member, 1, told.layout) for member, told in announced.items()]
    plan = make_plan([Party(TRAINER, 1, slots.layout)], parties, CostModel())
    peers = {
        member: Peer(member, 1, told.endpoint_name, told.endpoint, told.layout.regions)
        for member, told in announced.items()
    } | {TRAINER: Peer(TRAINER, 1, "", b"", slots.layout.regions)}
    for member in (TRAINER, *ranks):
        part = plan.part(member)
        connect = Connect(
            fingerprint=part.fingerprint,
            root=plan.root,
            peers=tuple(
                msgspec.structs.replace(peers[peer], berth=b) for peer, b in zip(part.peers, part.berths, strict=True)
            ),
            copies=part.copies,
            expected_bytes=part.expected_bytes,
        )
        await (trainer if member == TRAINER else ranks[member]).connect(connect)
    assert any(plan.part(member).copies for member in ranks) == (staging > 0)

    # A round.
    trainer.prepare(VERSION)
    trainer.staged(VERSION, 0.0, 0.0, Future())
    trainer.heard(
        Grant(
            round=ROUND,
            version=VERSION,
            fingerprint=plan.part(TRAINER).fingerprint,
            members=tuple(ranks),
            deadline_seconds=5.0,
        )
    )
    await asyncio.gather(*thread.tasks)
    closed = thread.said[-1]
    assert isinstance(closed, Closed)
    assert (closed.error, closed.final) == ("", True)
    sent = {transfer.peer: transfer for transfer in closed.peers}
    assert sent.keys() == ranks.keys()
    for member, model in models.items():
        live[member].arrive(VERSION)
        model.target.check(masters)
        assert sent[member].digest == live[member].digest()
        assert sent[member].bytes == live[member].bytes
        assert model.refreshed == [True]
