"""The guard before admin routes: real FastAPI applications, called as a server calls them."""

import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_places import TOKEN, place, token_file
from weightsync.agents.inference.place import Place, PlaceError, place_of
from weightsync.agents.vllm import guard
from weightsync.agents.vllm.routes import RoutesError
from weightsync.orchestrator.protocol.proof import ADMIN_HEADER, admin_key

pytest.importorskip("fastapi")
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette

KEY = admin_key(TOKEN, "glm", "a0")
STRANGER = ("192.0.2.7", 4711)


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return place_of(place(token_file(tmp_path), "ws://head:7410/agents", "glm", "a0"))


@pytest.fixture(autouse=True)
def _own_starlette() -> Iterator[None]:
    """No test leaves its guard around the applications of others."""
    before = Starlette.__call__
    yield
    Starlette.__call__ = before  # type: ignore[method-assign]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def application(root_path: str = "") -> FastAPI:
    """A server's, with another one inside and a WebSocket."""
    app, inner = FastAPI(root_path=root_path), FastAPI()

    @app.get("/health")
    @app.post("/pause")
    @app.get("/brand/new")
    async def done() -> str:
        return "done"

    @inner.get("/pause")
    async def within() -> str:
        return "within"

    @app.websocket("/v1/realtime")
    @app.websocket("/control")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    app.mount("/inner", inner)
    return app


async def ask(app: Any, path: str, method: str = "GET", client: Any = STRANGER, **headers: str) -> int:
    """The status of its answer; of a WebSocket, 101 or 403."""
    sent: list[Any] = []
    kind = "websocket" if method == "WS" else "http"
    received = iter([{"type": "websocket.connect"} if kind == "websocket" else {"type": "http.request", "body": b""}])

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": kind, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()],
        "client": client, "server": ("h", 80), "http_version": "1.1", "method": method, "subprotocols": [],
    }  # fmt: skip
    await app(scope, receive, send)
    first = sent[0]
    if kind == "websocket":
        return 101 if first["type"] == "websocket.accept" else 403
    return int(first["status"])


def admin(*keys: str) -> dict[str, str]:
    return {ADMIN_HEADER: ",".join(keys)}


def guarded(here: Place, **options: Any) -> FastAPI:
    guard.stand_before_applications(guard.AdminGuard(here, **options))
    return application()


# ----------------------------------------------------------------------------------------------------- who is let in
async def test_clients_need_no_key(here: Place) -> None:
    app = guarded(here)
    assert await ask(app, "/health") == 200
    assert await ask(app, "/v1/realtime", "WS") == 101


@pytest.mark.parametrize("path", ["/pause", "/brand/new", "/inner/pause", "/nothing/there", "/pause/"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE"])
async def test_without_the_key_every_other_path_is_closed(here: Place, path: str, method: str) -> None:
    assert await ask(guarded(here), path, method) == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        admin(""),
        admin("0" * 64),
        admin(KEY[:-1]),
        admin(KEY.upper()),
        admin(KEY + "é"),
        admin(TOKEN),
        admin(admin_key(TOKEN, "glm", "a1")),
        admin(admin_key(TOKEN, "other", "a0")),
        admin(admin_key("trainer-0123456789", "glm", "a0")),
        admin(*["0" * 64] * 8, KEY),
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {TOKEN}"},
    ],
    ids=[
        "none", "empty", "wrong", "cut", "case", "odd", "token", "engine", "run", "trainer", "many", "basic", "bare",
        "bearer",
    ],
)  # fmt: skip
async def test_what_is_no_key_of_this_engine(here: Place, headers: dict[str, str]) -> None:
    app = guarded(here)
    assert await ask(app, "/pause", "POST", **headers) == 401
    assert await ask(app, "/control", "WS", **headers) == 403


@pytest.mark.parametrize(
    "headers",
    [admin(KEY), admin("0" * 64, KEY), admin(f" {KEY} "), {"Authorization": f"Bearer {KEY}"},
     {"Authorization": f"bearer {KEY}"}, {"Authorization": "Bearer other", ADMIN_HEADER: KEY}],
    ids=["alone", "second", "blanks", "bearer", "lower case", "beside an API key"],
)  # fmt: skip
async def test_with_the_key_all_is_open(here: Place, headers: dict[str, str]) -> None:
    app = guarded(here)
    assert await ask(app, "/pause", "POST", **headers) == 200
    assert await ask(app, "/inner/pause", **headers) == 200
    assert await ask(app, "/nothing/there", **headers) == 404
    assert await ask(app, "/control", "WS", **headers) == 101


async def test_a_token_that_takes_the_place_of_another(here: Place) -> None:
    clock, new = Clock(), "engine-9876543210"
    app = guarded(here, clock=clock)
    renewed = admin_key(new, "glm", "a0")
    assert await ask(app, "/pause", "POST", **admin(renewed)) == 401
    here.token_file.write_text(f"{new}\n{TOKEN}\n")
    clock.now = guard.READ_AGAIN_SECONDS
    assert [await ask(app, "/pause", "POST", **admin(key)) for key in (renewed, KEY)] == [200, 200]
    here.token_file.write_text(f"{new}\n")
    clock.now *= 2
    assert [await ask(app, "/pause", "POST", **admin(key)) for key in (renewed, KEY)] == [200, 401]


async def test_without_its_token_all_is_closed_and_clients_go_on(here: Place, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    app = guarded(here, clock=clock)
    here.token_file.unlink()
    for _ in range(3):
        assert await ask(app, "/pause", "POST", **admin(KEY, admin_key("", "glm", "a0"))) == 401
        clock.now += guard.READ_AGAIN_SECONDS
    assert await ask(app, "/health") == 200
    assert caplog.text.count("No such file") == 1, "it is told once"


async def test_a_prefix_of_a_proxy_changes_nothing(here: Place) -> None:
    guard.stand_before_applications(guard.AdminGuard(here))
    app = application("/api")
    assert [await ask(app, path) for path in ("/api/health", "/health")] == [200, 200]
    for path in ("/api/pause", "/pause", "/api/api/health", "/apihealth", "/api"):
        assert await ask(app, path, "POST") == 401
    assert await ask(app, "/api/pause", "POST", **admin(KEY)) == 200


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("", "/a", "/a"), ("/r", "/r/a", "/a"), ("/r/", "/r/a", "/a"), ("/r", "/rx/a", "/rx/a"), ("/r", "/r", ""),
        ("/r", "/a", "/a"),
    ],
)  # fmt: skip
def test_the_path_that_routes_see(root: str, path: str, found: str) -> None:
    assert guard.routed({"path": path, "root_path": root}) == found


async def test_a_server_starts_and_ends(here: Place) -> None:
    app, said = guarded(here), []

    async def receive() -> Any:
        return {"type": "lifespan.startup" if not said else "lifespan.shutdown"}

    async def send(message: Any) -> None:
        said.append(message["type"])

    await app({"type": "lifespan", "state": {}}, receive, send)
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_what_is_neither_is_not_let_in(here: Place) -> None:
    one = guard.AdminGuard(here)
    assert one._admits({"type": "unheard-of", "path": "/health", "headers": []}) is False


# ------------------------------------------------------------------------------------------------------------ a demo
@pytest.mark.parametrize(
    ("client", "status"),
    [
        (("127.0.0.1", 1), 200), (("::1", 1), 200), (("::ffff:127.0.0.1", 1), 200), (STRANGER, 401), (None, 401),
        (("127x", 1), 401),
    ],
)  # fmt: skip
async def test_a_demo_is_open_to_its_machine(tmp_path: Path, client: Any, status: int) -> None:
    demo = place_of({"WEIGHTSYNC_LOOPBACK_DEMO": "1", "WEIGHTSYNC_TOKEN_FILE": str(token_file(tmp_path))})
    app = guarded(demo)
    assert await ask(app, "/pause", "POST", client=client) == status
    assert await ask(app, "/pause", "POST", client=client, **admin(admin_key(TOKEN, "", ""))) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1", "Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "https://evil.example"}, 401),
        ({"Origin": "null"}, 401),
        ({"Origin": "http://127.0.0.1:9000"}, 401),
        ({"Sec-Fetch-Site": "cross-site"}, 401),
        ({"Sec-Fetch-Site": "same-site"}, 401),
        ({"Host": "evil.example:8000"}, 401),
        ({"Host": "127.0.0.1.evil.example"}, 401),
        ({"Host": "127.0.0.1:x@evil.example"}, 401),
        ({"Host": ""}, 401),
    ],
)  # fmt: skip
async def test_a_demo_is_not_open_to_web_pages_that_a_browser_of_its_machine_shows(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    """Any of them can have it send a POST here, and lead a name of its own to 127.0.0.1."""
    demo = place_of({"WEIGHTSYNC_LOOPBACK_DEMO": "1", "WEIGHTSYNC_TOKEN_FILE": str(token_file(tmp_path))})
    app = guarded(demo)
    given = {"Host": "127.0.0.1:8000", **headers}
    assert await ask(app, "/pause", "POST", client=("127.0.0.1", 1), **given) == status
    assert await ask(app, "/control", "WS", client=("127.0.0.1", 1), **given) == {200: 101, 401: 403}[status]
    assert await ask(app, "/health", client=("127.0.0.1", 1), **given) == 200


# --------------------------------------------------------------------------------------------------------- the words
async def test_a_refusal_says_what_to_do_and_floods_no_log(here: Place, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    app = guarded(here, clock=clock)
    with caplog.at_level(logging.WARNING, "vllm.weightsync"):
        for _ in range(50):
            await ask(app, "/pa\nuse" + "x" * 1000, "POST")
        clock.now = guard.SAY_AGAIN_SECONDS
        await ask(app, "/resume", "POST")
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("weightsync: 192.0.2.7 was refused /pa usexxx")
    assert len(first) < 250
    assert second == "weightsync: 192.0.2.7 was refused /resume: no admin key of this engine; 49 more were before"
    for word in ("WEIGHTSYNC_TOKEN_FILE", "WEIGHTSYNC_RUN_ID", "WEIGHTSYNC_ENGINE", "WEIGHTSYNC_PUBLIC_ROUTES"):
        assert word in guard.REFUSAL


def test_routes_that_cannot_be_opened_end_the_start(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_PUBLIC_ROUTES", "/resume")
    with pytest.raises(RoutesError, match="never open"):
        guard.AdminGuard(here)


# ---------------------------------------------------------------------------------------------------- its own place
@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """A fresh class in the place of vLLM's ``AsyncLLM``."""

    class AsyncLLM:
        def __init__(self, vllm_config: Any, executor_class: Any = None) -> None:
            self.vllm_config = vllm_config

    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("vllm.v1.engine.async_llm")
    module.AsyncLLM = AsyncLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    guard.install()
    guard.install()
    return AsyncLLM


def config(backend: str | None) -> Any:
    return SimpleNamespace(weight_transfer_config=backend and SimpleNamespace(backend=backend))


def set_place(monkeypatch: pytest.MonkeyPatch, here: Place) -> None:
    for name, value in place(here.token_file, here.hub_url, here.run_id, here.engine).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("keyword", [False, True])
async def test_an_engine_of_ours_has_its_server_guarded(
    llm: type[Any], here: Place, monkeypatch: pytest.MonkeyPatch, keyword: bool
) -> None:
    set_place(monkeypatch, here)
    ours, app = config("weightsync"), application()
    assert await ask(app, "/pause", "POST") == 200  # its middleware is built by now
    assert (llm(vllm_config=ours) if keyword else llm(ours)).vllm_config is ours
    assert await ask(app, "/pause", "POST") == 401
    llm(ours)  # a second one is no second guard
    assert await ask(app, "/pause", "POST", **admin(KEY)) == 200


async def test_another_server_keeps_its_behaviour(llm: type[Any]) -> None:
    for backend in ("nccl", None):
        llm(config(backend))
    assert await ask(application(), "/pause", "POST") == 200


def test_one_that_does_not_know_whose_it_is_does_not_start(llm: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HUB_URL", "TOKEN_FILE", "RUN_ID", "ENGINE", "LOOPBACK_DEMO"):
        monkeypatch.delenv(f"WEIGHTSYNC_{name}", raising=False)
    with pytest.raises(PlaceError, match="WEIGHTSYNC_TOKEN_FILE, WEIGHTSYNC_HUB_URL"):
        llm(config("weightsync"))


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_a_server_that_is_no_python_is_refused(
    llm: type[Any], here: Place, monkeypatch: pytest.MonkeyPatch, value: str, refused: bool
) -> None:
    set_place(monkeypatch, here)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    if not refused:
        assert guard.require() == here
        return
    with pytest.raises(guard.GuardUnavailable, match="unset VLLM_USE_RUST_FRONTEND"):
        llm(config("weightsync"))


def test_a_vllm_of_another_shape_is_refused(llm: type[Any], here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, here)
    monkeypatch.setattr(llm, "__init__", lambda self, settings: None)
    with pytest.raises(guard.GuardUnavailable, match=r"it has no AsyncLLM\(vllm_config\)"):
        guard.require()
    monkeypatch.delitem(sys.modules, "vllm.v1.engine.async_llm")
    with pytest.raises(guard.GuardUnavailable, match="vllm"):
        guard.require()
    guard.install()  # of a process without an API server: nothing to guard


def test_the_installed_vllm_can_be_guarded() -> None:
    pytest.importorskip("vllm.v1.engine.async_llm")
    assert guard.missing_hooks() == []
    assert inspect.iscoroutinefunction(FastAPI.__call__)
