"""vLLM's admin routes: the weight-transfer protocol of vLLM 0.24 to 0.33 behind the engine seam.

The one module of the daemon that knows vLLM. What a server offers is found by asking it. ``start_weight_update`` always
says ``is_checkpoint_format: false`` (0.24 moves parameters to the meta device otherwise, 0.32 does not read it),
``finish_weight_update`` always the version (0.24 does not read it, and then has no ``/weight_info`` to ask for it).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Final, NoReturn, TypeVar

import msgspec
from weightsync.orchestrator.daemon.engines.errors import (
    EngineError,
    EngineGarbled,
    EngineMisconfigured,
    EngineNotServable,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
)
from weightsync.orchestrator.daemon.engines.http import EngineHttp, excerpt_of
from weightsync.orchestrator.daemon.engines.interface import (
    EngineFacts,
    EngineSetup,
    HubAddress,
    RoundUpdate,
    Switch,
    Switched,
)
from weightsync.orchestrator.protocol.fields import Seconds, World
from weightsync.orchestrator.protocol.limits import MAX_NAME_CHARS
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.text import clean

REQUIRED: Final[Mapping[str, str]] = {
    "/pause": "POST",
    "/collective_rpc": "POST",
    "/is_paused": "GET",
    "/init_weight_transfer_engine": "POST",
    "/start_weight_update": "POST",
    "/update_weights": "POST",
    "/finish_weight_update": "POST",
    "/get_world_size": "GET",
}
OPTIONAL: Final[Mapping[str, str]] = {
    "/weight_info": "GET",
    "/version": "GET",
}

DEV_MODE: Final = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment"
"""vLLM has the routes of REQUIRED only then."""

TRANSFER_CONFIG: Final = '--weight-transfer-config \'{"backend": "weightsync"}\''
"""Makes every worker load our plugin's class."""

_NOT_CONFIGURED: Final = "Weight transfer not configured"
"""vLLM's own words when it was started without --weight-transfer-config."""

_RESUME: Final = "weightsync_resume"
"""Method of ``/collective_rpc`` that our plugin answers in the engine core: ``/resume`` cannot say whom it means."""

_SWITCH: Final = "weightsync_switch"
"""Likewise: between two steps, every worker's standby becomes what it serves."""

_LANDING: Final = "weightsync_landing"
"""Likewise: how versions land in each rank, and why."""

_NOT_SERVABLE: Final = "weightsync: not servable"
"""Our plugin's words when it keeps an engine held."""

_NO_UPDATE: Final = "call /start_weight_update first"
"""Our plugin's words to an update that nobody has opened; no rank has seen it then."""

T = TypeVar("T")


class _IsPaused(msgspec.Struct):
    is_paused: bool


class _WorldSize(msgspec.Struct):
    world_size: World


class _ServerVersion(msgspec.Struct):
    version: str


class _Switch(msgspec.Struct):
    """Of each engine core that answers."""

    paused: bool
    seconds: Seconds


class _Switches(msgspec.Struct):
    results: Annotated[list[_Switch], msgspec.Meta(min_length=1)]


class _Landings(msgspec.Struct):
    """Of each rank."""

    results: list[str]


class _Done(msgspec.Struct):
    """Of every POST route, in all releases: which of them depends on the route."""

    status: str = ""
    message: str = ""
    results: list[msgspec.Raw] | None = None


class _OpenApi(msgspec.Struct):
    paths: dict[str, dict[str, msgspec.Raw]]


class VllmClient:
    """One vLLM server, as ``interface.EngineClient`` describes it. ``routes``: those of ours that the probe found."""

    def __init__(self, setup: EngineSetup) -> None:
        self.name = setup.name
        self.routes: frozenset[str] = frozenset()
        self._setup = setup
        self._ranks: int | None = None
        self._http = EngineHttp(setup.name, setup.url, setup.api_key, setup.tls, setup.admin_keys)

    async def close(self) -> None:
        """End all connections."""
        await self._http.close()

    async def probe(self, deadline: float) -> EngineFacts:
        """Ask which routes there are, how many ranks, and which vLLM it is. Every pause mode is offered by all.

        Raises:
            EngineMisconfigured: a route is missing; the error says what to set.
        """
        async with self._within("probe", deadline):
            self.routes = await self._routes(deadline)
            missing = sorted(REQUIRED.keys() - self.routes)
            if missing:
                what = f"the server has no {', '.join(missing)}"
                fix = f"{DEV_MODE}, and with {TRANSFER_CONFIG}"
                raise EngineMisconfigured(self.name, "probe", what, fix)
            ranks = self._ranks = (await self._get("/get_world_size", deadline, _WorldSize)).world_size
            version = await self._server_version(deadline) if "/version" in self.routes else "?"
        told = "tells its weight version" if "/weight_info" in self.routes else "cannot tell its weight version"
        return EngineFacts(f"vLLM {version}", ranks, (told,))

    async def is_paused(self, deadline: float) -> bool:
        """Whether the scheduler is paused. Waits behind an update under way: the engine core answers it."""
        return (await self._get("/is_paused", deadline, _IsPaused)).is_paused

    async def attach(self, hub: HubAddress, deadline: float) -> None:
        """Hand the hub's address to every worker; our class there takes a repetition for what it is.

        Raises:
            EngineMisconfigured: the server was started without ``--weight-transfer-config``.
        """
        path = "/init_weight_transfer_engine"
        async with self._within(f"POST {path}", deadline):
            if self._ranks is None:  # every worker is told how many there are, and nobody has asked yet
                await self.probe(deadline)
            info = {
                "hub_url": hub.url,
                "run_id": hub.run_id,
                "engine": self.name,
                "world": self._ranks,
            }
            try:
                await self._post(path, deadline, body={"init_info": info}, idempotent=True)
            except EngineRefused as error:
                if _NOT_CONFIGURED in error.excerpt:
                    what = "no weight transfer is configured in it"
                    fix = f"start vLLM with {TRANSFER_CONFIG}"
                    raise EngineMisconfigured(self.name, f"POST {path}", what, fix) from error
                raise

    async def pause(self, deadline: float) -> None:
        """Stop scheduling; a lost answer is looked up in ``/is_paused``.

        The update that the pause is for is opened beside it: that costs the pause nothing, and tells our plugin whose
        pause it is. Starting again what was started replaces it.
        """
        # What vLLM drops it drops with the kept requests' own part, so that they are computed again.
        clear_cache = "false" if self._setup.cache == "keep" else "true"
        query = {"mode": self._setup.pause_mode, "clear_cache": clear_cache}
        opened = self._post("/start_weight_update", deadline, body={"is_checkpoint_format": False}, idempotent=True)
        paused = self._set_paused(True, "/pause", deadline, query=query)
        for outcome in await asyncio.gather(paused, opened, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def resume(self, incarnations: Mapping[int, int], deadline: float) -> None:
        """Schedule again; a lost answer is looked up in ``/is_paused``.

        Raises:
            EngineNotServable: a worker holds no committed version or is another process; the engine stays paused.
        """
        means = {str(rank): incarnation for rank, incarnation in incarnations.items()}
        body = {"method": _RESUME, "kwargs": {"incarnations": means}}
        try:
            await self._set_paused(False, "/collective_rpc", deadline, body=body)
        except EngineRefused as error:
            self._refused(error, "resume")

    async def update(self, update: RoundUpdate, deadline: float) -> None:
        """Make the call that lasts as long as the round, in the update that the pause has opened.

        Not repeated once it may have reached a rank. A round that failed has closed the update of a pause that still
        holds; another is opened then.
        """
        info = {
            "token": str(update.round),
            "round_epoch": update.round.epoch,
            "round_number": update.round.number,
            "generation": update.version.generation,
            "step": update.version.step,
            "deadline_seconds": update.rank_seconds,
            "exposes": True,
        }
        async with self._within("update", deadline):
            try:
                await self._once("/update_weights", {"update_info": info}, deadline)
            except EngineRefused as error:
                if _NO_UPDATE not in error.excerpt:
                    raise
                await self._once("/start_weight_update", {"is_checkpoint_format": False}, deadline)
                await self._once("/update_weights", {"update_info": info}, deadline)

    async def switch(self, switch: Switch, deadline: float) -> Switched:
        """Asked again when its answer is lost, until the deadline: our plugin knows what it has done.

        Raises:
            EngineNotServable: a worker has not this version in its standby or is another process.
        """
        means = {
            "round": [switch.round.epoch, switch.round.number],
            "version": [switch.version.generation, switch.version.step],
            "incarnations": {str(rank): incarnation for rank, incarnation in switch.incarnations.items()},
            "cache": self._setup.cache,
            "deadline_seconds": switch.rank_seconds,
        }
        body = {"method": _SWITCH, "kwargs": means}
        try:
            data = await self._http.exchange("POST", "/collective_rpc", deadline, body=body, idempotent=True)
        except EngineRefused as error:
            self._refused(error, "switch")
        answers = self._read("POST /collective_rpc", data, _Switches).results
        return Switched(any(each.paused for each in answers), max(each.seconds for each in answers))

    async def landing(self, deadline: float) -> tuple[str, ...]:
        """A line for each rank, from our plugin."""
        body = {"method": _LANDING}
        data = await self._http.exchange("POST", "/collective_rpc", deadline, body=body, idempotent=True)
        told = self._read("POST /collective_rpc", data, _Landings).results
        return tuple(clean(line) for line in told)

    async def finish(self, version: Version, deadline: float) -> None:
        """Close the update and tell the version's step. Not repeated once it may have arrived."""
        await self._once("/finish_weight_update", {"weight_version": str(version.step)}, deadline)

    def _refused(self, error: EngineRefused, call: str) -> NoReturn:
        """Raises the refusal as what it is."""
        if _NOT_SERVABLE in error.excerpt:
            raise EngineNotServable(self.name, call, error.status, error.excerpt) from error
        raise error

    @contextlib.asynccontextmanager
    async def _within(self, call: str, deadline: float) -> AsyncIterator[None]:
        """One deadline for several exchanges."""
        try:
            async with asyncio.timeout(deadline):
                yield
        except TimeoutError as error:
            raise EngineTimeout(self.name, call, deadline) from error

    async def _set_paused(
        self,
        wanted: bool,
        path: str,
        deadline: float,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
    ) -> None:
        try:
            await self._post(path, deadline, query=query, body=body, idempotent=True)
        except (EngineTimeout, EngineUnreachable, EngineGarbled) as error:
            if not error.sent:
                raise
            try:
                # With as long again: whoever called with one deadline for both has given up by then.
                paused = await self.is_paused(deadline)
            except EngineError:
                raise error from None  # nobody knows; what went wrong first says more
            if paused is not wanted:
                raise  # the answer was lost, and so was the request

    async def _once(self, path: str, body: Mapping[str, object], deadline: float) -> None:
        await self._post(path, deadline, body=body, idempotent=False)

    async def _post(
        self,
        path: str,
        deadline: float,
        *,
        body: Mapping[str, object] | None = None,
        query: Mapping[str, str] | None = None,
        idempotent: bool,
    ) -> None:
        data = await self._http.exchange("POST", path, deadline, body=body, query=query, idempotent=idempotent)
        done = self._read(f"POST {path}", data, _Done)
        if not done.status and not done.message and done.results is None:
            raise EngineGarbled(self.name, f"POST {path}", excerpt_of(data))

    async def _get(self, path: str, deadline: float, kind: type[T]) -> T:
        return self._read(f"GET {path}", await self._http.exchange("GET", path, deadline, idempotent=True), kind)

    def _read(self, call: str, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EngineGarbled(self.name, call, f"{excerpt_of(data) or 'nothing'} ({error})") from error

    async def _server_version(self, deadline: float) -> str:
        return clean((await self._get("/version", deadline, _ServerVersion)).version, MAX_NAME_CHARS)

    async def _routes(self, deadline: float) -> frozenset[str]:
        """Asks with OPTIONS, which no route of vLLM performs; where a proxy answers that itself, reads its document."""
        wanted = {**REQUIRED, **OPTIONAL}
        answers = [await self._http.ask("OPTIONS", path, deadline, idempotent=True) for path in wanted]
        # A route that knows other methods answers 405, one that does not exist 404.
        if all(status in (404, 405) for status, _ in answers):
            return frozenset(path for path, (status, _) in zip(wanted, answers, strict=True) if status == 405)
        document = await self._get("/openapi.json", deadline, _OpenApi)
        return frozenset(path for path, method in wanted.items() if method.lower() in document.paths.get(path, {}))
