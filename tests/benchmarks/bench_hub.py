"""Control-plane benchmark: two-round rendezvous and barrier over the hub, and over vLLM's StatelessProcessGroup.

    python tests/benchmarks/bench_hub.py [--agents 16 64 …] [--tls 1024 …] [--stable 4096 …] [--without-spg]

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
* ``hub_tls_…``: the same with TLS 1.3, for the numbers of agents in ``--tls``. ``hub_tls_over_plain_rendezvous_N`` and
  ``…_barrier_N``: what TLS makes of a rendezvous and of a barrier's median, each repeat beside one without TLS.
* ``hub_agents_stable_N``: agents that came through the daemon's own door, all from one address, as soon as it lets
  them, and were still there, on their first connection, STAY_SECONDS after the last had come;
  ``hub_agents_come_N_seconds``: until then. ``hub_tls_agents_…`` with TLS.
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
import os
import ssl
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import numpy as np
import structlog
from hub_processes import SETUP_SECONDS, Child, Pipe, allow_sockets, closed
from ports import free_port
from weightsync.agents.link.client import ControlClient
from weightsync.agents.link.connection import DaemonConnection
from weightsync.agents.link.tls import CA_VARIABLE, tls_context
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, AgentSaid, Event
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.door import DoorLimits
from weightsync.orchestrator.daemon.access.pace import PaceLimits
from weightsync.orchestrator.daemon.access.tls import ServerTls
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
from weightsync.orchestrator.settings.sections import ListenTls

RUN: Final = "bench"
LAYOUT_BYTES: Final = 20_000
HEARTBEAT_SECONDS: Final = 5.0
LOST_AFTER_HEARTBEATS: Final = 4
AGENTS: Final = (16, 64, 128, 256, 1024, 4096)
WITH_TLS: Final = (1024, 4096)
STABLE: Final = (4096,)
SPG_RANKS: Final = (16, 64, 128)
GROWTH_FROM: Final = 64
REPEATS: Final = 5
REPEATS_OF_MANY: Final = 3
MANY: Final = 2048
"""Agents from which there are fewer repeats: connecting them takes longer than what is measured."""

BARRIERS_PER_REPEAT: Final = 100
SPG_REPEATS: Final = 3

STAY_SECONDS: Final = 3 * HEARTBEAT_SECONDS * LOST_AFTER_HEARTBEATS
"""Three times as long as a silent agent may stay."""

COME_SECONDS: Final = 300.0

VERSION: Final = Version(1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="*", default=AGENTS)
    parser.add_argument("--without-spg", action="store_true")
    parser.add_argument("--tls", type=int, nargs="*", default=WITH_TLS)
    parser.add_argument("--stable", type=int, nargs="*", default=STABLE)
    options = parser.parse_args()
    rendezvous: dict[int, float] = {}
    barriers: dict[int, float] = {}
    for agents in options.agents:
        rendezvous[agents], barriers[agents] = report_hub("hub", agents, measure_hub(agents))
    both = {agents: rendezvous[agents] + barriers[agents] / 1e3 for agents in rendezvous}
    for agents in options.tls:
        report_tls(agents)
    for agents in options.stable:
        for prefix, with_tls in (("hub", False), ("hub_tls", True)):
            seconds, stable = measure_stay(agents, with_tls)
            report(f"{prefix}_agents_come_{agents}_seconds", [seconds], "s")
            report(f"{prefix}_agents_stable_{agents}", [stable], "agents")
    growing = {agents: seconds for agents, seconds in rendezvous.items() if agents >= GROWTH_FROM}
    if len(growing) > 1:
        report("hub_growth_exponent", [slope(growing)], "1", len(growing))
    for ranks in [] if options.without_spg else [n for n in SPG_RANKS if n in both]:
        gathers, barriers = measure_spg(ranks)
        report(f"spg_all_gather_{ranks}_seconds", gathers, "s")
        report(f"spg_barrier_{ranks}_seconds", barriers, "s")
        sums = [gather + barrier for gather, barrier in zip(gathers, barriers, strict=True)]
        report(f"hub_over_spg_{ranks}", [seconds / both[ranks] for seconds in sums], "x")


def report_tls(agents: int) -> None:
    """Print all figures with TLS, and their ratios to those without it that were measured in turns with them."""
    plain, tls = HubResult([], [], []), HubResult([], [], [])
    for _ in range(repeats_of(agents)):
        measure_once(plain, agents, with_tls=False)
        measure_once(tls, agents, with_tls=True)
    report_hub("hub_tls", agents, tls)
    ratios = [above / below for above, below in zip(tls.rendezvous, plain.rendezvous, strict=True)]
    report(f"hub_tls_over_plain_rendezvous_{agents}", ratios, "x")
    pairs = zip(tls.barriers, plain.barriers, strict=True)
    ratios = [statistics.median(above) / statistics.median(below) for above, below in pairs]
    report(f"hub_tls_over_plain_barrier_{agents}", ratios, "x")


def report_hub(prefix: str, agents: int, result: "HubResult") -> tuple[float, float]:
    """Print all figures of one number of agents; rendezvous in seconds, median barrier in ms."""
    rendezvous = report(f"{prefix}_rendezvous_{agents}_seconds", result.rendezvous, "s")
    barrier = report_barriers(f"{prefix}_barrier_{agents}_p50_ms", result.barriers, 50)
    report_barriers(f"{prefix}_barrier_{agents}_p99_ms", result.barriers, 99)
    report_barriers(f"{prefix}_barrier_{agents}_span_p50_ms", result.spans, 50)
    return rendezvous, barrier


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


def repeats_of(agents: int) -> int:
    return REPEATS if agents < MANY else REPEATS_OF_MANY


def measure_hub(agents: int) -> HubResult:
    result = HubResult([], [], [])
    for _ in range(repeats_of(agents)):
        measure_once(result, agents, with_tls=False)
    return result


def measure_once(result: HubResult, agents: int, with_tls: bool) -> None:
    """One repeat more in ``result``."""
    with tempfile.TemporaryDirectory() as directory:
        files = Files.made(Path(directory), with_tls)
        with Child(serve, files, agents) as daemon:
            port = daemon.receive()
            with Child(live, files, agents, port) as fleet:
                first_hello, barriers = fleet.receive()
                result.rendezvous.append(daemon.receive() - first_hello)
                result.barriers.append([barrier for barrier, _ in barriers])
                result.spans.append([span for _, span in barriers])


def measure_stay(agents: int, with_tls: bool) -> tuple[float, float]:
    """Seconds until all have come through the ordinary door, and how many of them stay."""
    with tempfile.TemporaryDirectory() as directory:
        files = Files.made(Path(directory), with_tls)
        with Child(serve, files, agents, None) as daemon, Child(stay, files, agents, daemon.receive()) as fleet:
            come, stable = fleet.receive(COME_SECONDS + 2 * STAY_SECONDS)
            return come, stable


@dataclass(frozen=True)
class Files:
    """A run's credentials, and its certificates where there is TLS."""

    token_file: Path
    certificates: Path | None

    @classmethod
    def made(cls, directory: Path, with_tls: bool) -> "Files":
        make_tokens(directory / "credentials")
        if with_tls:
            make_certificates(directory / "certificates", ["127.0.0.1"], (), 2)
        return cls(directory / "credentials" / "engine.token", directory / "certificates" if with_tls else None)

    def of_daemon(self) -> ServerTls | None:
        files = self.certificates
        if files is None:
            return None
        return ServerTls(
            ListenTls(certificate_file=files / "daemon.pem", key_file=files / "daemon.key", ca_file=files / "ca.pem")
        )

    def url(self, port: int) -> str:
        return f"{'ws' if self.certificates is None else 'wss'}://127.0.0.1:{port}{AGENTS_PATH}"

    def of_agents(self, port: int) -> ssl.SSLContext | None:
        """One for all agents of this process, each of which has one of its own in a fleet."""
        if self.certificates is not None:
            os.environ[CA_VARIABLE] = str(self.certificates / "ca.pem")
        return tls_context(self.url(port))


ALL_AT_ONCE = DoorLimits(
    strangers=1 << 20, from_one_address=1 << 20, stranger_seconds=SETUP_SECONDS, pace=PaceLimits(burst=1 << 20)
)
"""Here all agents connect first and say their Hello at one moment, from one address."""


def serve(pipe: Pipe, files: Files, agents: int, limits: DoorLimits | None = ALL_AT_ONCE) -> None:
    """The daemon's process: says its port, then when it held the last Ready; ends with the pipe.

    ``limits``: of its door; None: the daemon's own.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    allow_sockets(agents)
    asyncio.run(Coordinator(pipe, agents).serve(files, limits))


class Coordinator:
    """The least that a core has to decide: everybody is welcome, the last one opens the next step."""

    def __init__(self, pipe: Pipe, agents: int) -> None:
        self._pipe = pipe
        self._agents = agents
        self._announced: dict[Member, Announce] = {}
        self._ready = 0
        self._barriers = 0
        self._hub: Hub | None = None

    async def serve(self, files: Files, limits: DoorLimits | None) -> None:
        timing = HubTiming(HEARTBEAT_SECONDS, LOST_AFTER_HEARTBEATS, SETUP_SECONDS, CLOSE_SECONDS)
        next_id = itertools.count(1).__next__
        self._hub = Hub(
            access=Access(files.token_file.parent, RUN, str, files.of_daemon(), limits),
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
        elif isinstance(event, AgentLost) and self._announced and not self._ready:
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


def live(pipe: Pipe, files: Files, agents: int, port: int) -> None:
    """The agents' process: says when the first Hello went out, and how long each barrier took."""
    allow_sockets(agents)
    # Every agent is a process of its own in a fleet, which buffers of many agents in one process must not slow down.
    asyncio.selector_events._SelectorTransport.max_size = READ_BYTES  # type: ignore[attr-defined]
    asyncio.run(Fleet(pipe, agents).live(files, port))


def stay(pipe: Pipe, files: Files, agents: int, port: int) -> None:
    """The agents' process: says when all had come, and how many of them stayed."""
    allow_sockets(agents)
    asyncio.run(Fleet(pipe, agents).stay(files, port))


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
        self._clients: list[ControlClient] = []

    async def live(self, files: Files, port: int) -> None:
        gate = Gate(self._agents)
        tls = files.of_agents(port)
        for rank in range(self._agents):
            client = GatedClient(
                files.url(port), files.token_file, self._hello(rank), self._answers(rank), connect_seconds=SETUP_SECONDS
            )
            client.gate, client._tls = gate, tls
            self._clients.append(client)
        runs = [asyncio.create_task(client.run()) for client in self._clients]
        await self._released.wait()  # The hub answers the last Ready of the rendezvous as it does a barrier's.
        gc.freeze()  # a process of its own, as agents are, has no other agents' objects to walk
        barriers = [await self._barrier() for _ in range(BARRIERS_PER_REPEAT)]
        self._pipe.send((gate.opened_at, barriers))
        await closed(self._pipe)
        await asyncio.gather(*(client.close() for client in self._clients))
        await asyncio.gather(*runs)

    async def stay(self, files: Files, port: int) -> None:
        welcomes: Counter[int] = Counter()
        all_came = asyncio.Event()

        def on_message(rank: int) -> Callable[[FromDaemon], None]:
            def hear(message: FromDaemon) -> None:
                if type(message) is Welcome:
                    welcomes[rank] += 1
                    if len(welcomes) == self._agents:
                        all_came.set()

            return hear

        tls, began = files.of_agents(port), time.monotonic()
        for rank in range(self._agents):
            client = ControlClient(files.url(port), files.token_file, self._hello(rank), on_message(rank))
            client._tls = tls
            self._clients.append(client)
        runs = [asyncio.create_task(client.run()) for client in self._clients]
        async with asyncio.timeout(COME_SECONDS):
            await all_came.wait()
        come = time.monotonic() - began
        await asyncio.sleep(STAY_SECONDS)
        stable = sum(welcomes[rank] == 1 and client.connected for rank, client in enumerate(self._clients))
        self._pipe.send((come, stable))
        await closed(self._pipe)
        await asyncio.gather(*(client.close() for client in self._clients))
        await asyncio.gather(*runs)

    def _hello(self, rank: int) -> Callable[[], Hello]:
        member = Member("inference", "engine", rank)
        hello = Hello(schema=SCHEMA_VERSION, run_id=RUN, member=member, world=self._agents, incarnation=rank)
        return lambda: hello

    def _answers(self, rank: int) -> Callable[[FromDaemon], None]:
        def on_message(message: FromDaemon) -> None:
            if type(message) is Outcome:
                self._outcomes += 1
                if self._outcomes == self._agents:
                    self._released.set()
            elif type(message) is Connect:
                self._clients[rank].send(READY)
            elif type(message) is Welcome:
                self._clients[rank].send(self._announce)

        return on_message

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
    port = free_port()
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
