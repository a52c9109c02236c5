"""Before a vLLM server's admin routes: nobody gets there without the key that is made from the engine's token.

vLLM's own ``--api-key`` does not cover them. The plugin puts itself around every application of an API server process
whose engine is ours; nothing has to be set, and nothing can be forgotten. A server of a kind that it cannot stand in
front of does not start.
"""

import functools
import hmac
import inspect
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final

from weightsync.agents.errors import AgentError
from weightsync.agents.inference.place import TOKEN_VARIABLE, Place, is_loopback, place_of
from weightsync.agents.link.token import read_tokens
from weightsync.agents.vllm.backend import chosen, logger
from weightsync.agents.vllm.routes import OPEN_VARIABLE, open_routes
from weightsync.orchestrator.protocol.proof import ADMIN_HEADER, admin_key
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.token import TokenError

READ_AGAIN_SECONDS: Final = 1.0
"""A token that was replaced counts after so long."""

SAY_AGAIN_SECONDS: Final = 60.0
"""Between two lines of the log about requests that were turned away."""

MAX_OFFERED: Final = 8
"""Keys in one request that are looked at; the daemon offers four at most: of two files with two tokens each."""

RUST_VARIABLE: Final = "VLLM_USE_RUST_FRONTEND"

_PASSED: Final = "weightsync.guard"
"""In the scope of a request that was let in, for applications inside of others."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class GuardUnavailable(AgentError):
    """Nothing would stand before this server's admin routes. Nothing to retry; the message says what to change."""


class AdminKeys:
    """The keys that open this engine's admin routes: of each token in its file, which is read again now and then."""

    def __init__(self, place: Place, clock: Callable[[], float] = time.monotonic) -> None:
        self._place, self._clock = place, clock
        self._keys: tuple[bytes, ...] = ()
        self._read_at, self._trouble = float("-inf"), ""

    def hold(self, offered: Iterable[str]) -> bool:
        """Whether one of ``offered`` is a key."""
        keys = self._present()
        # All are compared, so that the time taken tells nothing of them.
        return sum(hmac.compare_digest(one.encode(errors="replace"), key) for one in offered for key in keys) > 0

    def _present(self) -> tuple[bytes, ...]:
        if (now := self._clock()) - self._read_at >= READ_AGAIN_SECONDS:
            self._read_at, place, trouble = now, self._place, ""
            tokens: tuple[str, ...] = ()
            try:
                tokens = read_tokens(place.token_file)
            except TokenError as error:
                trouble = str(error)
            if trouble and trouble != self._trouble:
                logger.error("weightsync: %s: %s; the admin routes are closed to all", TOKEN_VARIABLE, trouble)
            self._trouble = trouble
            self._keys = tuple(admin_key(token, place.run_id, place.engine).encode() for token in tokens)
        return self._keys


class AdminGuard:
    """Lets requests through to an ASGI application, or answers them with 401.

    Raises:
        RoutesError: OPEN_VARIABLE cannot be followed.
    """

    def __init__(self, place: Place, clock: Callable[[], float] = time.monotonic) -> None:
        self._place, self._clock = place, clock
        self._keys = AdminKeys(place, clock)
        self._open = open_routes()
        self._said_at, self._unsaid = float("-inf"), 0

    @property
    def demo(self) -> bool:
        """Whether all on this machine are let in."""
        return self._place.demo

    async def serve(self, app: Application, scope: Message, receive: Receive, send: Send) -> None:
        """One request of ``app``."""
        if scope["type"] == "lifespan" or scope.get(_PASSED) or self._admits(scope):
            scope[_PASSED] = True
            await app(scope, receive, send)
            return
        self._say(scope)
        await _refuse(scope, receive, send)

    def _admits(self, scope: Message) -> bool:
        if scope["type"] not in ("http", "websocket"):
            return False
        if self._open.fullmatch(routed(scope)) or self._keys.hold(offered(scope)):
            return True
        return self._place.demo and _is_local(scope) and not _is_of_a_page(scope)

    def _say(self, scope: Message) -> None:
        now = self._clock()
        if now - self._said_at < SAY_AGAIN_SECONDS:
            self._unsaid += 1
            return
        who, path = (scope.get("client") or ("?",))[0], clean(str(scope["path"]), 100)
        more = f"; {self._unsaid} more were before" if self._unsaid else ""
        logger.warning("weightsync: %s was refused %s: no admin key of this engine%s", who, path, more)
        self._said_at, self._unsaid = now, 0


def routed(scope: Message) -> str:
    """The path that Starlette compares with its routes: what follows ``root_path``, if it begins with that."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and (path == root or path.startswith(root.rstrip("/") + "/")):
        return path[len(root.rstrip("/")) :]
    return path


def offered(scope: Message) -> list[str]:
    """The keys that a request brings: in our own header, or as a bearer's token."""
    found: list[str] = []
    for name, value in scope.get("headers", ()):
        text = value.decode("latin-1").strip()
        if name.lower() == ADMIN_HEADER.lower().encode():
            found += [part.strip() for part in text.split(",", MAX_OFFERED)]
        elif name.lower() == b"authorization" and text[:7].lower() == "bearer ":
            found.append(text[7:].strip())
    return found[:MAX_OFFERED]


def _is_local(scope: Message) -> bool:
    host = (scope.get("client") or ("",))[0]
    return host == "::1" or host.startswith(("127.", "::ffff:127."))


def _is_of_a_page(scope: Message) -> bool:
    """Whether a web page may have a browser on this machine send it: Origin, Sec-Fetch-Site, or a name of its own in
    Host that it has led here. What is typed or linked by hand is of none."""
    found = {name.lower(): value.decode("latin-1").strip() for name, value in scope.get("headers", ())}
    by_hand = found.get(b"sec-fetch-site", "none") == "none" and b"origin" not in found
    return not by_hand or not is_loopback(f"//{found.get(b'host', 'localhost')}")


REFUSAL: Final = (
    "weightsync: this route asks for the engine's admin key, and none came or another one. The daemon makes it from"
    " the engine's token: this server's WEIGHTSYNC_TOKEN_FILE must be one of the daemon's credentials for engines, and"
    f" WEIGHTSYNC_RUN_ID and WEIGHTSYNC_ENGINE its names. A route for clients is opened by {OPEN_VARIABLE}"
)


async def _refuse(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # its connect; closed before it is accepted, it is answered with 403
        await send({"type": "websocket.close", "code": 1008, "reason": "admin key"})
        return
    body = json.dumps({"error": REFUSAL}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
        (b"connection", b"close"),  # its body is not read
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def missing_hooks() -> list[str]:
    """What the guard needs and this vLLM does not have; empty when it stands before every application."""
    try:
        from starlette.applications import Starlette
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        return [str(error)]
    missing = [] if "vllm_config" in inspect.signature(AsyncLLM.__init__).parameters else ["AsyncLLM(vllm_config)"]
    return missing if inspect.iscoroutinefunction(Starlette.__call__) else [*missing, "Starlette.__call__"]


def require() -> Place:
    """The engine's place; called in every process of it, before anything answers.

    Raises:
        PlaceError: the environment does not say it.
        GuardUnavailable: nothing would stand before the admin routes.
    """
    if missing := missing_hooks():
        raise GuardUnavailable(
            f"weightsync: nothing can stand before this vLLM's admin routes, it has no {', '.join(missing)}; use a vLLM"
            " that weightsync supports"
        )
    if has_rust_frontend(os.environ):
        raise GuardUnavailable(
            f"weightsync: {RUST_VARIABLE} is set, and nothing of ours can stand before the routes of that server;"
            f" unset {RUST_VARIABLE}"
        )
    return place_of(os.environ)


def has_rust_frontend(environ: Mapping[str, str]) -> bool:
    """Whether a server of this environment has routes that nothing of ours can stand before."""
    return environ.get(RUST_VARIABLE, "0").strip().lower() not in ("", "0", "false")


def install() -> None:
    """Guards the applications of this process from the moment an engine of ours is made in it. May be repeated."""
    if missing := missing_hooks():
        logger.debug("weightsync: no guard in this vLLM, it has no %s", ", ".join(missing))
        return
    from vllm.v1.engine.async_llm import AsyncLLM

    make = AsyncLLM.__init__
    if getattr(make, "weightsync_guard", False):
        return
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        if chosen(signature.bind_partial(self, *args, **kwargs).arguments.get("vllm_config")):
            stand_before_applications(AdminGuard(require()))
        make(self, *args, **kwargs)

    make_guarded.weightsync_guard = True  # type: ignore[attr-defined]
    AsyncLLM.__init__ = make_guarded


def stand_before_applications(guard: AdminGuard) -> None:
    """Around every Starlette or FastAPI application of this process. A second guard takes the place of the first."""
    from starlette.applications import Starlette

    call = getattr(Starlette.__call__, "weightsync_guarded", Starlette.__call__)

    @functools.wraps(call)
    async def guarded(self: Any, scope: Message, receive: Receive, send: Send) -> None:
        await guard.serve(functools.partial(call, self), scope, receive, send)

    guarded.weightsync_guarded = call  # type: ignore[attr-defined]
    Starlette.__call__ = guarded  # type: ignore[method-assign]
    if guard.demo:
        logger.warning("weightsync: WEIGHTSYNC_LOOPBACK_DEMO=1: all on this machine may call the admin routes")
