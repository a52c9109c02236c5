"""One engine behind several API servers (external or hybrid data-parallel load balancing): all of them, as one."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from weightsync.orchestrator.daemon.engines.errors import EngineMisconfigured
from weightsync.orchestrator.daemon.engines.interface import (
    EngineClient,
    EngineFacts,
    HubAddress,
    RoundUpdate,
    Switch,
    Switched,
)
from weightsync.orchestrator.protocol.names import Version

T = TypeVar("T")


class SeveralServers:
    """The servers of one engine as one client: each call is made to all, and one that fails is the engine's failure.

    Ranks count over all of them: vLLM numbers its data-parallel ranks over the whole deployment, and each server tells
    how many there are in it.
    """

    def __init__(self, servers: Sequence[EngineClient]) -> None:
        self.name = servers[0].name
        self._servers = tuple(servers)

    async def close(self) -> None:
        """End all connections."""
        for server in self._servers:
            await server.close()

    async def probe(self, deadline: float) -> EngineFacts:
        """Probe all; they must be parts of one deployment.

        Raises:
            EngineMisconfigured: they run different programs, or do not agree on the number of ranks.
        """
        facts = await self._all(lambda server: server.probe(deadline))
        if len({(each.server, each.ranks) for each in facts}) > 1:
            said = ", ".join(sorted({f"{each.server} with {each.ranks} ranks" for each in facts}))
            fix = (
                "give url and more_urls of one data-parallel deployment; servers on their own are engines on their own"
            )
            raise EngineMisconfigured(self.name, "probe", f"its servers are no parts of one engine: {said}", fix)
        return EngineFacts(facts[0].server, facts[0].ranks, (f"{len(facts)} API servers", *facts[0].notes))

    async def attach(self, hub: HubAddress, deadline: float) -> None:
        """Have an agent in every rank of every server connect."""
        await self._all(lambda server: server.attach(hub, deadline))

    async def pause(self, deadline: float) -> None:
        """Pause all."""
        await self._all(lambda server: server.pause(deadline))

    async def update(self, update: RoundUpdate, deadline: float) -> None:
        """Bring all ranks of all servers into the round's window."""
        await self._all(lambda server: server.update(update, deadline))

    async def switch(self, switch: Switch, deadline: float) -> Switched:
        """Switch all, each between two steps of its own. Where one of them is paused, the engine is."""
        done = await self._all(lambda server: server.switch(switch, deadline))
        return Switched(any(each.paused for each in done), max(each.seconds for each in done))

    async def landing(self, deadline: float) -> tuple[str, ...]:
        """The lines of all."""
        told = await self._all(lambda server: server.landing(deadline))
        return tuple(line for lines in told for line in lines)

    async def finish(self, version: Version, deadline: float) -> None:
        """Tell all which version they serve."""
        await self._all(lambda server: server.finish(version, deadline))

    async def resume(self, incarnations: Mapping[int, int], deadline: float) -> None:
        """Resume all."""
        await self._all(lambda server: server.resume(incarnations, deadline))

    async def is_paused(self, deadline: float) -> bool | None:
        """Whether all are. Where only some are, a call to the others was lost: they are paused too, so that the engine
        is one thing again, which can be resumed."""
        paused = await self._all(lambda server: server.is_paused(deadline))
        if True in paused and False in paused:
            running = [server for server, is_so in zip(self._servers, paused, strict=True) if is_so is False]
            await _gathered([server.pause(deadline) for server in running])
            return True
        return next(iter(set(paused))) if len(set(paused)) == 1 else None

    async def _all(self, call: Callable[[EngineClient], Coroutine[Any, Any, T]]) -> list[T]:
        return await _gathered([call(server) for server in self._servers])


async def _gathered(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all answered. Raises the first failure, once all have ended: none may still have its effect then."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    done: list[T] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        done.append(outcome)
    return done
