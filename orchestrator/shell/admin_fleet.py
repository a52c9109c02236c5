"""The live daemon's views: its state and its journal, put into the words of ``admin_views``."""

import asyncio
import time
from typing import Protocol

from aiohttp import web
from weightsync.orchestrator.core.endings import may_serve
from weightsync.orchestrator.core.records import Committed, RoundEnded, decode_record
from weightsync.orchestrator.core.state import Agent, Fleet
from weightsync.orchestrator.core.versions import waiting_for
from weightsync.orchestrator.shell import admin
from weightsync.orchestrator.shell.admin_views import (
    HISTORY_ROUNDS,
    EngineView,
    LayoutsView,
    PartyView,
    ProgressView,
    RoundsView,
    StatusView,
    TrainerView,
    VersionView,
    round_row,
    version_view,
)
from weightsync.orchestrator.shell.journal import AsyncJournal
from weightsync.orchestrator.shell.markers import MarkerDirectory
from weightsync.orchestrator.shell.settings import Engine, Settings, read_secret


class Daemon(Protocol):
    """What the views need of the runner. ``started_unix``: when it began, in unix time."""

    settings: Settings
    fleet: Fleet
    journal: AsyncJournal
    markers: MarkerDirectory
    started_unix: float


def admin_routes(daemon: Daemon) -> list[web.RouteDef]:
    """The read-only routes of a running daemon.

    Raises:
        ConfigError: the token file cannot be used.
    """
    return admin.routes(FleetViews(daemon), read_secret(daemon.settings.listen.token_file))


class FleetViews:
    """Makes the views of ``daemon``."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def status(self) -> StatusView:
        """See ``admin.Views``."""
        daemon = self._daemon
        rounds = await self.rounds(HISTORY_ROUNDS)
        committed = await self._committed()
        fleet, settings, now = daemon.fleet, daemon.settings, asyncio.get_running_loop().time()
        return StatusView(
            run=settings.run.id,
            state=sentence_of(fleet),
            epoch=fleet.epoch,
            journal_id=fleet.journal_id,
            unix_time=time.time(),
            started=daemon.started_unix,
            committed=committed,
            engines=tuple(_engine(fleet, engine) for engine in settings.engines),
            trainers=tuple(_trainer(fleet, agent) for agent in fleet.trainers()),
            round=_progress(fleet, now),
            rounds=rounds.rounds,
            problems=tuple(str(problem) for problem in daemon.markers.problems),
        )

    async def rounds(self, last: int) -> RoundsView:
        """See ``admin.Views``."""
        rows = []
        for entry in await self._daemon.journal.entries(["RoundEnded"], newest=last):
            record = decode_record(entry.body)
            assert isinstance(record, RoundEnded)
            rows.append(round_row(record, entry.unix_time))
        return RoundsView(run=self._daemon.settings.run.id, rounds=tuple(rows))

    async def layouts(self) -> LayoutsView | None:
        """See ``admin.Views``."""
        fleet = self._daemon.fleet
        if fleet.plan is None:
            return None
        parties = tuple(
            PartyView(
                name=str(member), member=member, incarnation=agent.hello.incarnation, layout=agent.announce.layout
            )
            for member, agent in sorted(fleet.agents.items())
            if agent.announce is not None and member in fleet.plan.connects
        )
        return LayoutsView(run=self._daemon.settings.run.id, root=fleet.plan.root, parties=parties)

    async def _committed(self) -> VersionView | None:
        for entry in await self._daemon.journal.entries(["Committed"], newest=1):
            record = decode_record(entry.body)
            assert isinstance(record, Committed)
            return version_view(record.version, record.sequence, entry.unix_time)
        return None


def sentence_of(fleet: Fleet) -> str:
    """One sentence: what the daemon does and why."""
    current = fleet.round
    if current is not None:
        names = ", ".join(current.going())
        why = f" because {current.reason}" if current.reason else ""
        return f"round {current.name} brings {current.version} to {names}: {current.phase.value}{why}"
    if fleet.plan_error:
        return f"no plan: {fleet.plan_error}"
    for version in fleet.waiting_since:
        return f"{version} waits for {waiting_for(fleet, version)}"
    missing = [name for name in fleet.engines if not fleet.attached(name)]
    if missing:
        return f"waits for {', '.join(missing[:8])}{' …' if len(missing) > 8 else ''} to join"
    if not fleet.trainers_whole():
        world = fleet.trainer_world()
        return f"waits for the trainer: {len(fleet.trainers())} of {world or 'an unknown number of'} ranks are here"
    if fleet.memory.committed is None:
        return "ready, and waits for the first version"
    return f"{fleet.memory.committed} is served; waits for the next version"


def _engine(fleet: Fleet, configured: Engine) -> EngineView:
    engine, ranks = fleet.engines[configured.name], fleet.ranks_of(configured.name)
    torn = fleet.torn(configured.name)
    return EngineView(
        name=configured.name,
        url=configured.url,
        role=configured.role,
        state=_state(fleet, configured.name, torn),
        version=version_view(fleet.version_of(configured.name)),
        ranks_connected=len(ranks),
        ranks_expected=ranks[0].hello.world if ranks else 0,
        paused=engine.paused,
        torn=torn,
        error=engine.error or engine.misfit,
    )


def _state(fleet: Fleet, name: str, torn: bool) -> str:
    engine = fleet.engines[name]
    if fleet.round is not None and name in fleet.round.going():
        return "updating"
    if torn:
        return "torn"
    if not engine.reachable:
        return "unreachable"
    if not fleet.attached(name):
        return "joining"
    if engine.misfit:
        return "misfit"
    if not may_serve(fleet, name):
        return "held"
    return "paused" if engine.paused else "serving"


def _trainer(fleet: Fleet, agent: Agent) -> TrainerView:
    staged = agent.staged.version if agent.staged is not None else None
    if agent.member in fleet.unclosed:
        state = "writing"
    elif agent.announce is None:
        state = "connected"
    else:
        state = "ready" if fleet.is_confirmed(agent.member) else "announced"
    host, pid = agent.hello.host, agent.hello.pid
    return TrainerView(rank=agent.member.rank, host=host, pid=pid, state=state, staged=version_view(staged))


def _progress(fleet: Fleet, now: float) -> ProgressView | None:
    current = fleet.round
    if current is None:
        return None
    version = version_view(current.version)
    assert version is not None
    return ProgressView(
        round=str(current.name),
        version=version,
        phase=current.phase.value,
        attempt=current.attempt,
        elapsed_seconds=max(0.0, now - current.began),
    )
