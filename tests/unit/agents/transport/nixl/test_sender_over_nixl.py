"""Several writes of one sender at a time, and connections that are made anew meanwhile, over real NIXL into other
processes."""

import asyncio
import contextlib
import signal

import pytest
from landing_fleet import CHUNK, CHUNKS, PATIENCE, fleet, until
from row_parallel import masters
from weightsync.agents.transport.nixl import sender as senders
from weightsync.orchestrator.protocol.names import RoundName

__all__ = ["fleet"]

BYTES = 2 * CHUNK * CHUNKS
"""Of one source, to each of two targets."""


@pytest.fixture
async def pair(fleet, monkeypatch):
    """One sender and two readers, over TCP; a first word is waited for until the test is over."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(senders, "FIRST_WORD_SECONDS", 3600.0)
    made = fleet(1, 2, 2048, 1024, lands="flip")
    await made.connect()
    return made


class Writing:
    """A write to one reader, of a round of its own."""

    def __init__(self, fleet, number, peer, seconds=PATIENCE):
        self.fleet, self.number, self.peer, self.seconds = fleet, number, peer, seconds
        self.end = None

    async def begin(self):
        await self.peer.ask("begin", 1, self.number)
        write = self.fleet.senders[0].write(RoundName(1, self.number), [self.peer.member], self.seconds, self._told)
        self.task = asyncio.create_task(write)
        return self

    def _told(self, end):
        assert self.end is None, "each end is told once"
        self.end = end

    async def arrived(self, weights):
        await self.task
        assert (self.end.error, self.end.bytes) == ("", BYTES)
        self.fleet.round = self.number
        await self.fleet.arrived(weights, self.peer)


async def severed_and_stopped(fleet, weights):
    """A write whose reader has lost its connections and stands still: another one is being made."""
    await fleet.begin(weights, peers=())
    await fleet.peers[0].ask("SEVER", 30)
    await fleet.peers[0].ask("SIGSTOP", 30)
    hangs = await Writing(fleet, 1, fleet.peers[0], seconds=600.0).begin()
    await fleet.peers[0].has_stopped()
    await until(lambda: fleet.senders[0]._writes[0].broken)
    return hangs


async def given_up(fleet, hangs):
    fleet.senders[0].stop([hangs.peer.member], "the round is over")
    assert hangs.end is not None, "there is nothing in flight to it, so that is known at once"
    assert hangs.end.error
    hangs.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await hangs.task


@pytest.mark.parametrize("breaks", [False, True])
async def test_while_a_reader_hangs_in_one_round_another_one_catches_up_in_another(pair, breaks):
    weights = masters(1)
    await pair.begin(weights, peers=())
    await pair.peers[0].ask("SIGSTOP", 30)
    if breaks:
        await pair.peers[1].ask("SEVER", 40)
    hangs = await Writing(pair, 1, pair.peers[0], seconds=600.0).begin()
    await pair.peers[0].has_stopped()
    catches_up = await Writing(pair, 2, pair.peers[1]).begin()
    await catches_up.arrived(weights)
    assert not hangs.task.done()
    pair.senders[0].stop([pair.peers[0].member], "the round is over")
    await hangs.task


async def test_a_connection_is_made_anew_while_that_of_another_round_waits_for_a_reader_that_hangs(pair):
    weights = masters(2)
    hangs = await severed_and_stopped(pair, weights)
    await pair.peers[1].ask("SEVER", 40)
    catches_up = await Writing(pair, 2, pair.peers[1]).begin()
    await catches_up.arrived(weights)
    assert hangs.end is None
    await given_up(pair, hangs)


async def test_a_connection_that_breaks_twice_in_one_write_costs_nobody_the_round(pair, monkeypatch):
    """Nor is what is packed laid out again, which takes seconds for a large plan."""
    weights = masters(3)
    monkeypatch.setattr(senders, "make_cargo", None)
    await pair.begin(weights)
    for chunk in (30, 60):
        await pair.peers[1].ask("SEVER", chunk)
    ends = await pair.write()
    assert {(end.error, end.bytes) for end in ends.values()} == {("", BYTES)}
    for peer in pair.peers:
        await pair.arrived(weights, peer)


async def test_a_reader_that_is_killed_while_its_connection_is_made_anew_is_named(pair):
    weights = masters(4)
    hangs = await severed_and_stopped(pair, weights)
    pair.peers[0].process.kill()
    await hangs.task
    assert hangs.end.error
    assert 0 < hangs.end.bytes < BYTES
    catches_up = await Writing(pair, 2, pair.peers[1]).begin()
    await catches_up.arrived(weights)


async def test_another_plan_does_not_wait_for_a_connection_that_is_made_anew(pair):
    """Nor does the write that makes it bring the plan before back."""
    weights, [sender] = masters(5), pair.senders
    hangs = await severed_and_stopped(pair, weights)
    [gone, stays] = pair.shares[0].replan(pair.plan[pair.ranks[0].member])
    assert await sender.connect([stays]) == {}
    await hangs.task
    assert hangs.end.error
    assert list(sender._shares) == [stays.peer.member]
    await (await Writing(pair, 2, pair.peers[1]).begin()).arrived(weights)
    pair.peers[0].process.send_signal(signal.SIGCONT)
    assert await sender.connect([gone, stays]) == {}
    await (await Writing(pair, 3, pair.peers[0]).begin()).arrived(weights)


async def test_a_sender_is_closed_while_a_connection_is_made_anew(pair):
    """And while another reader of the same write hangs."""
    await pair.begin(masters(6))
    for word in ("SEVER", "SIGSTOP"):
        await pair.peers[0].ask(word, 30)
    await pair.peers[1].ask("SIGSTOP", 30)
    write = asyncio.create_task(pair.write(seconds=600.0))
    for peer in pair.peers:
        await peer.has_stopped()
    await until(lambda: pair.senders[0]._writes[0].broken)
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing of the write is left"
    pair.senders[0].close()
