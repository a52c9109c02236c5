"""What it costs to be watched: 50 open pages, a scraper and traces, while 128 agents go through round after round.

    python tests/benchmarks/bench_observe.py [--blocks 12] [--rounds 5]

Prints one JSON line per figure. There are two whole fleets, one of which nobody watches: real daemons in processes of
their own; agents and engines of each in another (``observed_fleet``); pages and scraper, which read all that they are
sent, and the collector of traces. Of a block of four windows of ``--rounds`` rounds the first and the last are the
unwatched fleet's, so that a machine that becomes slower or faster favours neither. What is compared is the processor
time that the daemons' processes used, in nanoseconds from the kernel's scheduler: nearly all that a daemon does is done
on one loop, so that this is the most by which a round can have become longer.

* ``observe_share``: processor time that watching adds, over the time of the rounds in which it was added, in percent.
* ``observe_round_ms``: a round without watchers, from staging to the last outcome; ``observe_cpu_ms``: the processor
  time of one; ``observe_added_ms``: what watching adds to that.
* ``observe_page_kb_per_second``: what one page is sent.

``n`` counts blocks (of ``observe_round_ms``: rounds), ``value`` is their median, ``spread`` the distance between their
quartiles: a block in which the machine does something else says nothing, and there is always one.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import aiohttp
from aiohttp import web
from fleet import Fleet
from hub_processes import Child, Pipe, allow_sockets, closed
from observed_fleet import HOST, RUN, SpokenFleet

TRAINERS, ENGINES, RANKS = 64, 16, 4
PAGES: Final = 50
SCRAPE_SECONDS: Final = 5.0
WARM_ROUNDS: Final = 5

SETTINGS: Final = {
    "deadlines": {"probe_interval_seconds": 5, "heartbeat_seconds": 5},
    "commit": {"min_engines": ENGINES, "patience_seconds": 30},
    "rescan_seconds": 1,
    "log": {"format": "json"},
}


def report(figure: str, values: list[float], unit: str) -> None:
    """Print one figure: the median of ``values``, and the distance between their quartiles."""
    lower, value, upper = statistics.quantiles(values, n=4)
    line = {
        "figure": figure,
        "value": round(value, 6),
        "unit": unit,
        "n": len(values),
        "spread": round(upper - lower, 6),
    }
    print(json.dumps(line), flush=True)


def processor_seconds(pid: int) -> float:
    """That all threads of the process have used (/proc/PID/task/*/schedstat: nanoseconds on a processor come first)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


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


def collector(pipe: Pipe) -> None:
    """The process that traces are sent to; says its port."""
    asyncio.run(_collect(pipe))


async def _collect(pipe: Pipe) -> None:
    async def taken(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", taken)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    pipe.send(runner.addresses[0][1])
    await closed(pipe)
    await runner.cleanup()


class EnginePlace:
    """What a Fleet asks of a server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{HOST}:{port}"


class Observed:
    """A daemon with its agents and engines."""

    def __init__(self, directory: Path, settings: dict[str, object]) -> None:
        self.whole = Fleet(directory, {}, settings=SETTINGS | settings, run_id=RUN)
        self.url = f"http://{HOST}:{self.whole.port}"

    def __enter__(self) -> "Observed":
        whole = self.whole
        self._agents = Child(agents, whole.credentials, f"ws://{HOST}:{whole.port}/agents", whole.directory / "run")
        try:
            ports = self._agents.receive()
            whole.engines = {f"e{n}": EnginePlace(port) for n, port in enumerate(ports)}  # type: ignore[assignment]
            whole.restart_daemon()
        except BaseException:
            self.__exit__()
            raise
        self._agents.send("begin")
        return self

    def __exit__(self, *_: object) -> None:
        self._agents.__exit__()
        self.whole.close()

    def window(self, rounds: int) -> tuple[float, list[float]]:
        """Processor time of the daemon, and seconds of each round."""
        assert self.whole.daemon is not None
        assert self.whole.daemon.child is not None
        before = processor_seconds(self.whole.daemon.child.pid)
        self._agents.send(rounds)
        took = self._agents.receive()
        return processor_seconds(self.whole.daemon.child.pid) - before, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Child(collector) as traces:
        endpoint = f"http://{HOST}:{traces.receive()}/v1/traces"
        alone = Observed(Path(directory) / "alone", {})
        watched = Observed(Path(directory) / "watched", {"traces": {"otlp_endpoint": endpoint}})
        with alone, watched:
            for fleet in (alone, watched):
                fleet.window(WARM_ROUNDS)
            measure(alone, watched, options.blocks, options.rounds)


def measure(alone: Observed, watched: Observed, blocks: int, rounds: int) -> None:
    """Blocks of four windows: alone, watched, watched, alone."""
    token = (watched.whole.credentials / "viewer.token").read_text().strip()
    shares, own, added, unwatched, sent = [], [], [], [], []
    for _ in range(blocks):
        outer = [alone.window(rounds)]
        with Child(watchers, watched.url, token) as watching:
            watching.receive()
            inner = [watched.window(rounds) for _ in range(2)]
            watching.send("enough")
            sent.append(watching.receive())
        outer.append(alone.window(rounds))
        base, more = (sum(used for used, _ in windows) for windows in (outer, inner))
        shares.append(100 * (more - base) / sum(sum(took) for _, took in inner))
        own.append(1e3 * base / (2 * rounds))
        added.append(1e3 * (more - base) / (2 * rounds))
        unwatched += [1e3 * seconds for _, took in outer for seconds in took]
    report("observe_share", shares, "%")
    report("observe_round_ms", unwatched, "ms")
    report("observe_cpu_ms", own, "ms")
    report("observe_added_ms", added, "ms")
    report("observe_page_kb_per_second", [rate / 1e3 for rate in sent], "kB/s")


if __name__ == "__main__":
    main()
