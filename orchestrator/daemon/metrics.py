"""The status as Prometheus metrics: gauges of what is, and the costs of the last round."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from weightsync.orchestrator.daemon.admin.views import EngineView, RoundRow, StatusView, VersionView

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_PREFIX: Final = "weightsync_"


def render(status: StatusView) -> bytes:
    """All metrics of one moment, in Prometheus' text format (CONTENT_TYPE)."""
    # A registry of its own: the library's global one would add metrics of this process, and collect between requests.
    registry = CollectorRegistry()
    registry.register(StatusCollector(status))
    return generate_latest(registry)


class StatusCollector(Collector):
    """Reads the metrics off one StatusView."""

    def __init__(self, status: StatusView) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """Every metric; those of a commit, and of a round, only once there has been one."""
        status = self._status
        yield _gauge("epoch", "Epoch of the daemon.", status.epoch)
        yield _gauge("round_running", "1 while a round is under way.", status.round is not None)
        family = GaugeMetricFamily(
            _PREFIX + "problems", "Things that are wrong; status names them.", labels=("severity",)
        )
        for severity in ("critical", "degraded"):
            family.add_metric((severity,), sum(problem.severity == severity for problem in status.problems))
        yield family
        if status.committed is not None:
            yield from _commit(status.committed)
        yield from _engines(status)
        if status.rounds:
            yield from _last_round(status.rounds[-1])


def _commit(committed: VersionView) -> Iterator[Metric]:
    yield _gauge("committed_step", "Step of the committed version.", committed.step)
    yield _gauge("committed_sequence", "Number of the last commit.", committed.sequence)
    if committed.unix_time:
        yield _gauge("committed_unix_seconds", "When it was committed.", committed.unix_time)


def _engines(status: StatusView) -> Iterator[Metric]:
    def each(name: str, text: str, value: Callable[[EngineView], int]) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=("engine", "role"))
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
    yield _gauge("last_round_unix_seconds", "When it ended.", row.unix_time)
    seconds = GaugeMetricFamily(_PREFIX + "last_round_seconds", "What it took.", labels=("part",))
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
    return GaugeMetricFamily(_PREFIX + name, text, value=value)
