"""Control-plane benchmark: two-round rendezvous and barrier over the hub, and over vLLM's StatelessProcessGroup.

    python tests/benchmarks/bench_hub.py [--agents 16 64 …] [--without-spg]

Prints one JSON line per figure. The daemon's hub runs in one process and every agent as a real ControlClient in
another, on loopback, with tokens, heartbeats and a layout of LAYOUT_BYTES each.

* ``hub_rendezvous_N_seconds``: from the first Hello (all sockets are connected) until the hub holds the last Ready:
  Hello → Welcome → Announce, and when the last has come, Connect (each agent its own) → Ready.
* ``hub_barrier_N_p50_ms``, ``…_p99_ms``: what a barrier adds to the slowest participant, from the last agent's Ready
  until the last agent has the hub's Outcome. ``hub_barrier_N_span_p50_ms``: from the first agent's Ready; it contains
  the time that one process needs to speak for N agents, one after the other.
* ``hub_over_spg_N``: all_gather_obj of LAYOUT_BYTES per rank and barrier of the StatelessProcessGroup, one process per
  rank, each from the last rank's entry to the last rank's exit, over the hub's two rounds and barrier; both when all
  are connected.
* ``hub_growth_exponent``: slope of log(rendezvous seconds) over log(N), least squares, from GROWTH_FROM agents on.

``n`` counts repeats, ``spread`` is the largest minus the smallest of the repeats' values, ``value`` their median.
"""

import argparse
import asyncio
import gc
import itertools
import json
import logging
import math
import multiprocessing
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import numpy as np
import structlog
from hub_processes import SETUP_SECONDS, Child, Pipe, allow_sockets, closed
from weightsync.agents.link.client import ControlClient
from weightsync.agents.link.connection import DaemonConnection
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, AgentSaid, Event
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.door import DoorLimits
from weightsync.orchestrator.daemon.access.pace import PaceLimits
from weightsync.orchestrator.daemon.hub.connection import CLOSE_SECONDS, READ_BYTES, HubTiming
from weightsync.orchestrator.daemon.hub.hub import AGENTS_PATH, Hub
from weightsync.orchestrator.protocol.codec import encode
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.layout import ROW_COLUMNS, Layout, Region, Tensor
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Connect,
    FromDaemon,
    Hello,
    HubRendezvous,
    NixlSettings,
    Outcome,
    Ready,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, Version
from weightsync.orchestrator.protocol.proof import Challenge
from weightsync.orchestrator.settings.credentials import make_tokens

RUN: Final = "bench"
LAYOUT_BYTES: Final = 20_000
HEARTBEAT_SECONDS: Final = 5.0
LOST_AFTER_HEARTBEATS: Final = 4
AGENTS: Final = (16, 64, 128, 256, 1024, 4096)
SPG_RANKS: Final = (16, 64, 128)
GROWTH_FROM: Final = 64
REPEATS: Final = 5
REPEATS_OF_MANY: Final = 3
MANY: Final = 2048
"""Agents from which there are fewer repeats: connecting them takes longer than what is measured."""

BARRIERS_PER_REPEAT: Final = 100
SPG_REPEATS: Final = 3

VERSION: Final = Version(1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=AGENTS)
    parser.add_argument("--without-spg", action="store_true")
    options = parser.parse_args()
    rendezvous: dict[int, float] = {}
    both: dict[int, float] = {}
    for agents in options.agents:
        result = measure_hub(agents)
        rendezvous[agents] = report(f"hub_rendezvous_{agents}_seconds", result.rendezvous, "s")
        p50 = report_barriers(f"hub_barrier_{agents}_p50_ms", result.barriers, 50)
        report_barriers(f"hub_barrier_{agents}_p99_ms", result.barriers, 99)
        report_barriers(f"hub_barrier_{agents}_span_p50_ms", result.spans, 50)
        both[agents] = rendezvous[agents] + p50 / 1e3
    growing = {agents: seconds for agents, seconds in rendezvous.items() if agents >= GROWTH_FROM}
    if len(growing) > 1:
        report("hub_growth_exponent", [slope(growing)], "1", len(growing))
    for ranks in [] if options.without_spg else [n for n in SPG_RANKS if n in both]:
        gathers, barriers = measure_spg(ranks)
        report(f"spg_all_gather_{ranks}_seconds", gathers, "s")
        report(f"spg_barrier_{ranks}_seconds", barriers, "s")
        sums = [gather + barrier for gather, barrier in zip(gathers, barriers, strict=True)]
        report(f"hub_over_spg_{ranks}", [seconds / both[ranks] for seconds in sums], "x")


def report(figure: str, values: list[float], unit: str, n: int | None = None) -> float:
    """Print one figure and return its value, the median of ``values``."""
    value = statistics.median(values)
    line = {
        "figure": figure,
        "value": round(value, 6),
        "unit": unit,
        "n": len(values) if n is None else n,
        "spread": round(max(values) - min(values), 6),
    }
    print(json.dumps(line), flush=True)
    return value


def report_barriers(figure: str, repeats: list[list[float]], percent: float) -> float:
    """One percentile of barriers' seconds, in milliseconds: the median over the repeats of each one's percentile."""
    values = [1e3 * float(np.percentile(repeat, percent)) for repeat in repeats]
    return report(figure, values, "ms", sum(len(repeat) for repeat in repeats))


def slope(seconds: dict[int, float]) -> float:
    logs = [(math.log(agents), math.log(value)) for agents, value in seconds.items()]
    return float(np.polyfit([x for x, _ in logs], [y for _, y in logs], 1)[0])


# ------------------------------------------------------------------------------------------------------------ the hub
@dataclass(frozen=True)
class HubResult:
    """Seconds of each repeat's rendezvous, and of its barriers from the last Ready and from the first."""

    rendezvous: list[float]
    barriers: list[list[float]]
    spans: list[list[float]]


def measure_hub(agents: int) -> HubResult:
    result = HubResult([], [], [])
    for _ in range(REPEATS if agents < MANY else REPEATS_OF_MANY):
        with tempfile.TemporaryDirectory() as directory:
            token_file = Path(directory, "engine.token")
            make_tokens(token_file.parent)
            with Child(serve, token_file, agents) as daemon:
                port = daemon.receive()
                with Child(live, token_file, agents, port) as fleet:
                    first_hello, barriers = fleet.receive()
                    result.rendezvous.append(daemon.receive() - first_hello)
                    result.barriers.append([barrier for barrier, _ in barriers])
                    result.spans.append([span for _, span in barriers])
    return result


ALL_AT_ONCE = DoorLimits(
    strangers=1 << 20, from_one_address=1 << 20, stranger_seconds=SETUP_SECONDS, pace=PaceLimits(burst=1 << 20)
)
"""Here all agents connect first and say their Hello at one moment, from one address."""


def serve(pipe: Pipe, token_file: Path, agents: int) -> None:
    """The daemon's process: says its port, then when it held the last Ready; ends with the pipe."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    allow_sockets(agents)
    asyncio.run(Coordinator(pipe, agents).serve(token_file))


class Coordinator:
    """The least that a core has to decide: everybody is welcome, the last one opens the next step."""

    def __init__(self, pipe: Pipe, agents: int) -> None:
        self._pipe = pipe
        self._agents = agents
        self._announced: dict[Member, Announce] = {}
        self._ready = 0
        self._barriers = 0
        self._hub: Hub | None = None

    async def serve(self, token_file: Path) -> None:
        timing = HubTiming(HEARTBEAT_SECONDS, LOST_AFTER_HEARTBEATS, SETUP_SECONDS, CLOSE_SECONDS)
        next_id = itertools.count(1).__next__
        self._hub = Hub(
            access=Access(token_file.parent, RUN, str, None, ALL_AT_ONCE),
            post=self.on_event,
            next_id=next_id,
            timing=timing,
        )
        self._pipe.send(await self._hub.start("127.0.0.1", 0))
        await closed(self._pipe)
        await self._hub.close()

    def on_event(self, event: Event) -> None:
        assert self._hub is not None
        if isinstance(event, AgentSaid):
            if isinstance(event.message, Ready):
                self._one_ready()
            elif isinstance(event.message, Announce):
                self._announced[event.member] = event.message
                if len(self._announced) == self._agents:
                    self._connect_all()
        elif isinstance(event, AgentConnected):
            self._hub.accept(event.member, event.connection, WELCOME)
        elif isinstance(event, AgentLost) and not self._ready:
            raise RuntimeError(f"lost {event.member}: {event.reason}")

    def _connect_all(self) -> None:
        assert self._hub is not None
        for member, announce in self._announced.items():
            peer = Peer(member, 1, announce.endpoint_name, announce.endpoint, announce.layout.regions)
            copies = bytes(2048)
            self._hub.send(
                member, Connect(fingerprint="f", root="r", peers=(peer,) * 4, copies=copies, expected_bytes=1)
            )

    def _one_ready(self) -> None:
        assert self._hub is not None
        self._ready += 1
        if self._ready % self._agents:
            return
        if self._ready == self._agents:
            self._pipe.send(time.monotonic())
            gc.freeze()  # as the daemon does when its fleet has met
        outcome = Outcome(version=VERSION, committed=True)
        for member in self._announced:
            self._hub.send(member, outcome)


WELCOME: Final = Welcome(
    epoch=1,
    journal_id="bench",
    heartbeat_seconds=HEARTBEAT_SECONDS,
    lost_after_heartbeats=LOST_AFTER_HEARTBEATS,
    transport=NixlSettings(),
    rendezvous=HubRendezvous(),
)


def live(pipe: Pipe, token_file: Path, agents: int, port: int) -> None:
    """The agents' process: says when the first Hello went out, and how long each barrier took."""
    allow_sockets(agents)
    # Every agent is a process of its own in a fleet, which buffers of many agents in one process must not slow down.
    asyncio.selector_events._SelectorTransport.max_size = READ_BYTES  # type: ignore[attr-defined]
    asyncio.run(Fleet(pipe, agents).live(f"ws://127.0.0.1:{port}{AGENTS_PATH}", token_file))


class GatedClient(ControlClient):
    """Connects, then waits for the others before its Hello."""

    gate: "Gate"

    async def _dial(self, session: aiohttp.ClientSession) -> tuple[DaemonConnection, str, Challenge]:
        dialled = await super()._dial(session)
        await self.gate.pass_through()
        return dialled


class Gate:
    def __init__(self, agents: int) -> None:
        self._missing = agents
        self._open = asyncio.Event()
        self.opened_at = 0.0

    async def pass_through(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.opened_at = time.monotonic()
            self._open.set()
        await self._open.wait()


class Fleet:
    def __init__(self, pipe: Pipe, agents: int) -> None:
        self._pipe = pipe
        self._agents = agents
        self._outcomes = 0
        self._released = asyncio.Event()
        self._announce = announce_of(LAYOUT_BYTES)
        self._clients: list[GatedClient] = []

    async def live(self, url: str, token_file: Path) -> None:
        gate = Gate(self._agents)
        for rank in range(self._agents):
            self._clients.append(self._client(rank, url, token_file, gate))
        runs = [asyncio.create_task(client.run()) for client in self._clients]
        await self._released.wait()  # The hub answers the last Ready of the rendezvous as it does a barrier's.
        gc.freeze()  # a process of its own, as agents are, has no other agents' objects to walk
        barriers = [await self._barrier() for _ in range(BARRIERS_PER_REPEAT)]
        self._pipe.send((gate.opened_at, barriers))
        await closed(self._pipe)
        await asyncio.gather(*(client.close() for client in self._clients))
        await asyncio.gather(*runs)

    def _client(self, rank: int, url: str, token_file: Path, gate: Gate) -> GatedClient:
        member = Member("inference", "engine", rank)
        hello = Hello(schema=SCHEMA_VERSION, run_id=RUN, member=member, world=self._agents, incarnation=rank)

        def on_message(message: FromDaemon) -> None:
            if type(message) is Outcome:
                self._outcomes += 1
                if self._outcomes == self._agents:
                    self._released.set()
            elif type(message) is Connect:
                client.send(READY)
            elif type(message) is Welcome:
                client.send(self._announce)

        client = GatedClient(url, token_file, lambda: hello, on_message, connect_seconds=SETUP_SECONDS)
        client.gate = gate
        return client

    async def _barrier(self) -> tuple[float, float]:
        """Seconds from the last Ready, and from the first, until the last agent is let go."""
        self._outcomes = 0
        self._released.clear()
        first = time.monotonic()
        for client in self._clients[:-1]:
            client.send(READY)
        last = time.monotonic()
        self._clients[-1].send(READY)
        await self._released.wait()
        end = time.monotonic()
        return end - last, end - first


READY: Final = Ready(fingerprint="f")


def announce_of(size: int) -> Announce:
    """An Announce of at least ``size`` encoded bytes, half of them tensors, half rows."""
    tensors: tuple[Tensor, ...] = ()
    rows = b""
    while True:
        announce = Announce(
            layout=Layout(tensors=tensors, regions=(Region(1 << 40, 1 << 30),) * 4, rows=rows),
            endpoint_name="engine-0-1234567890123456789",
            endpoint=bytes(512),
        )
        if len(encode(announce)) >= size:
            return announce
        tensors += (Tensor(f"model.layers.{len(tensors)}.self_attn.q_proj.weight", "bfloat16", (4096, 4096)),)
        rows += bytes(8 * ROW_COLUMNS)


# ----------------------------------------------------------------------------------------- vLLM's StatelessProcessGroup
def measure_spg(ranks: int) -> tuple[list[float], list[float]]:
    """Seconds of all_gather_obj and of barrier in each repeat, from the last rank's entry to the last rank's exit."""
    with Child(run_spg, ranks) as group:
        times = np.array(group.receive())  # [ranks, repeats, 3]: start, gathered, passed the barrier
    starts, gathered, passed = times.max(axis=0).T
    return list(map(float, gathered - starts)), list(map(float, passed - gathered))


def run_spg(pipe: Pipe, ranks: int) -> None:
    """Imports vLLM once and forks one process per rank, which share its memory."""
    import vllm.distributed.utils  # noqa: F401

    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        context.Process(target=run_rank, args=(theirs, port, rank, ranks), daemon=True).start()
        theirs.close()
        pipes.append(ours)
    pipe.send([ours.recv() for ours in pipes])


def run_rank(pipe: Pipe, port: int, rank: int, ranks: int) -> None:
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create("127.0.0.1", port, rank, ranks, store_timeout=int(SETUP_SECONDS))
    payload = bytes(LAYOUT_BYTES)
    times = []
    for _ in range(SPG_REPEATS):
        group.barrier(SETUP_SECONDS)
        start = time.monotonic()
        group.all_gather_obj(payload)
        gathered = time.monotonic()
        group.barrier(SETUP_SECONDS)
        times.append((start, gathered, time.monotonic()))
    group.barrier(SETUP_SECONDS)
    pipe.send(times)


if __name__ == "__main__":
    main()
