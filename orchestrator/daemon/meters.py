"""What happened since the daemon's start, counted: rounds, engines' calls, agents, the journal, the loop.

A status shows what is; whatever came and went between two scrapes is here. Labels are words of ours, or names of
engines that are members now: their number is bounded by the fleet's, and no rank, host or version is a label.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, Metric
from weightsync.orchestrator.core.commands import Command, Refuse
from weightsync.orchestrator.core.events import (
    AgentConnected,
    AgentLost,
    CallDone,
    CallFailed,
    Event,
    PlanReady,
    PlanRejected,
)
from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.protocol.messages import Fault

PREFIX: Final = "weightsync_"

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper ends of buckets, in seconds: from an fsync to the longest default deadline."""

SHORT_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Of what is to take no time."""

RATES: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 400.0)
"""Gigabytes per second of the slowest sender: from TCP to NVLink."""

FAULTS: Final = tuple(fault for fault in get_args(Fault) if fault)

ROLES: Final = ("trainer", "inference")

PARTS: Final = (
    "pausing", "quiescing", "exposing", "writing", "verifying", "switching", "stall", "switch", "audit", "skew",
    "total",
)  # fmt: skip
"""Of a round: parts of its row that have a histogram of their own."""


# A second series for each counter, that says when it began: with the daemon.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Meters:
    """Belongs to the daemon's loop. ``registry`` has all of it but what is by engine, see ``by_engine``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=registry)

        self._rounds = counter("rounds", "Rounds that ended; fault is empty for committed ones.", "outcome", "fault")
        self._retries = counter("round_retries", "Rounds that were not the first attempt at their version.")
        self._bytes = counter("moved_bytes", "Bytes that rounds moved, also those that failed.")
        self._link_bytes = counter("link_moved_bytes", "Bytes that rounds moved, by kind of link.", "link")
        self._link_rate = histogram(
            "link_gigabytes_per_second", "Bytes of a round by a kind of link over its longest edge.", RATES, "link"
        )
        self._slow_edges = Gauge(
            PREFIX + "slow_edges", "Edges of the last round that were slower than half of their link.", ["link"],
            registry=registry,
        )  # fmt: skip
        self._parts = histogram("round_seconds", "Parts of committed rounds.", SECONDS, "part")
        self._rate = histogram("wire_gigabytes_per_second", "Bytes over the slowest sender's time.", RATES)
        self._calls = counter("engine_calls", "Calls to engines that ended.", "call", "outcome")
        self._call_seconds = histogram("engine_call_seconds", "Calls that succeeded.", SECONDS, "call")
        self._connected = counter("agents_connected", "Hellos that agents said.", "role")
        self._lost = counter("agents_lost", "Connections of agents that ended.", "role")
        self._refused = counter("agents_refused", "Agents that were sent away.", "fault")
        self._plans = counter("plans", "Plans that were asked for.", "outcome")
        self._plan_seconds = histogram("plan_seconds", "Making a plan.", SECONDS)
        self._records = counter("journal_records", "Records that became durable.")
        self._append = histogram("journal_append_seconds", "Making records durable, in one commit.", SHORT_SECONDS)
        self._lag = histogram("loop_lag_seconds", "How late the loop's clock was.", SHORT_SECONDS)
        self._journal_bytes = Gauge(PREFIX + "journal_bytes", "Size of the journal's file.", registry=registry)
        self._turned_away: Mapping[str, int] = {}
        self._left_out: defaultdict[str, int] = defaultdict(int)
        self._paused: defaultdict[str, float] = defaultdict(float)
        self._paused_since: dict[str, float] = {}
        # From the first scrape on, so that a rate sees the first one.
        self._rounds.labels("committed", "")
        for fault in FAULTS:
            self._rounds.labels("failed", fault)
            self._refused.labels(fault)
        for role in ROLES:
            self._connected.labels(role)
            self._lost.labels(role)

    # --------------------------------------------------------------------------------------------------- what is told
    def journal_at(self, path: Path) -> None:
        """Where the journal's file is; its size is looked up at each scrape."""
        self._journal_bytes.set_function(lambda: _size(path))

    def refusals_of(self, counts: Mapping[str, int]) -> None:
        """Where it is counted who was turned away, by kind."""
        self._turned_away = counts

    def ended(self, row: RoundRow) -> None:
        """A round ended."""
        self._rounds.labels(row.outcome, row.fault).inc()
        self._bytes.inc(row.bytes)
        for link in row.links:
            self._link_bytes.labels(link.link).inc(link.bytes)
            if link.gb_per_s:
                self._link_rate.labels(link.link).observe(link.gb_per_s)
            self._slow_edges.labels(link.link).set(link.slow_edges)
        if row.attempt > 1:
            self._retries.inc()
        for engine in row.left_out:
            self._left_out[engine] += 1
        if row.outcome == "committed":
            for part in PARTS:
                if part in row.times_ms:
                    self._parts.labels(part).observe(row.times_ms[part] / 1e3)
            if row.wire_gb_per_s:
                self._rate.observe(row.wire_gb_per_s)

    def happened(self, events: Iterable[Event], now: float) -> None:
        """Events of one decision, which was made ``now`` by the loop's clock."""
        for event in events:
            match event:
                case CallDone():
                    self._calls.labels(event.call.value, "done").inc()
                    self._call_seconds.labels(event.call.value).observe(event.seconds)
                    self._pause(event.engine, event.paused, now)
                case CallFailed():
                    self._calls.labels(event.call.value, event.fault).inc()
                case AgentConnected():
                    self._connected.labels(event.member.role).inc()
                case AgentLost():
                    self._lost.labels(event.member.role).inc()
                case PlanReady():
                    self._plans.labels("made").inc()
                    self._plan_seconds.observe(event.facts.seconds)
                case PlanRejected():
                    self._plans.labels(event.fault).inc()

    def commanded(self, commands: Iterable[Command]) -> None:
        """What the core decided."""
        for command in commands:
            if isinstance(command, Refuse):
                self._refused.labels(command.refused.fault).inc()

    def appended(self, records: int, seconds: float) -> None:
        """Records became durable together."""
        self._records.inc(records)
        self._append.observe(seconds)

    def late(self, seconds: float) -> None:
        """The loop came back so late from a sleep."""
        self._lag.observe(max(0.0, seconds))

    def _pause(self, engine: str, paused: bool | None, now: float) -> None:
        """What a call showed: one that found it paused counts from then on, one that found it running until then."""
        if paused is True:
            self._paused_since.setdefault(engine, now)
        elif paused is False and engine in self._paused_since:
            self._paused[engine] += now - self._paused_since.pop(engine)

    # ---------------------------------------------------------------------------------------------------- what is read
    def by_engine(self, engines: Iterable[str], now: float) -> Iterator[Metric]:
        """Counters of each of the ``engines``; those that are no members any more are forgotten."""
        members = list(engines)
        books: tuple[dict[str, int] | dict[str, float], ...] = (self._left_out, self._paused, self._paused_since)
        for book in books:
            for gone in book.keys() - set(members):
                del book[gone]
        yield _each("engine_paused_seconds", "Seconds in which it was seen to be paused.", members, lambda name: (
            self._paused.get(name, 0.0) + now - self._paused_since.get(name, now)
        ))  # fmt: skip
        turned_away = CounterMetricFamily(
            PREFIX + "turned_away", "Connections and requests that were refused at the door.", labels=("kind",)
        )
        for kind, count in sorted(self._turned_away.items()):
            turned_away.add_metric((kind,), count)
        yield turned_away
        yield _each(
            "engine_left_out", "Rounds that it was left out of.", members, lambda name: self._left_out.get(name, 0)
        )


def _each(name: str, text: str, engines: Iterable[str], value: Callable[[str], float]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=("engine",))
    for engine in engines:
        family.add_metric((engine,), value(engine))
    return family


def _size(path: Path) -> float:
    try:
        return path.stat().st_size
    except OSError:
        return 0.0
