"""Performs the core's calls to engines, whichever kind they are, and reports each one's end as an event."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator

import structlog
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call, CallDone, CallFailed
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.daemon.engines.errors import EngineError
from weightsync.orchestrator.daemon.engines.interface import EngineClient, HubAddress, Switch
from weightsync.orchestrator.daemon.engines.kinds import client_of
from weightsync.orchestrator.daemon.hub.hub import AGENTS_PATH
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.settings.settings import Settings

log = structlog.get_logger(__name__)


class Engines:
    """The clients of all configured engines. Made inside a running loop.

    Raises:
        UnknownEngineKind, ConfigError: an engine of the settings cannot be talked to.
    """

    def __init__(self, settings: Settings, inbox: Inbox) -> None:
        self._inbox = inbox
        self._hub = HubAddress(
            url=settings.agents_url.replace("http", "ws", 1) + AGENTS_PATH,
            token_file=settings.agents_token_path,
            run_id=settings.run.id,
        )
        self.clients: dict[str, EngineClient] = {
            engine.name: client_of(engine, settings.pause, settings.engines_tls) for engine in settings.engines
        }
        self._busy: Counter[EngineClient] = Counter()
        self._retired: set[EngineClient] = set()

    def call(self, command: CallEngine) -> None:
        """Start a call; it ends within its deadline, with one CallDone or CallFailed, whatever the engine does."""
        self._inbox.spawn(self._perform(command), f"{command.engine} {command.call}")

    async def close(self) -> None:
        """End all connections. The calls under way are the inbox's to cancel, before this."""
        for client in (*self.clients.values(), *self._retired):
            await client.close()

    async def made_for(self, settings: Settings) -> dict[str, EngineClient]:
        """New clients for the engines of ``settings``, which ``replace`` takes.

        Raises:
            ConfigError: a key file cannot be read.
            UnknownEngineKind: nobody here can talk to one of them.
        """
        made: dict[str, EngineClient] = {}
        try:
            for engine in settings.engines:
                made[engine.name] = client_of(engine, settings.pause, settings.engines_tls)
        except BaseException:
            for client in made.values():
                await client.close()
            raise
        return made

    async def replace(self, clients: dict[str, EngineClient]) -> None:
        """From now on calls go through these. A call under way ends with the client that it began with."""
        old, self.clients = self.clients, clients
        for client in old.values():
            if self._busy[client]:
                self._retired.add(client)
            else:
                await client.close()

    @contextlib.asynccontextmanager
    async def _client(self, engine: str) -> AsyncIterator[EngineClient]:
        client = self.clients.get(engine)
        if client is None:  # it left the configuration after the call was decided
            raise EngineError(engine, "call", "it is no member any more", sent=False)
        self._busy[client] += 1
        try:
            yield client
        finally:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]
                if client in self._retired:
                    self._retired.discard(client)
                    await client.close()

    async def _perform(self, command: CallEngine) -> None:
        began = time.monotonic()
        try:
            # Also around clients that keep to their deadline: a probe is two calls, and they have it together.
            async with asyncio.timeout(command.deadline):
                async with self._client(command.engine) as client:
                    paused = await self._ask(client, command)
        except EngineError as error:
            self._failed(command, str(error), error.fault, error.retry)
        except TimeoutError:
            self._failed(command, f"no answer within {command.deadline:g} s", "engine", retry=True)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the daemon ends, and nobody waits for a report
            self._failed(command, "the client gave the call up by itself", "daemon", retry=True)
        except Exception as error:  # a client that breaks its contract costs its own engine and no other
            log.exception("the client of an engine broke", engine=command.engine, call=command.call)
            self._failed(command, f"engine {command.engine}: {command.call}: {error!r}", "daemon", retry=True)
        else:
            seconds = time.monotonic() - began
            self._inbox.post(
                CallDone(self._inbox.next_id(), command.engine, command.call, command.number, seconds, paused)
            )

    def _failed(self, command: CallEngine, reason: str, fault: Fault, retry: bool) -> None:
        number = self._inbox.next_id()
        self._inbox.post(CallFailed(number, command.engine, command.call, command.number, clean(reason), fault, retry))

    async def _ask(self, client: EngineClient, command: CallEngine) -> bool | None:
        """Performs one call; returns what is known about the pause afterwards, None where nothing is."""
        deadline = command.deadline
        match command.call:
            case Call.PROBE:
                await client.probe(deadline)
                return await client.is_paused(deadline)
            case Call.ATTACH:
                await client.attach(self._hub, deadline)
                return None
            case Call.PAUSE:
                await client.pause(deadline)
                return True
            case Call.SWITCH:
                assert command.round is not None
                assert command.version is not None
                await client.switch(Switch(command.round, command.version, deadline * AGENT_SHARE), deadline)
                return True
            case Call.FINISH:
                assert command.version is not None
                await client.finish(command.version, deadline)
                return True
            case Call.RESUME:
                await client.resume(dict(command.ranks), deadline)
                return False
