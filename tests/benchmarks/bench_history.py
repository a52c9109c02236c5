"""What a long history costs: JSON lines ``{"figure", "value", "unit", "n", "spread"}``; ``make bench-history``.

    python tests/benchmarks/bench_history.py [steps] [journal] [scan]

* ``sim_step_growth_1e5``: time of one decision of the core after 100,000 versions over the time of one at the start,
  both measured in turn, CPU seconds.
* ``journal_start_360k_s``: opening and folding the journal of a daemon that has written 360,000 entries, and
  ``journal_360k_mb``: how large it is; ``journal_step_p99_ms``: one piece of its compaction, for which the beginning of
  a round may wait.
* ``scan_100k_unchanged_ms``: one scan of 100,000 settled steps of which none has changed, with some of them looked at
  in turn; ``scan_100k_first_ms``: the longest of the scans that read them at first; ``scan_20k_strays_lines``.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fleets import ANNOUNCE, policy_for, trainer
from weightsync.orchestrator.core.events import AgentConnected, AgentSaid, MarkersSeen, StableSeen, Tick
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.records import (
    AnyRecord,
    Committed,
    Decided,
    EpochBegan,
    LiveDirty,
    Record,
    RoundBegan,
    RoundEnded,
    VersionFailed,
    decode_record,
    encode_record,
)
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.compaction import Compaction
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.daemon.run_directory import scan as scans
from weightsync.orchestrator.daemon.run_directory.scan import MarkerDirectory
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import encode_manifest, manifest
from weightsync.orchestrator.protocol.messages import Hello, TrainerStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

GENERATION = 7
ENGINES = ("e0", "e1")


def report(figure: str, values: list[float], unit: str) -> None:
    """Print a figure: the median, and how far the runs are apart."""
    line = {"figure": figure, "value": round(statistics.median(values), 4), "unit": unit, "n": len(values)}
    print(json.dumps({**line, "spread": round(max(values) - min(values), 4)}), flush=True)


# ---------------------------------------------------------------------------------------------------------- the core
def fleet_after(versions: int) -> Fleet:
    """A fleet whose trainer has staged the next version and waits; one in a hundred before it has FAILED."""
    records: list[AnyRecord] = []
    for number in range(1, versions + 1):
        version = Version(GENERATION, number)
        if number % 100:
            records.append(Committed(round=RoundName(1, number), version=version, sequence=number))
        else:
            records.append(VersionFailed(version=version, reason="no engine could take part"))
    fleet, _ = start(policy_for(ENGINES), "journal", records, 0.0)
    member, staged = trainer(), Version(GENERATION, versions + 1)
    hello = Hello(
        schema=SCHEMA_VERSION, run_id="unit", member=member, incarnation=1, world=1, generation=GENERATION,
        trainer=TrainerStatus(staged=staged),
    )  # fmt: skip
    step(fleet, [AgentConnected(1, member, 1, hello)], 0.0)
    step(fleet, [AgentSaid(2, member, 1, ANNOUNCE)], 0.0)
    step(fleet, [MarkersSeen(3, (StableSeen(staged.step, GENERATION), StableSeen(5, 6)))], 0.0)
    return fleet


def step_growth(versions: int = 100_000, times: int = 15, steps: int = 400) -> list[float]:
    """Time of a step after so many versions over the time of one at the start, ``times`` times."""
    fleets = (fleet_after(versions), fleet_after(1))

    def seconds(fleet: Fleet) -> float:
        began = time.process_time()
        for number in range(steps):
            step(fleet, [Tick(number + 10)], 1.0)
        return time.process_time() - began

    for fleet in fleets:
        seconds(fleet)
    return [seconds(fleets[0]) / seconds(fleets[1]) for _ in range(times)]


# -------------------------------------------------------------------------------------------------------- the journal
def a_round(number: int) -> list[Record]:
    """What a round of two engines with eight ranks each leaves."""
    name, version = RoundName(1, number), Version(GENERATION, number)
    members = [f"{engine}/{rank}" for engine in ENGINES for rank in range(8)]
    return [
        RoundBegan(round=name, version=version, attempt=1, engines=ENGINES),
        LiveDirty(round=name, writers={}),
        Decided(round=name, version=version, digests=dict.fromkeys(members, "0123456789abcdef" * 2)),
        Committed(round=name, version=version, sequence=number),
        RoundEnded(
            round=name, version=version, attempt=1, engines=ENGINES, left_out=(), outcome="committed", reason="",
            bytes=10**9, descriptors=100, times={"pausing": 0.01, "writing": 0.5, "verifying": 0.1},
        ),
        EpochBegan(epoch=1),
    ]  # fmt: skip


def journal(rounds: int = 60_000, at_once: int = 50) -> None:
    """A daemon's journal after so many rounds of six entries, compacted between them as the daemon does."""
    with tempfile.TemporaryDirectory() as top:
        path = Path(top) / "journal.sqlite"
        pieces = []
        with Journal.open(path) as opened:
            compacting = Compaction(opened)
            for first in range(1, rounds + 1, at_once):
                records = [record for number in range(first, first + at_once) for record in a_round(number)]
                opened.append([(type(record).__name__, encode_record(record)) for record in records])
                more = True
                while more:
                    began = time.perf_counter()
                    more = compacting.step()
                    pieces.append((time.perf_counter() - began) * 1e3)
        seconds = [_timed(lambda: _start(path)) for _ in range(5)]
        report(f"journal_start_{6 * rounds // 1000}k_s", seconds, "s")
        report(f"journal_{6 * rounds // 1000}k_mb", [path.stat().st_size / 1e6], "MB")
        report("journal_step_p99_ms", [statistics.quantiles(pieces, n=100)[98]], "ms")


def _start(path: Path) -> None:
    with Journal.open(path) as opened:
        records = [decode_record(entry.body) for entry in opened.since("MemorySaved")]
        start(policy_for(ENGINES), opened.journal_id, records, 0.0)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# -------------------------------------------------------------------------------------------------- the run directory
def scan(steps: int = 100_000, strays: int = 20_000) -> None:
    """Scans of settled steps, and of names that are none of ours."""
    scans.TURN_SECONDS = 0.0  # type: ignore[misc]  # each scan takes its turn with the settled ones, or it would be free
    with tempfile.TemporaryDirectory() as top:
        broadcasts = Path(top) / "broadcasts"
        broadcasts.mkdir()
        long_ago = time.time() - 3600
        for number in range(steps):
            _settled(f"{broadcasts}/step_{number}", number, long_ago)
        os.utime(broadcasts, (long_ago, long_ago))
        directory = MarkerDirectory(Path(top), "bench")
        first, unread = [], True
        while unread:
            began = time.perf_counter()
            unread = directory.scan().unread
            first.append((time.perf_counter() - began) * 1e3)
        report(f"scan_{steps // 1000}k_first_ms", [max(first)], "ms")

        unchanged = [_timed(directory.scan) * 1e3 for _ in range(20)]
        report(f"scan_{steps // 1000}k_unchanged_ms", unchanged[1:], "ms")
    with tempfile.TemporaryDirectory() as top:
        (Path(top) / "broadcasts").mkdir()
        for number in range(strays):
            (Path(top) / "broadcasts" / f"stray-{number}").touch()
        report(
            f"scan_{strays // 1000}k_strays_lines", [len(MarkerDirectory(Path(top), "bench").scan().problems)], "lines"
        )


def _settled(path: str, step: int, at: float) -> None:
    os.mkdir(path)
    body = encode_manifest(manifest("bench", Version(GENERATION, step)))
    for kind in ("STABLE", "COMMITTED"):
        descriptor = os.open(f"{path}/{kind}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(descriptor, body)
        os.close(descriptor)
        os.utime(f"{path}/{kind}", (at, at))
    os.utime(path, (at, at))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help="steps, journal, scan; all by default")
    parts = parser.parse_args().parts or ["steps", "journal", "scan"]
    if "steps" in parts:
        report("sim_step_growth_1e5", step_growth(), "ratio")
    if "journal" in parts:
        journal()
    if "scan" in parts:
        scan()


if __name__ == "__main__":
    main()
