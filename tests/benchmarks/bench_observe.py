"""What it costs to be watched: 50 open pages and a scraper, while 128 agents go through one round after the other.

    python tests/benchmarks/bench_observe.py [--windows 5] [--rounds 30]

Prints one JSON line per figure. The real daemon runs in a process of its own; agents and engines are another
(``observed_fleet``), pages and scraper a third, which reads all that it is sent. Windows of ``--rounds`` rounds with
and without watchers take turns, and what is compared is the processor time that the daemon's process used: all that it
does is done on one loop, so that this is the most by which a round can have become longer.

* ``observe_share``: processor time that watching adds, over the time of the rounds in which it was added, in percent.
* ``observe_round_ms``: a round without watchers, from staging to the last outcome; ``observe_added_ms``: what watching
  adds to the processor time of one.
* ``observe_page_kb_per_second``: what one page is sent.

``n`` counts windows with watchers, ``value`` is their median, ``spread`` the largest minus the smallest.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import aiohttp
from bench_hub import report
from fleet import Fleet
from hub_processes import Child, Pipe, allow_sockets, closed
from observed_fleet import HOST, RUN, SpokenFleet

TRAINERS, ENGINES, RANKS = 64, 16, 4
PAGES: Final = 50
SCRAPE_SECONDS: Final = 5.0
TICKS: Final = os.sysconf("SC_CLK_TCK")
WARM_ROUNDS: Final = 5

SETTINGS: Final = {
    "deadlines": {"probe_interval_seconds": 5, "heartbeat_seconds": 5},
    "commit": {"min_engines": ENGINES, "patience_seconds": 30},
    "rescan_seconds": 1,
    "log": {"format": "json"},
}


def processor_seconds(pid: int) -> float:
    """That the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def agents(pipe: Pipe, credentials: Path, url: str, run_directory: Path) -> None:
    """The fleet's process: says its engines' ports, then publishes as many versions as it is told and says how long."""
    allow_sockets(TRAINERS + ENGINES * RANKS)
    asyncio.run(_agents(pipe, credentials, url, run_directory))


async def _agents(pipe: Pipe, credentials: Path, url: str, run_directory: Path) -> None:
    fleet = SpokenFleet(TRAINERS, ENGINES, RANKS, url, credentials)
    pipe.send([await engine.serve() for engine in fleet.engines])
    await asyncio.to_thread(pipe.recv)  # the daemon is there
    await fleet.start_trainer()
    step = 0
    while rounds := await asyncio.to_thread(_told, pipe):
        took = []
        for _ in range(rounds):
            began, step = time.monotonic(), step + 1
            await fleet.publish(step, run_directory)
            took.append(time.monotonic() - began)
        pipe.send(took)
    await fleet.close()


def _told(pipe: Pipe) -> int:
    """How many rounds are wanted; 0 when the other end is closed."""
    try:
        return int(pipe.recv())
    except EOFError:
        return 0


def watchers(pipe: Pipe, url: str, token: str) -> None:
    """The watchers' process: begins when it is made, says so, and how much one page was sent when it ends."""
    allow_sockets(PAGES)
    asyncio.run(_watch(pipe, url, {"Authorization": f"Bearer {token}"}))


async def _watch(pipe: Pipe, url: str, headers: dict[str, str]) -> None:
    read = [0] * PAGES
    opened = asyncio.Semaphore(0)
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def page(number: int) -> None:
            while True:
                async with session.get(f"{url}/stream", timeout=aiohttp.ClientTimeout(total=None)) as answer:
                    answer.raise_for_status()
                    opened.release()
                    async for chunk in answer.content.iter_any():
                        read[number] += len(chunk)

        async def scrape() -> None:
            while True:
                async with session.get(f"{url}/metrics") as answer:
                    await answer.read()
                await asyncio.sleep(SCRAPE_SECONDS)

        tasks = [asyncio.create_task(page(number)) for number in range(PAGES)] + [asyncio.create_task(scrape())]
        for _ in range(PAGES):
            await opened.acquire()
        began = time.monotonic()
        pipe.send("open")
        await asyncio.to_thread(pipe.recv)
        pipe.send(statistics.mean(read) / (time.monotonic() - began))
        failed = [task.exception() for task in tasks if task.done()]
        assert not failed, failed
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await closed(pipe)


class EnginePlace:
    """What a Fleet asks of a server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{HOST}:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        fleet = Fleet(Path(directory), {}, settings=dict(SETTINGS), run_id=RUN)
        url = f"http://{HOST}:{fleet.port}"
        arguments = (fleet.credentials, f"ws://{HOST}:{fleet.port}/agents", fleet.directory / "run")
        try:
            with Child(agents, *arguments) as speaking:
                fleet.engines = {f"e{n}": EnginePlace(port) for n, port in enumerate(speaking.receive())}  # type: ignore[assignment]
                fleet.restart_daemon()
                speaking.send("begin")
                measure(fleet, speaking, url, options.windows, options.rounds)
        finally:
            fleet.close()


def measure(fleet: Fleet, speaking: Child, url: str, windows: int, rounds: int) -> None:
    """Windows with and without watchers take turns."""
    assert fleet.daemon is not None
    assert fleet.daemon.child is not None
    pid = fleet.daemon.child.pid
    token = (fleet.credentials / "viewer.token").read_text().strip()

    def window(count: int) -> tuple[float, list[float]]:
        """Processor time of the daemon, and seconds of each round."""
        before = processor_seconds(pid)
        speaking.send(count)
        took = speaking.receive()
        return processor_seconds(pid) - before, took

    window(WARM_ROUNDS)
    shares, added, alone, sent = [], [], [], []
    for _ in range(windows):
        base, took = window(rounds)
        alone += took
        with Child(watchers, url, token) as watching:
            watching.receive()
            watched, took_watched = window(rounds)
            watching.send("enough")
            sent.append(watching.receive())
        shares.append(100 * (watched - base) / sum(took_watched))
        added.append(1e3 * (watched - base) / rounds)
    report("observe_share", shares, "%")
    report("observe_round_ms", [1e3 * seconds for seconds in alone], "ms")
    report("observe_added_ms", added, "ms")
    report("observe_page_kb_per_second", [rate / 1e3 for rate in sent], "kB/s")


if __name__ == "__main__":
    main()
