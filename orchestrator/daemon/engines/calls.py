"""Performs the core's calls to engines and reports each one's end as an event."""

import asyncio
import time
from collections.abc import Callable

from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call, CallDone, CallFailed
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.daemon.engines.errors import EngineError
from weightsync.orchestrator.daemon.engines.vllm import EngineClient
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import RoundName
from weightsync.orchestrator.settings.secrets import read_secret
from weightsync.orchestrator.settings.settings import Settings

Report = Callable[[CallDone | CallFailed], None]


class Engines:
    """All engines' clients. ``report`` is called on the loop with each call's end, whatever it is."""

    def __init__(self, settings: Settings, next_id: Callable[[], int], report: Report) -> None:
        self._settings = settings
        self._next_id, self._report = next_id, report
        self._tasks: set[asyncio.Task[None]] = set()
        self.clients = {
            engine.name: EngineClient(
                engine.name,
                engine.url,
                read_secret(engine.api_key_file) if engine.api_key_file else None,
                settings.deadlines,
            )
            for engine in settings.engines
        }

    def call(self, command: CallEngine) -> None:
        """Start a call; it ends within its deadline, with a report."""
        task = asyncio.get_running_loop().create_task(self._perform(command), name=f"{command.engine} {command.call}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up the calls under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self.clients.values():
            await client.close()

    async def _perform(self, command: CallEngine) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(command.deadline):
                paused = await self._route(command)
        except EngineError as error:
            self._failed(command, str(error), error.fault, error.retry)
        except TimeoutError:
            self._failed(command, f"no answer within {command.deadline:g} s", "engine", retry=True)
        else:
            seconds = time.monotonic() - began
            self._report(CallDone(self._next_id(), command.engine, command.call, command.number, seconds, paused))

    def _failed(self, command: CallEngine, reason: str, fault: Fault, retry: bool) -> None:
        number = self._next_id()
        self._report(CallFailed(number, command.engine, command.call, command.number, reason, fault, retry))

    async def _route(self, command: CallEngine) -> bool | None:
        """Performs one call; returns what is known about the pause afterwards."""
        client, seconds = self.clients[command.engine], command.deadline
        match command.call:
            case Call.PROBE:
                await client.probe(seconds)
                return await client.is_paused(seconds)
            case Call.ATTACH:
                await client.init_transfer(self._init_info(client), seconds)
                return None
            case Call.PAUSE:
                await client.pause(self._settings.pause.mode, self._settings.pause.clear_cache, seconds)
                return True
            case Call.SWITCH:
                await client.start_update(seconds)
                await client.update(self._update_info(command), seconds)
                return True
            case Call.FINISH:
                assert command.version is not None
                await client.finish_update(str(command.version.step), seconds)
                return True
            case Call.RESUME:
                await client.resume(seconds)
                return False

    def _init_info(self, client: EngineClient) -> dict[str, object]:
        settings = self._settings
        return {
            "hub_url": settings.agents_url.replace("http", "ws", 1) + "/agents",
            "token_file": settings.agents_token_path,
            "run_id": settings.run.id,
            "engine": client.name,
            "world": client.facts.world_size if client.facts is not None else 1,
            "deadline_seconds": settings.deadlines.http_seconds,
        }

    def _update_info(self, command: CallEngine) -> dict[str, object]:
        assert command.round is not None
        assert command.version is not None
        return {
            "token": token(command.round),
            "round_epoch": command.round.epoch,
            "round_number": command.round.number,
            "generation": command.version.generation,
            "step": command.version.step,
            "deadline_seconds": command.deadline * AGENT_SHARE,
        }


def token(name: RoundName) -> str:
    """Idempotency token of a round's update call."""
    return f"{name.epoch}.{name.number}"
