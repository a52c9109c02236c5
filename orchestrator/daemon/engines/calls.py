"""Performs the core's calls to engines, whichever kind they are, and reports each one's end as an event."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call, CallDone, CallFailed
from weightsync.orchestrator.core.policy import AGENT_SHARE
from weightsync.orchestrator.daemon.engines.errors import EngineError
from weightsync.orchestrator.daemon.engines.interface import EngineClient, HubAddress, RoundUpdate, Switch
from weightsync.orchestrator.daemon.engines.kinds import client_of, section_of
from weightsync.orchestrator.daemon.hub.hub import AGENTS_PATH
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.tracing import UNTRACED, RoundTraces
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.proof import admin_key
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """After a call that succeeded: whether the engine is paused, None where nobody knows; how long a switch took."""

    paused: bool | None
    switch_seconds: float = 0.0


class Engines:
    """The clients of all engines. Made inside a running loop.

    Args:
        traces: is told of each call.
        admitted: engines that have made themselves members, at present; a client is made with the first call.
        tokens: by an engine's name those that it may hold at present.

    Raises:
        UnknownEngineKind, ConfigError: an engine of the settings cannot be talked to.
    """

    def __init__(
        self,
        settings: Settings,
        inbox: Inbox,
        admitted: Callable[[], Mapping[str, Applicant]] = dict,
        tokens: Callable[[str], Sequence[str]] = lambda name: (),
        traces: RoundTraces = UNTRACED,
    ) -> None:
        self._traces = traces
        self._settings, self._inbox, self._admitted, self._tokens = settings, inbox, admitted, tokens
        self._hub = HubAddress(
            url=settings.agents_url.replace("http", "ws", 1) + AGENTS_PATH,
            run_id=settings.run.id,
        )
        self.clients: dict[str, EngineClient] = {
            engine.name: self._client_of(engine, settings) for engine in settings.engines
        }
        self._of_admitted: dict[str, tuple[Applicant, EngineClient]] = {}
        self._busy: Counter[EngineClient] = Counter()
        self._retired: set[EngineClient] = set()

    def call(self, command: CallEngine) -> None:
        """Start a call; it ends within its deadline, with one CallDone or CallFailed, whatever the engine does."""
        self._inbox.spawn(self._perform(command), f"{command.engine} {command.call}")

    async def close(self) -> None:
        """End all connections. The calls under way are the inbox's to cancel, before this."""
        of_admitted = (client for _, client in self._of_admitted.values())
        for client in (*self.clients.values(), *of_admitted, *self._retired):
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
                made[engine.name] = self._client_of(engine, settings)
        except BaseException:
            for client in made.values():
                await client.close()
            raise
        return made

    async def replace(self, clients: dict[str, EngineClient], settings: Settings) -> None:
        """From now on calls go through these. A call under way ends with the client that it began with."""
        old = [*self.clients.values(), *(client for _, client in self._of_admitted.values())]
        self.clients, self._settings, self._of_admitted = clients, settings, {}
        for client in old:
            if self._busy[client]:
                self._retired.add(client)
            else:
                await client.close()

    def _client_of(self, engine: EngineSection, settings: Settings) -> EngineClient:
        def admin_keys() -> list[str]:
            return [admin_key(token, settings.run.id, engine.name) for token in self._tokens(engine.name)]

        return client_of(engine, settings.pause, settings.engines_tls, admin_keys)

    def _find(self, name: str) -> EngineClient | None:
        """The client of this engine; None where it is no member any more."""
        if name in self.clients:
            return self.clients[name]
        admitted = self._admitted()
        engine, known = admitted.get(name), self._of_admitted.get(name)
        if engine is not None and known is not None and known[0] == engine:
            return known[1]
        gone = [other for other, (was, _) in self._of_admitted.items() if admitted.get(other) != was]
        self._retired |= {self._of_admitted.pop(other)[1] for other in gone}
        if engine is None:
            return None
        client = self._client_of(section_of(engine, self._settings), self._settings)
        self._of_admitted[name] = engine, client
        return client

    @contextlib.asynccontextmanager
    async def _client(self, engine: str) -> AsyncIterator[EngineClient]:
        client = self._find(engine)
        if client is None:  # it left after the call was decided
            raise EngineError(engine, "call", "it is no member any more", sent=False)
        self._busy[client] += 1
        try:
            yield client
        finally:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]
            for over in [other for other in self._retired if not self._busy[other]]:
                self._retired.discard(over)
                await over.close()

    async def _perform(self, command: CallEngine) -> None:
        with self._traces.calling(command) as call:
            call.error = await self._performed(command)

    async def _performed(self, command: CallEngine) -> str:
        """Make the call and report its end; why it failed, or nothing."""
        began = time.monotonic()
        try:
            # Also around clients that keep to their deadline: a probe is two calls, and they have it together.
            async with asyncio.timeout(command.deadline):
                async with self._client(command.engine) as client:
                    done = await self._ask(client, command)
        except EngineError as error:
            return self._failed(command, str(error), error.fault, error.retry)
        except ConfigError as error:  # the key of those that were admitted
            return self._failed(command, str(error), "config", retry=True)
        except TimeoutError:
            return self._failed(command, f"no answer within {command.deadline:g} s", "engine", retry=True)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the daemon ends, and nobody waits for a report
            return self._failed(command, "the client gave the call up by itself", "daemon", retry=True)
        except Exception as error:  # a client that breaks its contract costs its own engine and no other
            log.exception("the client of an engine broke", engine=command.engine, call=command.call)
            return self._failed(command, f"engine {command.engine}: {command.call}: {error!r}", "daemon", retry=True)
        seconds = time.monotonic() - began
        self._inbox.post(CallDone(
            self._inbox.next_id(), command.engine, command.call, command.number, seconds,
            done.paused, done.switch_seconds,
        ))  # fmt: skip
        return ""

    def _failed(self, command: CallEngine, reason: str, fault: Fault, retry: bool) -> str:
        number, why = self._inbox.next_id(), clean(reason)
        self._inbox.post(CallFailed(number, command.engine, command.call, command.number, why, fault, retry))
        return why

    async def _ask(self, client: EngineClient, command: CallEngine) -> _Known:
        """Performs one call; returns what is known afterwards."""
        deadline = command.deadline
        match command.call:
            case Call.PROBE:
                await client.probe(deadline)
                return _Known(await client.is_paused(deadline))
            case Call.ATTACH:
                await client.attach(self._hub, deadline)
                return _Known(None)
            case Call.PAUSE:
                await client.pause(deadline)
                return _Known(True)
            case Call.UPDATE:
                assert command.round is not None
                assert command.version is not None
                await client.update(RoundUpdate(command.round, command.version, deadline * AGENT_SHARE), deadline)
                return _Known(True)
            case Call.SWITCH:
                assert command.round is not None
                assert command.version is not None
                rank_seconds = deadline * AGENT_SHARE
                wanted = Switch(command.round, command.version, dict(command.ranks), rank_seconds)
                switched = await client.switch(wanted, deadline)
                return _Known(switched.paused, switched.seconds)
            case Call.FINISH:
                assert command.version is not None
                await client.finish(command.version, deadline)
                return _Known(True)
            case Call.RESUME:
                await client.resume(dict(command.ranks), deadline)
                return _Known(False)
