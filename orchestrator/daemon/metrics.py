"""The status as Prometheus text: gauges of what is, and the costs of the last round."""

from typing import Final

from weightsync.orchestrator.daemon.admin.views import EngineView, RoundRow, StatusView

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_PREFIX: Final = "weightsync_"


def render(status: StatusView) -> str:
    """All metrics of one moment, in Prometheus' text format."""
    lines: list[str] = []
    _family(lines, "epoch", "Epoch of the daemon.", [({}, status.epoch)])
    _family(lines, "round_running", "1 while a round is under way.", [({}, int(status.round is not None))])
    _family(lines, "problems", "Things in the run directory that are not believed.", [({}, len(status.problems))])
    if status.committed is not None:
        _family(lines, "committed_step", "Step of the committed version.", [({}, status.committed.step)])
        _family(lines, "committed_sequence", "Number of the last commit.", [({}, status.committed.sequence)])
    if status.committed is not None and status.committed.unix_time:
        _family(lines, "committed_unix_seconds", "When it was committed.", [({}, status.committed.unix_time)])
    _engines(lines, status)
    if status.rounds:
        _last_round(lines, status.rounds[-1])
    return "\n".join(lines) + "\n"


def _engines(lines: list[str], status: StatusView) -> None:
    def each(name: str, text: str, value: str) -> None:
        _family(
            lines, name, text, [({"engine": e.name, "role": e.role}, _number(e, value, status)) for e in status.engines]
        )

    each("engine_torn", "1 while its live weights may be no whole version.", "torn")
    each("engine_paused", "1 while it says that it is paused, -1 while it does not say.", "paused")
    each("engine_serving_committed", "1 while it serves the committed version.", "serving")
    each("engine_ranks_connected", "Connected agents.", "ranks_connected")
    each("engine_ranks_expected", "Ranks that it has.", "ranks_expected")


def _number(engine: EngineView, what: str, status: StatusView) -> int:
    if what == "torn":
        return int(engine.torn)
    if what == "paused":
        return -1 if engine.paused is None else int(engine.paused)
    if what == "serving":
        holds = engine.version is not None and status.committed is not None
        same = holds and _name(engine) == (status.committed.step, status.committed.generation)  # type: ignore[union-attr]
        return int(same and engine.paused is False and not engine.torn)
    return engine.ranks_connected if what == "ranks_connected" else engine.ranks_expected


def _name(engine: EngineView) -> tuple[int, int]:
    assert engine.version is not None
    return engine.version.step, engine.version.generation


def _last_round(lines: list[str], row: RoundRow) -> None:
    _family(lines, "last_round_committed", "1 if the last round committed.", [({}, int(row.outcome == "committed"))])
    _family(lines, "last_round_bytes", "Bytes that it moved.", [({}, row.bytes)])
    _family(lines, "last_round_unix_seconds", "When it ended.", [({}, row.unix_time)])
    parts = {"pause": row.pause_ms, "stall": row.stall_ms, "verify": row.verify_ms, "total": row.total_ms}
    samples: list[tuple[dict[str, str], float]] = [({"part": name}, ms / 1e3) for name, ms in parts.items()]
    _family(lines, "last_round_seconds", "What it took.", samples)


def _family(lines: list[str], name: str, text: str, samples: list[tuple[dict[str, str], float]]) -> None:
    lines.append(f"# HELP {_PREFIX}{name} {text}")
    lines.append(f"# TYPE {_PREFIX}{name} gauge")
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        lines.append(f"{_PREFIX}{name}{{{shown}}} {value:.15g}" if shown else f"{_PREFIX}{name} {value:.15g}")


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
