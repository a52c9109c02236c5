"""The daemon's state as ``/status`` shows it."""

import time
from collections.abc import Sequence

from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    ProgressView,
    RoundRow,
    StatusView,
    TrainerView,
    VersionView,
)
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings


class View:
    """Remembers since when each engine and rank has been in its present state."""

    def __init__(self, settings: Settings, started_unix: float) -> None:
        self._settings = settings
        self._started = started_unix
        self._since: dict[str, tuple[str, float]] = {}

    def status(
        self, fleet: Fleet, rounds: Sequence[RoundRow], committed_at: float, problems: Sequence[str], now: float
    ) -> StatusView:
        """Of this moment. ``committed_at`` in unix time; ``now`` of the clock that the rounds are timed with."""
        return StatusView(
            run=self._settings.run.id,
            state=fleet.sentence,
            epoch=fleet.epoch,
            journal_id=fleet.journal_id,
            unix_time=time.time(),
            started=self._started,
            committed=_version(fleet.memory.committed, fleet.memory.sequence, committed_at),
            engines=tuple(self._engine(fleet, engine) for engine in self._settings.engines),
            trainers=self._trainers(fleet),
            round=_progress(fleet, now),
            rounds=tuple(rounds),
            problems=tuple(problems),
        )

    def _engine(self, fleet: Fleet, config: EngineSection) -> EngineView:
        engine, ranks = fleet.engines[config.name], fleet.ranks_of(config.name)
        state = engine_state(fleet, config.name)
        return EngineView(
            name=config.name,
            url=config.url,
            role=config.role,
            state=state,
            version=_version(fleet.version_of(config.name)),
            ranks_connected=len(ranks),
            ranks_expected=ranks[0].hello.world if ranks else 0,
            paused=engine.paused,
            torn=fleet.torn(config.name),
            error=engine.complaint[0],
            fault=engine.complaint[1],
            since=self._state_since(config.name, state),
        )

    def _trainers(self, fleet: Fleet) -> tuple[TrainerView, ...]:
        views = []
        for agent in fleet.trainers():
            state = "writing" if agent.member in fleet.unclosed else "staged" if agent.staged else "connected"
            views.append(
                TrainerView(
                    rank=agent.member.rank,
                    host=agent.hello.host,
                    pid=agent.hello.pid,
                    state=state,
                    staged=_version(agent.staged.version) if agent.staged else None,
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
    return "paused" if engine.paused or engine.ours_paused else "serving"


def _version(version: Version | None, sequence: int = 0, unix_time: float = 0.0) -> VersionView | None:
    if version is None:
        return None
    return VersionView(step=version.step, generation=version.generation, sequence=sequence, unix_time=unix_time)


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
