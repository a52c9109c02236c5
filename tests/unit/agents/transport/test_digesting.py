"""Digests of what lands, part by part as it becomes whole; together they are that of everything."""

import numpy as np
import pytest
from row_parallel import connects, expected, masters, source, target
from weightsync.agents.tables.runs import digest_table
from weightsync.agents.transport.digesting import CargoDigest, Digester, covers, digest_parts
from weightsync.agents.transport.nixl.arrivals import inbound
from weightsync.kernels.digest import digest
from weightsync.orchestrator.protocol.layout import (
    COPY_COLUMNS,
    COPY_PEER,
    COPY_STAGED,
    as_matrix,
)
from weightsync.orchestrator.protocol.names import add_digests

CHUNK, CHUNKS = 256, 96


class Reader:
    """A rank that has half the columns of six matrices from two writers, in a landing of a few chunks."""

    def __init__(self):
        sources, self.rank = [source(number, 2, 2048) for number in range(2)], target(1, 2, 2048, "flip")
        connect = connects({rank.member: (rank.layout, "", b"") for rank in (*sources, self.rank)})[self.rank.member]
        self.peers, self.copies = connect.peers, as_matrix(connect.copies, COPY_COLUMNS)
        self.layout, self.memory = self.rank.layout, self.rank.memory

    def copies_of(self, number):
        return self.copies[self.copies[:, COPY_PEER] == number]

    def parts(self, number, part_bytes):
        return digest_parts(self.copies_of(number), CHUNK, self.layout, self.memory, part_bytes)

    def holds(self, seed):
        self.memory[0].copy_(expected(1, 2, masters(seed)))

    def whole(self):
        return digest(self.memory, digest_table(self.layout.matrix(), self.layout))


@pytest.fixture
def reader():
    return Reader()


@pytest.mark.parametrize("part_bytes", [1, 5000, 1 << 30])
def test_parts_add_up_to_the_digest_of_everything(reader, part_bytes):
    reader.holds(1)
    parts = [part for number in (0, 1) for part in reader.parts(number, part_bytes)]
    assert len(parts) == {1: 12, 5000: 10, 1 << 30: 2}[part_bytes]
    assert add_digests(*(part.digest() for part in parts)) == reader.whole()


def test_a_part_is_whole_when_its_last_chunk_was_scattered(reader):
    """By the scattering of a real plan: of every prefix of chunks just the parts that name it hold what they are to."""
    parts = reader.parts(0, 1)
    assert [part.chunks for part in parts] == [16, 32, 48, 64, 80, 96]
    reader.holds(1)
    due = [part.digest() for part in parts]
    reader.memory[0].zero_()
    edge = inbound(reader.copies, reader.peers, reader.layout, reader.memory)[0]
    rows = expected(1, 2, masters(1)).reshape(6, 64, 128)[:, :32].reshape(-1)
    for number, scatter in enumerate(edge.scatter):
        place = edge.berth.place(number)
        reader.memory[1][place : place + CHUNK] = rows[CHUNK * number : CHUNK * (number + 1)]
        scatter()
        there = [part.digest() == right for part, right in zip(parts, due, strict=True)]
        assert there == [part.chunks <= number + 1 for part in parts]


def test_parts_are_digested_in_their_order_whatever_comes_first_and_asked_for_once(reader):
    reader.holds(2)
    parts, begun = reader.parts(0, 1), []
    cargo, scattered = CargoDigest(parts, begun.append), set()
    for chunk in (*range(1, 40), 0):
        assert begun == []
        scattered.add(chunk)
        cargo.advance(scattered)
    assert begun == [part.digest for part in parts[:2]]
    assert cargo.result() is None
    for chunk in range(40, CHUNKS):
        scattered.add(chunk)
        cargo.advance(scattered)
    assert begun == [part.digest for part in parts]
    assert cargo.result() == add_digests(*(part.digest() for part in parts))
    assert cargo.result() is None


def test_another_round_begins_anew(reader):
    begun = []
    cargo = CargoDigest(reader.parts(0, 1), begun.append)
    cargo.advance(set(range(CHUNKS - 1)))
    cargo.begin()
    cargo.advance({CHUNKS - 1})
    assert (len(begun), cargo.result()) == (5, None)


def test_a_digest_of_a_cpu_is_taken_when_it_is_asked_for(reader):
    reader.holds(1)
    [part] = reader.parts(0, 1 << 30)
    digester = Digester(None)
    digester.begin(part.digest)
    reader.holds(3)
    assert part.digest.result() == part.digest()


def test_an_edge_that_owes_nothing_has_the_digest_of_nothing(reader):
    empty = digest_parts(reader.copies[:0], CHUNK, reader.layout, reader.memory)
    assert (empty, CargoDigest(empty, print).result()) == ((), (0, 0))


def test_a_plan_that_reaches_each_byte_once_covers_the_layout(reader):
    assert covers(reader.copies, reader.layout)
    assert covers(reader.copies[::-1], reader.layout)


@pytest.mark.parametrize("fault", ["missing", "twice", "twice for another"])
def test_a_plan_that_does_not_is_found(reader, fault):
    """Copies that are as many bytes as the layout, but not the same ones, would have the digest that writers tell."""
    copies = reader.copies.copy()
    if fault == "missing":
        copies = copies[1:]
    elif fault == "twice":
        copies = np.concatenate([copies, copies[:1]])
    else:
        copies[1] = np.where(np.arange(COPY_COLUMNS) == COPY_STAGED, copies[1], copies[0])
    assert not covers(copies, reader.layout)
