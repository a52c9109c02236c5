"""An engine's admin routes: the weight-transfer protocol of vLLM 0.24 to 0.33 behind one client.

What a server offers is found by asking it. ``start_weight_update`` always says ``is_checkpoint_format: false`` (0.24
moves parameters to the meta device otherwise, 0.32 does not read it), ``finish_weight_update`` always the version (0.24
does not read it, and then has no ``/weight_info`` to ask for it).
"""

import asyncio
import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

import msgspec
from weightsync.orchestrator.daemon.engines.errors import DEV_MODE, TRANSFER_CONFIG
from weightsync.orchestrator.daemon.engines.errors import EngineError as EngineError
from weightsync.orchestrator.daemon.engines.errors import EngineLacksRoute as EngineLacksRoute
from weightsync.orchestrator.daemon.engines.errors import EngineNotServable as EngineNotServable
from weightsync.orchestrator.daemon.engines.errors import EngineRefused as EngineRefused
from weightsync.orchestrator.daemon.engines.errors import EngineTimeout as EngineTimeout
from weightsync.orchestrator.daemon.engines.errors import EngineUnreachable as EngineUnreachable
from weightsync.orchestrator.daemon.engines.http import EngineHttp
from weightsync.orchestrator.settings.sections import DeadlinesSection

PauseMode = Literal["keep", "wait", "abort"]

REQUIRED: Final[Mapping[str, str]] = {
    "/pause": "POST",
    "/resume": "POST",
    "/is_paused": "GET",
    "/init_weight_transfer_engine": "POST",
    "/start_weight_update": "POST",
    "/update_weights": "POST",
    "/finish_weight_update": "POST",
    "/get_world_size": "GET",
}
OPTIONAL: Final[Mapping[str, str]] = {
    "/weight_info": "GET",
    "/reset_prefix_cache": "POST",
    "/version": "GET",
}

_NOT_CONFIGURED: Final = "Weight transfer not configured"
"""vLLM's own words when it was started without --weight-transfer-config."""

_NOT_SERVABLE: Final = "weightsync: not servable"
"""Our plugin's words when it keeps an engine held."""

T = TypeVar("T")


class _IsPaused(msgspec.Struct):
    is_paused: bool


class _WorldSize(msgspec.Struct):
    world_size: int


class _WeightInfo(msgspec.Struct):
    weight_version: str | None = None


class _ServerVersion(msgspec.Struct):
    version: str


class _OpenApi(msgspec.Struct):
    paths: dict[str, dict[str, msgspec.Raw]]


class _Success(msgspec.Struct):
    success: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a server can do. ``world_size`` counts ranks over data parallelism; ``version`` is vLLM's own."""

    routes: frozenset[str]
    world_size: int
    version: str = ""

    @property
    def has_version_route(self) -> bool:
        """Whether ``/weight_info`` tells the version that finish was given."""
        return "/weight_info" in self.routes


class EngineClient:
    """One engine. Made inside a running loop. All deadlines are totals, in seconds.

    Every method raises an EngineError: EngineUnreachable, EngineTimeout, EngineRefused or EngineLacksRoute.
    """

    def __init__(self, name: str, url: str, api_key: str | None, deadlines: DeadlinesSection) -> None:
        self.name = name
        self.facts: EngineFacts | None = None
        self._deadlines = deadlines
        self._http = EngineHttp(name, url, api_key)

    async def close(self) -> None:
        """Ends all connections."""
        await self._http.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def probe(self, deadline_seconds: float | None = None) -> EngineFacts:
        """Finds out what the server offers and keeps it in ``facts``.

        Raises:
            EngineLacksRoute: a route is missing; the error says what to set.
        """
        deadline = deadline_seconds or self._deadlines.probe_seconds
        try:
            async with asyncio.timeout(deadline):
                routes = await self._routes(deadline)
                missing = sorted(REQUIRED.keys() - routes)
                if missing:
                    what = f"the server has no {', '.join(missing)}"
                    raise EngineLacksRoute(self.name, "probe", what, f"{DEV_MODE}, and {TRANSFER_CONFIG[11:]}")
                world_size = await self.world_size(deadline)
                version = await self._server_version(deadline) if "/version" in routes else ""
        except TimeoutError as error:
            raise EngineTimeout(self.name, "probe", deadline) from error
        self.facts = EngineFacts(routes, world_size, version)
        return self.facts

    async def is_paused(self, deadline_seconds: float | None = None) -> bool:
        """Whether the scheduler is paused. Waits behind an update under way: the engine core answers it."""
        deadline = deadline_seconds or self._deadlines.probe_seconds
        return (await self._get("/is_paused", deadline, _IsPaused)).is_paused

    async def pause(self, mode: PauseMode, clear_cache: bool, deadline_seconds: float | None = None) -> None:
        """Stops scheduling. A lost answer is looked up in ``/is_paused``."""
        query = {"mode": mode, "clear_cache": "true" if clear_cache else "false"}
        await self._set_paused(True, "/pause", query, deadline_seconds or self._deadlines.pause_seconds)

    async def resume(self, deadline_seconds: float | None = None) -> None:
        """Lets the engine schedule again. A lost answer is looked up in ``/is_paused``.

        Raises:
            EngineNotServable: a worker holds no committed version; the engine stays paused.
        """
        try:
            await self._set_paused(False, "/resume", None, deadline_seconds or self._deadlines.http_seconds)
        except EngineRefused as error:
            if _NOT_SERVABLE in error.excerpt:
                raise EngineNotServable(self.name, "POST /resume", error.status, error.excerpt) from error
            raise

    async def is_alive(self, deadline_seconds: float | None = None) -> bool:
        """Whether the engine core lives; False also when the server says that it died."""
        deadline = deadline_seconds or self._deadlines.probe_seconds
        status, _ = await self._http.ask("GET", "/health", deadline, idempotent=True)
        return status == 200

    async def init_transfer(self, init_info: Mapping[str, object], deadline_seconds: float | None = None) -> None:
        """Hands ``init_info`` to every worker; our class there takes a repetition for what it is."""
        deadline = deadline_seconds or self._deadlines.http_seconds
        path = "/init_weight_transfer_engine"
        try:
            await self._http.exchange("POST", path, deadline, body={"init_info": init_info}, idempotent=True)
        except EngineRefused as error:
            if _NOT_CONFIGURED in error.excerpt:
                what = "no weight transfer is configured in it"
                raise EngineLacksRoute(self.name, f"POST {path}", what, TRANSFER_CONFIG) from error
            raise

    async def start_update(self, deadline_seconds: float | None = None) -> None:
        """Opens an update. Not repeated once it may have arrived: a late second one would replace the session."""
        body = {"is_checkpoint_format": False}
        await self._once("/start_weight_update", body, deadline_seconds or self._deadlines.http_seconds)

    async def update(self, update_info: Mapping[str, object], deadline_seconds: float | None = None) -> None:
        """The call that lasts as long as the round. Never repeated: after an error with ``sent`` the agents know."""
        deadline = deadline_seconds or self._deadlines.transfer_seconds
        await self._once("/update_weights", {"update_info": update_info}, deadline)

    async def finish_update(self, version: str, deadline_seconds: float | None = None) -> None:
        """Closes the update and tells ``version``. Not repeated once it may have arrived."""
        body = {"weight_version": version}
        await self._once("/finish_weight_update", body, deadline_seconds or self._deadlines.http_seconds)

    async def reset_prefix_cache(self, running: bool = False, deadline_seconds: float | None = None) -> bool:
        """Drops the prefix cache; False when blocks are still held. ``running``: preempt those that hold them."""
        deadline = deadline_seconds or self._deadlines.http_seconds
        query = {"reset_running_requests": "true" if running else "false"}
        data = await self._http.exchange("POST", "/reset_prefix_cache", deadline, query=query, idempotent=True)
        return self._decode("POST /reset_prefix_cache", data or b"{}", _Success).success

    async def world_size(self, deadline_seconds: float | None = None) -> int:
        """Ranks of the engine, data-parallel ones included."""
        deadline = deadline_seconds or self._deadlines.probe_seconds
        return (await self._get("/get_world_size", deadline, _WorldSize)).world_size

    async def weight_info(self, deadline_seconds: float | None = None) -> str | None:
        """The version told at the last finish, or None; also None where the server cannot tell."""
        if self.facts is not None and not self.facts.has_version_route:
            return None
        deadline = deadline_seconds or self._deadlines.probe_seconds
        return (await self._get("/weight_info", deadline, _WeightInfo)).weight_version

    async def _set_paused(self, wanted: bool, path: str, query: Mapping[str, str] | None, deadline: float) -> None:
        try:
            await self._http.exchange("POST", path, deadline, query=query, idempotent=True)
        except (EngineTimeout, EngineUnreachable) as error:
            if not error.sent:
                raise
            try:
                paused = await self.is_paused()
            except EngineError:
                raise error from None
            if paused is not wanted:
                raise

    async def _once(self, path: str, body: Mapping[str, object] | None, deadline: float) -> None:
        await self._http.exchange("POST", path, deadline, body=body, idempotent=False)

    async def _get(self, path: str, deadline: float, kind: type[T]) -> T:
        data = await self._http.exchange("GET", path, deadline, idempotent=True)
        return self._decode(f"GET {path}", data, kind)

    def _decode(self, call: str, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EngineRefused(self.name, call, 200, f"an answer that is not vLLM's: {error}") from error

    async def _server_version(self, deadline: float) -> str:
        return (await self._get("/version", deadline, _ServerVersion)).version

    async def _routes(self, deadline: float) -> frozenset[str]:
        """Asks with OPTIONS, which no route of vLLM performs; where a proxy answers that itself, reads its document."""
        wanted = {**REQUIRED, **OPTIONAL}
        answers = [await self._http.ask("OPTIONS", path, deadline, idempotent=True) for path in wanted]
        if all(status in (404, 405) for status, _ in answers):
            return frozenset(path for path, (status, _) in zip(wanted, answers, strict=True) if status == 405)
        document = await self._get("/openapi.json", deadline, _OpenApi)
        return frozenset(path for path, method in wanted.items() if method.lower() in document.paths.get(path, {}))
