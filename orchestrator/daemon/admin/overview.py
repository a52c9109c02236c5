"""The daemon's state as ``/status`` shows it."""

import time
from collections.abc import Iterator, Sequence

from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    LeftOutView,
    ProgressView,
    StatusView,
    TrainerView,
    VersionView,
    version_view,
)
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.limits import MAX_LEFT_OUT
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings


class Overview:
    """Remembers since when each engine and rank has been in its present state."""

    def __init__(self, settings: Settings, started_unix: float) -> None:
        self._settings = settings
        self._started = started_unix
        self._since: dict[str, tuple[str, float]] = {}

    def status(self, fleet: Fleet, history: History, problems: Sequence[str], now: float) -> StatusView:
        """Of this moment. ``now``: seconds of the clock that the rounds are timed with."""
        return StatusView(
            run=self._settings.run.id,
            state=fleet.sentence,
            epoch=fleet.epoch,
            journal_id=fleet.journal_id,
            unix_time=time.time(),
            started=self._started,
            committed=history.committed,
            engines=tuple(self._engine(fleet, engine) for engine in self._settings.engines),
            trainers=self._trainers(fleet),
            round=_progress(fleet, now),
            rounds=history.rounds,
            problems=tuple(problems),
            unneeded=fleet.plan.unneeded if fleet.plan is not None else (),
        )

    def _engine(self, fleet: Fleet, config: EngineSection) -> EngineView:
        engine, ranks = fleet.engines[config.name], fleet.ranks_of(config.name)
        state = engine_state(fleet, config.name)
        error, fault = engine.complaint
        return EngineView(
            name=config.name,
            url=config.url,
            role=config.role,
            state=state,
            version=version_view(fleet.version_of(config.name)),
            ranks_connected=len(ranks),
            ranks_expected=ranks[0].hello.world if ranks else 0,
            paused=engine.paused,
            torn=fleet.torn(config.name),
            error=error,
            fault=fault,
            since=self._state_since(config.name, state),
            left_out=tuple(left_out_of([agent.announce.layout for agent in ranks if agent.announce is not None])),
        )

    def _trainers(self, fleet: Fleet) -> tuple[TrainerView, ...]:
        views = []
        for agent in fleet.trainers():
            state = (
                "writing"
                if any(writer == agent.member for writer, _ in fleet.unclosed)
                else "staged"
                if agent.staged
                else "connected"
            )
            views.append(
                TrainerView(
                    rank=agent.member.rank,
                    host=agent.hello.host,
                    pid=agent.hello.pid,
                    state=state,
                    staged=version_view(agent.staged.version) if agent.staged else None,
                    since=self._state_since(str(agent.member), state),
                )
            )
        return tuple(views)

    def _state_since(self, name: str, state: str) -> float:
        if self._since.get(name, ("", 0.0))[0] != state:
            self._since[name] = (state, time.time())
        return self._since[name][1]


def engine_state(fleet: Fleet, name: str) -> str:
    """One word for what an engine is doing."""
    engine = fleet.engines[name]
    # The order decides: a torn engine that is unreachable, too, is to be seen as torn.
    if fleet.round is not None and name in fleet.round.remaining():
        return "updating"
    if fleet.torn(name):
        return "torn"
    if not engine.reachable:
        return "unreachable"
    if not fleet.attached(name):
        return "joining"
    if fleet.version_of(name) is None:
        return "held"
    return "paused" if engine.paused else "serving"


def left_out_of(ranks: Sequence[Layout]) -> Iterator[LeftOutView]:
    """What the layouts of an engine's ranks leave out, together: of the checkpoint only what each of them names."""
    merged: dict[tuple[str, str], tuple[dict[str, None], int]] = {}
    for layout in ranks:
        for entry in layout.left_out:
            names, count = merged.setdefault((entry.kind, entry.reason), ({}, 0))
            if entry.kind != "unneeded":
                names.update(dict.fromkeys(entry.names))
                merged[entry.kind, entry.reason] = names, max(count, entry.count)
    everywhere = [
        {name for entry in layout.left_out if entry.kind == "unneeded" for name in entry.names} for layout in ranks
    ]
    nowhere_needed = sorted(set.intersection(*everywhere)) if everywhere else []
    for (kind, reason), (names, count) in merged.items():
        shown = nowhere_needed if kind == "unneeded" else list(names)
        if shown:
            yield LeftOutView(kind=kind, reason=reason, names=tuple(shown[:MAX_LEFT_OUT]), count=max(count, len(shown)))


def _progress(fleet: Fleet, now: float) -> ProgressView | None:
    current = fleet.round
    if current is None:
        return None
    return ProgressView(
        round=str(current.name),
        version=VersionView(step=current.version.step, generation=current.version.generation),
        phase=current.phase.value,
        attempt=current.attempt,
        elapsed_seconds=now - current.began,
    )
