"""The daemon's state as ``/status`` shows it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from weightsync.orchestrator.core import conditions, standby
from weightsync.orchestrator.core.round import phases
from weightsync.orchestrator.core.since import engine_word, since, trainer_word
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.problems import problems
from weightsync.orchestrator.daemon.admin.surroundings import findings
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    LeftOutView,
    ProgressView,
    StatusView,
    TrainerView,
    VersionView,
    WaitingView,
    version_view,
)
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.limits import MAX_LANDS_CHARS, MAX_LEFT_OUT
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.release import release
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings


class Overview:
    """Shows one daemon. ``sections``: its engines as they are configured now, where they may change."""

    def __init__(
        self,
        settings: Settings,
        started_unix: float,
        sections: Callable[[], Iterable[EngineSection]] | None = None,
    ) -> None:
        self._settings = settings
        self._sections = sections or (lambda: settings.engines)
        self._started = started_unix

    def status(self, fleet: Fleet, history: History, markers: Sequence[str], now: float) -> StatusView:
        """Of this moment. ``now``: seconds of the core's clock; ``markers``: what is wrong in the run directory."""
        unix_now = time.time()
        return StatusView(
            run=self._settings.run.id,
            state=fleet.sentence,
            release=release(),
            epoch=fleet.epoch,
            journal_id=fleet.journal_id,
            unix_time=unix_now,
            started=self._started,
            committed=history.committed,
            engines=self._engines(fleet, now, unix_now),
            trainers=_trainers(fleet, now, unix_now),
            round=_progress(fleet, now),
            rounds=history.rounds,
            problems=problems(fleet, markers, now, unix_now),
            findings=findings(fleet),
            waiting=tuple(_waiting(fleet, now, unix_now)),
            holds=dict(fleet.memory.holds),
            drains=dict(fleet.memory.drains),
            maintenance=fleet.memory.maintenance or "",
            unneeded=fleet.plan.unneeded if fleet.plan is not None else (),
        )

    def _engines(self, fleet: Fleet, now: float, unix_now: float) -> tuple[EngineView, ...]:
        known = {section.name: section for section in self._sections()}
        # Whoever was torn when it was lost is so until it says otherwise: it is worst while nobody hears of it.
        lost = {member.engine for member, agent in fleet.gone.items() if agent.status.torn}
        return tuple(_engine(fleet, name, known.get(name), name in lost, now, unix_now) for name in fleet.engines)


def _engine(
    fleet: Fleet, name: str, config: EngineSection | None, was_torn: bool, now: float, unix_now: float
) -> EngineView:
    engine, ranks = fleet.engines[name], fleet.ranks_of(name)
    state = engine_word(fleet, name)
    error, fault = engine.complaint
    return EngineView(
        name=name,
        url=", ".join(config.servers) if config is not None else "",
        role=config.role if config is not None else "both",
        state=state,
        version=version_view(fleet.version_of(name)),
        ranks_connected=len(ranks),
        ranks_expected=ranks[0].hello.world if ranks else 0,
        paused=engine.paused,
        torn=was_torn or fleet.torn(name),
        error=error,
        fault=fault,
        since=unix_now - (now - since(fleet, name, state, now)),
        left_out=tuple(left_out_of([agent.announce.layout for agent in ranks if agent.announce is not None])),
        mode=standby.lands(fleet, name) if any(agent.announce is not None for agent in ranks) else "",
        mode_because=clean(standby.lands_because(fleet, name), MAX_LANDS_CHARS),
        standby=version_view(standby.beside(fleet, name)),
    )


def _trainers(fleet: Fleet, now: float, unix_now: float) -> tuple[TrainerView, ...]:
    views = []
    for agent in fleet.trainers():
        word = trainer_word(fleet, agent)
        views.append(
            TrainerView(
                rank=agent.member.rank,
                host=agent.hello.host,
                pid=agent.hello.pid,
                state=word,
                staged=version_view(agent.staged.version) if agent.staged else None,
                since=unix_now - (now - since(fleet, str(agent.member), word, now)),
            )
        )
    return tuple(views)


def _waiting(fleet: Fleet, now: float, unix_now: float) -> Iterator[WaitingView]:
    for version, began in fleet.waiting_since.items():
        if fleet.round is None or fleet.round.version != version:
            shown = VersionView(step=version.step, generation=version.generation)
            clause = conditions.waits_for(fleet, version, now) or "its round"
            yield WaitingView(version=shown, waits_for=clause, since=unix_now - (now - began))


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
        phase_seconds=now - current.phase_began,
        waits_for=phases.waits_for(fleet, current),
    )
