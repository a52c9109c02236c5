"""The NIXL endpoint against real NIXL: in one process, and between processes that die, stop and come back."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from weightsync.agents.transport.nixl.edge import EdgeResult
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import (
    ConnectError,
    DeadlineError,
    DisconnectedError,
    EdgeError,
    ImplausibleRateError,
    MetadataError,
    NixlError,
    RegionError,
    TransferError,
)
from weightsync.orchestrator.protocol.layout import Matrix, Region
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.settings.sections import NixlSection

PATIENCE = 20.0
"""Deadline of what is expected to finish. Generous: the machine may be busy."""

TRANSPORTS = [pytest.param(None, id="shm"), pytest.param("tcp", id="tcp")]


def region(memory: np.ndarray) -> Region:
    return Region(int(memory.ctypes.data), memory.nbytes)


def random_bytes(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def whole(count: int) -> Matrix:
    return np.array([[0, 0, 0, 0, 0, count]], dtype=np.int64)


class Peer:
    """A target in a process of its own (``nixl_peer.py``)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        self.name: str = facts["name"]
        self.card = bytes.fromhex(facts["card"])
        self.region = Region(facts["base"], facts["length"])

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


StartPeer = Callable[..., Peer]
MakeEndpoint = Callable[..., NixlEndpoint]


@pytest.fixture
def start_peer() -> Iterator[StartPeer]:
    with contextlib.ExitStack() as stack:

        def start(count: int, tls: str | None = None) -> Peer:
            environment = os.environ | ({"PEER_TLS": tls} if tls else {})
            command = [sys.executable, str(Path(__file__).with_name("nixl_peer.py")), str(count)]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            )
            stack.callback(process.kill)
            return Peer(process)

        yield start


@pytest.fixture
def make_endpoint() -> Iterator[MakeEndpoint]:
    made: list[NixlEndpoint] = []

    def make(name: str = "writer", tls: str | None = None, settings: NixlSettings | None = None) -> NixlEndpoint:
        variables = {"UCX_TLS": tls} if tls else {}
        endpoint = NixlEndpoint(name, settings or NixlSettings(), variables=variables)
        made.append(endpoint)
        return endpoint

    yield make
    for endpoint in made:
        endpoint.close()


@asynccontextmanager
async def polling(*endpoints: NixlEndpoint) -> AsyncIterator[None]:
    """The targets poll, as agents do while a grant is open."""

    async def pump() -> None:
        while True:
            for endpoint in endpoints:
                endpoint.poll()
            await asyncio.sleep(0.001)

    task = asyncio.create_task(pump())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def warmed(writer: NixlEndpoint, *peers: str) -> None:
    """Every peer has taken the first word."""
    async with asyncio.timeout(PATIENCE):
        for peer in peers:
            writer.warm(peer)
        while not all(writer.warm(peer) for peer in peers):  # noqa: ASYNC110  (NIXL has no event)
            await asyncio.sleep(0.001)


def succeeded(results: list[EdgeResult]) -> None:
    for result in results:
        if result.error is not None:
            raise result.error


# --------------------------------------------------------------------------------------------- one process, two ends
@pytest.mark.parametrize("tls", TRANSPORTS)
async def test_many_chunks_of_many_descriptors_arrive_in_place(make_endpoint: MakeEndpoint, tls: str | None) -> None:
    """3000 shuffled runs of odd lengths over 40 handles: each chunk selects its own part of the lists."""
    writer, target = make_endpoint("writer", tls), make_endpoint("target", tls)
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 2000, 3000)
    ends = np.cumsum(lengths)
    source, sink = random_bytes(int(ends[-1])), np.zeros(int(ends[-1]), dtype=np.uint8)
    order = rng.permutation(3000)
    there = np.empty(3000, dtype=np.int64)
    there[order] = np.cumsum(lengths[order]) - lengths[order]
    runs = np.stack([ends * 0, ends * 0, ends - lengths, ends * 0, there, lengths], axis=1)
    writer.register([region(source)])
    target.register([region(sink)])
    writer.connect(target.name, target.metadata())
    edge = writer.prepare_edge(target.name, [region(source)], [region(sink)], runs, chunk_bytes=int(ends[-1]) // 40)
    assert len(edge.transfers) >= 40
    expected = np.concatenate(
        [source[end - length : end] for end, length in zip(ends[order], lengths[order], strict=True)]
    )
    async with polling(target):
        await warmed(writer, target.name)
        for window in (1, 3, 100):
            sink[:] = 0
            [result] = await writer.write([edge], in_flight_per_peer=window, deadline_seconds=PATIENCE)
            assert result.error is None
            assert (result.bytes, result.descriptors, result.peer) == (ends[-1], 3000, target.name)
            assert np.array_equal(sink, expected)
            source[0], expected[there[0]] = source[0] ^ 1, expected[there[0]] ^ 1
    assert not writer.tainted_peers


async def test_a_round_later_the_same_edge_carries_the_new_bytes(make_endpoint: MakeEndpoint) -> None:
    writer, target = make_endpoint("writer"), make_endpoint("target")
    source, sink = random_bytes(3 << 20), np.zeros(3 << 20, dtype=np.uint8)
    writer.register([region(source)])
    target.register([region(sink)])
    writer.connect(target.name, target.metadata())
    edge = writer.prepare_edge(target.name, [region(source)], [region(sink)], whole(3 << 20), chunk_bytes=1 << 20)
    handles = [transfer.handle for transfer in edge.transfers]
    async with polling(target):
        for seed in range(3):
            source[:] = random_bytes(3 << 20, seed)
            succeeded(await writer.write([edge], deadline_seconds=PATIENCE))
            assert np.array_equal(source, sink)
    assert [transfer.handle for transfer in edge.transfers] == handles


async def test_warming_up_touches_no_weights(make_endpoint: MakeEndpoint) -> None:
    writer, target = make_endpoint("writer"), make_endpoint("target")
    source, sink = random_bytes(4096), random_bytes(4096, 2)
    before = sink.copy()
    writer.register([region(source)])
    target.register([region(sink)])
    writer.connect(target.name, target.metadata())
    assert not writer.tainted_peers
    async with polling(target):
        await warmed(writer, target.name)
        await warmed(writer, target.name)
    assert np.array_equal(sink, before)


async def test_other_tasks_run_while_a_write_is_posted(make_endpoint: MakeEndpoint) -> None:
    """Posting blocks for the copy on one host; between chunks the loop must get its turn."""
    writer, target = make_endpoint("writer"), make_endpoint("target")
    source, sink = random_bytes(16 << 20), np.zeros(16 << 20, dtype=np.uint8)
    writer.register([region(source)])
    target.register([region(sink)])
    writer.connect(target.name, target.metadata())
    edge = writer.prepare_edge(target.name, [region(source)], [region(sink)], whole(16 << 20), chunk_bytes=8 << 20)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with polling(target):
        task = asyncio.create_task(count())
        succeeded(await writer.write([edge], deadline_seconds=PATIENCE))
        task.cancel()
    assert turns >= 2


async def test_a_rate_above_the_settings_ceiling_is_an_error(make_endpoint: MakeEndpoint) -> None:
    """``transport.max_gb_per_second``, down to the text that the daemon shows."""
    settings = NixlSection(max_gb_per_second=0.000001).message(Path("/run"))
    writer, target = make_endpoint("writer", settings=settings), make_endpoint("target")
    source, sink = random_bytes(16 << 20), np.zeros(16 << 20, dtype=np.uint8)
    writer.register([region(source)])
    target.register([region(sink)])
    writer.connect(target.name, target.metadata())
    edge = writer.prepare_edge(target.name, [region(source)], [region(sink)], whole(16 << 20))
    async with polling(target):
        [result] = await writer.write([edge], deadline_seconds=PATIENCE)
    assert isinstance(result.error, ImplausibleRateError)
    assert "transport.max_gb_per_second is 1e-06. Fix: raise it to the link's rate" in str(result.error)
    assert (result.error.fault, result.error.retry) == ("network", False)


# -------------------------------------------------------------------------------------------------- two processes
@pytest.mark.parametrize("tls", TRANSPORTS)
async def test_bytes_reach_another_process(make_endpoint: MakeEndpoint, start_peer: StartPeer, tls: str | None) -> None:
    peer, writer = start_peer(5 << 20, tls), make_endpoint("writer", tls)
    source = random_bytes(5 << 20)
    writer.register([region(source)])
    writer.connect(peer.name, peer.card)
    edge = writer.prepare_edge(peer.name, [region(source)], [peer.region], whole(5 << 20), chunk_bytes=1 << 19)
    await warmed(writer, peer.name)
    succeeded(await writer.write([edge], in_flight_per_peer=4, deadline_seconds=PATIENCE))
    assert peer.ask("digest") == hashlib.sha256(source).hexdigest()


@pytest.mark.parametrize("tls", TRANSPORTS)
async def test_a_killed_peer_is_named_and_the_others_go_on(
    make_endpoint: MakeEndpoint, start_peer: StartPeer, tls: str | None
) -> None:
    dead, alive, writer = start_peer(1 << 20, tls), start_peer(1 << 20, tls), make_endpoint("trainer/3", tls)
    source = random_bytes(1 << 20)
    writer.register([region(source)])
    edges = []
    for peer in (dead, alive):
        writer.connect(peer.name, peer.card)
        edges.append(
            writer.prepare_edge(
                peer.name, [region(source)], [peer.region], whole(1 << 20), describe=lambda r, o: "embed.weight"
            )
        )
    await warmed(writer, dead.name, alive.name)
    dead.process.kill()
    dead.process.wait()
    lost, sent = await writer.write(edges, deadline_seconds=PATIENCE)
    error = lost.error
    assert isinstance(error, DisconnectedError)
    assert (error.rank, error.peer, error.tensor, error.bytes_done) == ("trainer/3", dead.name, "embed.weight", 0)
    assert (error.fault, error.retry) == ("engine", True)
    assert sent.error is None
    assert alive.ask("digest") == hashlib.sha256(source).hexdigest()
    assert not writer.tainted_peers, "what was refused is not in flight"
    assert [edge.broken for edge in edges] == [True, False]
    [again] = await writer.write(edges[:1], deadline_seconds=PATIENCE)
    assert isinstance(again.error, DisconnectedError)
    writer.forget(dead.name)

    async def connected_again() -> None:
        writer.connect(dead.name, dead.card)
        await warmed(writer, dead.name)

    # Whether anybody is there is seen at once in shared memory; over TCP it is not waited for.
    with pytest.raises(DisconnectedError if tls else ConnectError):
        await connected_again()
    writer.forget(dead.name)
    with pytest.raises(NixlError, match="is not connected"):
        writer.warm(dead.name)


async def test_a_restarted_peer_is_reached_under_its_new_name(
    make_endpoint: MakeEndpoint, start_peer: StartPeer
) -> None:
    writer, source = make_endpoint(), random_bytes(1 << 20)
    writer.register([region(source)])
    for _ in range(2):
        peer = start_peer(1 << 20)
        writer.connect(peer.name, peer.card)
        edge = writer.prepare_edge(peer.name, [region(source)], [peer.region], whole(1 << 20))
        succeeded(await writer.write([edge], deadline_seconds=PATIENCE))
        assert peer.ask("digest") == hashlib.sha256(source).hexdigest()
        peer.process.kill()
        peer.process.wait()
        writer.forget(peer.name)


async def test_a_stopped_peer_ends_at_the_deadline_and_taints_until_done(
    make_endpoint: MakeEndpoint, start_peer: StartPeer
) -> None:
    stopped, alive, writer = start_peer(8 << 20, "tcp"), start_peer(8 << 20, "tcp"), make_endpoint("writer", "tcp")
    source = random_bytes(8 << 20)
    writer.register([region(source)])
    edges = []
    for peer in (stopped, alive):
        writer.connect(peer.name, peer.card)
        edges.append(
            writer.prepare_edge(peer.name, [region(source)], [peer.region], whole(8 << 20), chunk_bytes=1 << 20)
        )
    await warmed(writer, stopped.name, alive.name)
    stopped.process.send_signal(signal.SIGSTOP)
    stuck, sent = await writer.write(edges, deadline_seconds=1.0)
    assert sent.error is None
    assert alive.ask("digest") == hashlib.sha256(source).hexdigest()
    assert isinstance(stuck.error, DeadlineError)
    assert (stuck.error.peer, stuck.error.fault, stuck.error.retry) == (stopped.name, "network", True)
    assert stopped.name in writer.tainted_peers
    writer.poll()
    assert stopped.name in writer.tainted_peers
    [refused] = await writer.write(edges[:1], deadline_seconds=PATIENCE)
    assert isinstance(refused.error, TransferError)
    assert "has not ended" in refused.error.reason

    stopped.process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(PATIENCE):
        while writer.tainted_peers:
            writer.poll()
            await asyncio.sleep(0.001)
    succeeded(await writer.write(edges, deadline_seconds=PATIENCE))
    assert stopped.ask("digest") == hashlib.sha256(source).hexdigest()


async def test_a_tainted_edge_that_is_released_still_taints(make_endpoint: MakeEndpoint, start_peer: StartPeer) -> None:
    peer, writer, source = start_peer(1 << 20, "tcp"), make_endpoint("writer", "tcp"), random_bytes(1 << 20)
    writer.register([region(source)])
    writer.connect(peer.name, peer.card)
    edge = writer.prepare_edge(peer.name, [region(source)], [peer.region], whole(1 << 20))
    await warmed(writer, peer.name)
    peer.process.send_signal(signal.SIGSTOP)
    await writer.write([edge], deadline_seconds=0.1)
    writer.release_edge(edge)
    writer.poll()
    assert peer.name in writer.tainted_peers
    peer.process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(PATIENCE):
        while writer.tainted_peers:
            writer.poll()
            await asyncio.sleep(0.001)
    assert peer.ask("digest") == hashlib.sha256(source).hexdigest()


async def test_a_cancelled_write_still_taints(make_endpoint: MakeEndpoint, start_peer: StartPeer) -> None:
    peer, writer, source = start_peer(1 << 20, "tcp"), make_endpoint("writer", "tcp"), random_bytes(1 << 20)
    writer.register([region(source)])
    writer.connect(peer.name, peer.card)
    edge = writer.prepare_edge(peer.name, [region(source)], [peer.region], whole(1 << 20))
    await warmed(writer, peer.name)
    peer.process.send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await writer.write([edge], deadline_seconds=PATIENCE)
    assert list(writer.tainted_peers) == [peer.name]


@pytest.mark.parametrize("tls", TRANSPORTS)
async def test_closing_does_not_wait_for_a_stopped_peer(
    make_endpoint: MakeEndpoint, start_peer: StartPeer, tls: str | None
) -> None:
    peer, writer, source = start_peer(1 << 20, tls), make_endpoint("writer", tls), random_bytes(1 << 20)
    writer.register([region(source)])
    writer.connect(peer.name, peer.card)
    edge = writer.prepare_edge(peer.name, [region(source)], [peer.region], whole(1 << 20))
    await warmed(writer, peer.name)
    peer.process.send_signal(signal.SIGSTOP)
    await writer.write([edge], deadline_seconds=0.1)
    writer.close()
    writer.poll()


# ------------------------------------------------------------------------------------------------- what is refused
def test_torn_metadata_is_refused_before_nixl_sees_it(make_endpoint: MakeEndpoint) -> None:
    writer, target = make_endpoint("writer"), make_endpoint("target")
    card = target.metadata()
    flipped = card[:-1] + bytes([card[-1] ^ 1])
    for torn in (card[:-1], card[: len(card) // 2], b"", flipped):
        with pytest.raises(MetadataError, match="torn") as caught:
            writer.connect(target.name, torn)
        assert not caught.value.retry, "only another card helps"
    with pytest.raises(MetadataError, match="is that of"):
        writer.connect("somebody", card)
    writer.connect(target.name, card)
    writer.connect(target.name, card)


async def test_regions_registered_later_travel_with_newer_metadata(make_endpoint: MakeEndpoint) -> None:
    writer, target = make_endpoint("writer"), make_endpoint("target")
    source, sink = random_bytes(4096), np.zeros(4096, dtype=np.uint8)
    writer.register([region(source)])
    writer.connect(target.name, target.metadata())
    with pytest.raises(NixlError, match="registered"):
        writer.prepare_edge(target.name, [region(source)], [region(sink)], whole(4096))
    target.register([region(sink)])
    writer.connect(target.name, target.metadata())
    edge = writer.prepare_edge(target.name, [region(source)], [region(sink)], whole(4096))
    async with polling(target):
        succeeded(await writer.write([edge], deadline_seconds=PATIENCE))
    assert np.array_equal(source, sink)


def test_ranges_that_must_not_be_registered(make_endpoint: MakeEndpoint) -> None:
    endpoint, memory = make_endpoint(), random_bytes(8192)
    base = int(memory.ctypes.data)
    endpoint.register([Region(base, 4096)])
    with pytest.raises(RegionError, match="overlaps"):
        endpoint.register([Region(base + 4000, 1000)])
    with pytest.raises(RegionError, match="overlaps"):
        endpoint.register([Region(base + 4096, 100), Region(base + 4100, 100)])
    with pytest.raises(RegionError, match="not mapped"):
        endpoint.register([Region(4096, 100)])
    with pytest.raises(RegionError, match="not mapped"):
        endpoint.register([Region(base + 4096, 1 << 44)])
    with pytest.raises(RegionError, match="empty"):
        endpoint.register([Region(base + 4096, 0)])
    endpoint.register([Region(base + 4096, 4096)])


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ([0, 0, 0, 0, 0, 4097], "local region 0"),
        ([0, 0, 0, 0, 4000, 97], "remote region 0"),
        ([0, 0, -1, 0, 0, 1], "local region 0"),
        ([0, 0, 0, 0, 0, 0], "local region 0"),
        ([0, 1, 0, 0, 0, 1], "local regions"),
        ([0, 0, 0, 2, 0, 1], "remote regions"),
    ],
)
def test_runs_outside_their_regions_are_refused(make_endpoint: MakeEndpoint, run: list[int], words: str) -> None:
    writer, target = make_endpoint("writer"), make_endpoint("target")
    source, sink = random_bytes(4096), np.zeros(4096, dtype=np.uint8)
    writer.register([region(source)])
    target.register([region(sink)])
    writer.connect(target.name, target.metadata())
    with pytest.raises(EdgeError, match=words):
        writer.prepare_edge(target.name, [region(source)], [region(sink)], np.array([run]))


def test_an_unknown_peer_or_backend_is_refused(make_endpoint: MakeEndpoint) -> None:
    with pytest.raises(NixlError, match="is not connected"):
        make_endpoint().prepare_edge("nobody", [], [], np.empty((0, 6)))
    with pytest.raises(NixlError, match="NO_SUCH"):
        NixlEndpoint("writer", NixlSettings(backends=("NO_SUCH",)))


async def test_an_edge_without_runs_has_nothing_to_do(make_endpoint: MakeEndpoint) -> None:
    writer, target = make_endpoint("writer"), make_endpoint("target")
    writer.connect(target.name, target.metadata())
    edge = writer.prepare_edge(target.name, [], [], np.empty((0, 6)))
    [result] = await writer.write([edge], deadline_seconds=PATIENCE)
    assert (result.bytes, result.error, result.descriptors) == (0, None, 0)


def test_closing_and_forgetting_again_does_nothing(make_endpoint: MakeEndpoint) -> None:
    writer, target = make_endpoint("writer"), make_endpoint("target")
    writer.connect(target.name, target.metadata())
    writer.forget(target.name)
    writer.forget(target.name)
    writer.close()
    writer.close()


def test_each_incarnation_has_its_own_name() -> None:
    first, second = NixlEndpoint("trainer/0", NixlSettings()), NixlEndpoint("trainer/0", NixlSettings())
    assert first.name.startswith("trainer/0-")
    assert first.name != second.name
    first.close()
    second.close()
