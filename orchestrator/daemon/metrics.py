"""All metrics, in Prometheus' text format: gauges of what is, from the status, and what ``meters`` has counted."""

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from weightsync.orchestrator.daemon.admin.views import EngineView, RoundRow, StatusView, VersionView
from weightsync.orchestrator.daemon.meters import PREFIX, Meters
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


def render(status: StatusView, meters: Meters, now: float) -> bytes:
    """All metrics of one moment, in CONTENT_TYPE. ``now``: of the clock by which ``meters`` was told."""
    # A registry of its own: the library's global one would collect between requests.
    registry = CollectorRegistry()
    registry.register(StatusCollector(status, meters, now))
    return generate_latest(registry) + generate_latest(meters.registry)


class StatusCollector(Collector):
    """Reads the metrics off one StatusView, and those of its engines off the meters."""

    def __init__(self, status: StatusView, meters: Meters, now: float) -> None:
        self._status, self._meters, self._now = status, meters, now

    def collect(self) -> Iterable[Metric]:
        """Every metric; the step of a commit, and the costs of a round, only once there has been one."""
        status = self._status
        family = GaugeMetricFamily(
            PREFIX + "build_info", "1; what runs.", labels=("release", "python", "protocol_schema")
        )
        family.add_metric((status.release, platform.python_version(), str(SCHEMA_VERSION)), 1)
        yield family
        yield _gauge("epoch", "Epoch of the daemon.", status.epoch)
        yield _gauge("started_timestamp_seconds", "When the daemon began, in unix time.", status.started)
        yield _gauge("maintenance", "1 while no round begins because the operator said so.", status.maintenance != "")
        yield _gauge("round_running", "1 while a round is under way.", status.round is not None)
        family = GaugeMetricFamily(
            PREFIX + "problems", "Things that are wrong; status names them.", labels=("severity",)
        )
        for severity in ("critical", "degraded"):
            family.add_metric((severity,), sum(problem.severity == severity for problem in status.problems))
        yield family
        yield from _commit(status.committed)
        yield from _engines(status)
        yield from self._meters.by_engine([engine.name for engine in status.engines], self._now)
        yield from _agents(status)
        if status.rounds:
            yield from _last_round(status.rounds[-1])


def _commit(committed: VersionView | None) -> Iterator[Metric]:
    # 0 before the first one: an alert on its age fires also for a fleet that has never committed.
    yield _gauge("committed_sequence", "Number of the last commit.", committed.sequence if committed else 0)
    when = committed.unix_time if committed else 0.0
    yield _gauge("committed_timestamp_seconds", "When it was committed, in unix time; 0 before the first.", when)
    if committed is not None:
        yield _gauge("committed_step", "Step of the committed version.", committed.step)


def _engines(status: StatusView) -> Iterator[Metric]:
    def each(name: str, text: str, value: Callable[[EngineView], float]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("engine", "role"))
        for engine in status.engines:
            family.add_metric((engine.name, engine.role), value(engine))
        return family

    yield each("engine_torn", "1 while its live weights may be no whole version.", lambda engine: engine.torn)
    yield each("engine_paused", "1 while it says that it is paused, -1 while it does not say.", _paused)
    yield each(
        "engine_serving_committed",
        "1 while it serves the committed version.",
        lambda engine: _serves(engine, status.committed),
    )
    yield each("engine_ranks_connected", "Connected agents.", lambda engine: engine.ranks_connected)
    yield each("engine_ranks_expected", "Ranks that it has.", lambda engine: engine.ranks_expected)
    age = status.unix_time - status.committed.unix_time if status.committed else 0.0
    yield each(
        "engine_behind_seconds",
        "Age of the committed version while it does not serve that, else 0.",
        lambda engine: 0.0 if _serves(engine, status.committed) else age,
    )
    state = GaugeMetricFamily(PREFIX + "engine_state", "1 for the state that it is in.", labels=("engine", "state"))
    since = GaugeMetricFamily(
        PREFIX + "engine_state_timestamp_seconds", "Since when it is in its state, in unix time.", labels=("engine",)
    )
    step = GaugeMetricFamily(PREFIX + "engine_step", "Step of the version that it holds.", labels=("engine",))
    for engine in status.engines:
        state.add_metric((engine.name, engine.state), 1)
        since.add_metric((engine.name,), engine.since)
        if engine.version is not None:
            step.add_metric((engine.name,), engine.version.step)
    yield from (state, since, step)


def _agents(status: StatusView) -> Iterator[Metric]:
    """By role and state, without names: a trainer may have thousands of ranks."""
    family = GaugeMetricFamily(PREFIX + "agents", "Connected agents.", labels=("role", "state"))
    for state, count in sorted(Counter(trainer.state for trainer in status.trainers).items()):
        family.add_metric(("trainer", state), count)
    family.add_metric(("inference", ""), sum(engine.ranks_connected for engine in status.engines))
    yield family
    yield _gauge("versions_waiting", "Versions that were published and have no round yet.", len(status.waiting))


def _paused(engine: EngineView) -> int:
    return -1 if engine.paused is None else engine.paused


def _serves(engine: EngineView, committed: VersionView | None) -> bool:
    held = engine.version
    if held is None or committed is None or engine.torn or engine.paused is not False:
        return False
    return (held.step, held.generation) == (committed.step, committed.generation)


def _last_round(row: RoundRow) -> Iterator[Metric]:
    yield _gauge("last_round_committed", "1 if the last round committed.", row.outcome == "committed")
    yield _gauge("last_round_bytes", "Bytes that it moved.", row.bytes)
    yield _gauge("last_round_timestamp_seconds", "When it ended, in unix time.", row.unix_time)
    seconds = GaugeMetricFamily(PREFIX + "last_round_seconds", "What it took.", labels=("part",))
    milliseconds = {
        "pause": row.pause_ms,
        "stall": row.stall_ms,
        "verify": row.verify_ms,
        "total": row.total_ms,
        "switch": row.switch_ms,
        "skew": row.skew_ms,
    }
    for part, value in milliseconds.items():
        seconds.add_metric((part,), value / 1e3)
    yield seconds


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)
