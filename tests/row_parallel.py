"""Matrices that trainer ranks hold by rows and engine ranks need by columns: no two bytes of a row stay together, and
all of it goes by way of a landing. The real plan, real slots' memory, and what must arrive."""

from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.transport.interface import SourceMemory, TargetMemory
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.layout import Lands, Layout, Tensor, row
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Member

ROWS, COLUMNS, COUNT = 64, 128, 6
TENSORS = tuple(Tensor(f"model.layers.{n}.down_proj.weight", "bfloat16", (ROWS, COLUMNS)) for n in range(COUNT))
COST = CostModel(alpha_seconds=1e-3, bytes_per_second=1e9, pack_bytes_per_second=1e12)
"""A descriptor is worth a megabyte: everything is packed."""


def masters(seed: int) -> torch.Tensor:
    """uint8 ``[COUNT, ROWS, 2 * COLUMNS]``, the bytes of all matrices."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (COUNT, ROWS, 2 * COLUMNS), np.uint8))


@dataclass
class Rank:
    """One end's memory and its layout."""

    member: Member
    memory: list[torch.Tensor]
    layout: Layout

    @staticmethod
    def made(
        member: Member, boxes: tuple[tuple[int, int], tuple[int, int]], room: int, lands: Lands = "live"
    ) -> "Rank":
        """Of every matrix the box (first, count) of rows and of columns, one behind the other; ``room``: of its ring or
        landing."""
        (low, height), (left, width) = boxes
        size = height * width * 2
        rows = [row(n, 0, n * size, (low, left), (height, width), (width * 2, 2)) for n in range(COUNT)]
        memory = [host_arena(COUNT * size).zero_(), host_arena(room).zero_()]
        regions = tuple(map(region_of, memory))
        return Rank(member, memory, Layout(TENSORS, regions, np.array(rows, "<i8").tobytes(), 1, lands=lands))

    def source(self) -> SourceMemory:
        return SourceMemory(self.member, 1, self.layout, self.memory, [True] * COUNT)

    def target(self) -> TargetMemory:
        return TargetMemory(str(self.member), torch.device("cpu"), self.layout, self.memory, _nothing, _nothing)


def _nothing(*_: object) -> None: ...


def source(number: int, of: int, ring: int) -> Rank:
    height = ROWS // of
    return Rank.made(Member("trainer", "", number), ((number * height, height), (0, COLUMNS)), ring)


def target(number: int, of: int, landing: int, lands: Lands = "live") -> Rank:
    width = COLUMNS // of
    member = Member("inference", "a", number)
    return Rank.made(member, ((0, ROWS), (number * width, width)), landing, lands)


def fill(ranks: list[Rank], weights: torch.Tensor) -> None:
    """Put each source's rows of ``weights`` into its memory."""
    height = ROWS // len(ranks)
    for rank in ranks:
        mine = weights[:, rank.member.rank * height : (rank.member.rank + 1) * height]
        rank.memory[0].copy_(mine.reshape(-1))


def expected(number: int, of: int, weights: torch.Tensor) -> torch.Tensor:
    """The bytes that a target must hold."""
    width = 2 * COLUMNS // of
    return weights[:, :, number * width : (number + 1) * width].reshape(-1)


Reached = dict[Member, tuple[Layout, str, bytes]]
"""Of every rank: layout, name and card of its endpoint."""


def connects(reached: Reached) -> dict[Member, Connect]:
    """What the daemon tells each rank."""
    parties = {
        role: [Party(member, 1, layout) for member, (layout, _, _) in reached.items() if member.role == role]
        for role in ("trainer", "inference")
    }
    plan = make_plan(parties["trainer"], parties["inference"], COST)
    found = {}
    for member, part in plan.parts.items():
        peers = tuple(
            Peer(peer, 1, reached[peer][1], reached[peer][2], reached[peer][0].regions, berth)
            for peer, berth in zip(part.peers, part.berths, strict=True)
        )
        found[member] = Connect(
            fingerprint=part.fingerprint,
            root=plan.root,
            peers=peers,
            copies=part.copies,
            expected_bytes=part.expected_bytes,
        )
    return found


encode = msgspec.msgpack.Encoder().encode
