"""The table of policies, and the application that the daemon really serves."""

from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.policy import POLICY, policy_of, without_policy
from weightsync.orchestrator.daemon.admin.routes import application_routes, routes, verb_routes
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.daemon.page.routes import page_routes
from weightsync.orchestrator.settings.credentials import ROLES, Role

MAY: dict[str, set[Role | str]] = {
    "GET /healthz": {"nobody", *ROLES},
    "GET /readyz": {"nobody", *ROLES},
    "GET /engines/{engine}/ready": {"nobody", *ROLES},
    "GET /": {"nobody", *ROLES},
    "GET /page/{file}": {"nobody", *ROLES},
    "GET /agents": set(),
    "GET /engines": set(),
    "GET /status": {"viewer", "operator"},
    "GET /rounds": {"viewer", "operator"},
    "GET /metrics": {"viewer", "operator"},
    "GET /plan/layouts": {"viewer", "operator"},
    "GET /plan/explanation": {"viewer", "operator"},
    "GET /plan/rates": {"viewer", "operator"},
    "GET /stream": {"viewer", "operator"},
    "GET /audit": {"viewer", "operator"},
    "POST /verbs/{verb}": {"operator"},
}
"""By a token that is sent with the request. Agents prove theirs and send it never."""


class Nothing:
    """Views and verbs that fail: what they are asked for was let through."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError("let through")


async def test_every_route_of_the_daemon_lets_in_exactly_its_roles(tmp_path: Path) -> None:
    """Walks the router of the running application: a route that is added without a policy fails here and at start."""
    walked: list[str] = []

    def configure(app: web.Application) -> None:
        app.router.add_routes([*routes(Nothing()), *verb_routes(Nothing())])  # type: ignore[arg-type]
        app.router.add_routes(application_routes(Nothing(), access))  # type: ignore[arg-type]
        app.router.add_routes(page_routes(Nothing()))  # type: ignore[arg-type]
        assert list(without_policy(app)) == []
        for route in app.router.routes():
            assert route.resource is not None
            walked.append(f"{route.method} {route.resource.canonical}")

    access = Access(write_credentials(tmp_path / "credentials"), "run", str)
    hub = Hub(access=access, post=lambda _: None, next_id=lambda: 1, timing=HubTiming(5, 3, 5, 0.1))
    port = await hub.start("127.0.0.1", 0, configure)
    assert {name for name in walked if not name.startswith("HEAD")} == set(POLICY) == set(MAY)
    # What takes the transport over, or writes to it as it goes, has no answer without a body.
    assert not {"HEAD /agents", "HEAD /engines", "HEAD /stream"} & {*walked}
    async with aiohttp.ClientSession() as session:
        for name in walked:
            proven = POLICY[name.replace("HEAD", "GET")] == "proven"
            method, path = name.replace("{engine}", "a").replace("{verb}", "hold").replace("{file}", "x").split()
            let_in: set[str] = set()
            for who in ("nobody", *ROLES):
                headers = {} if who == "nobody" else {"Authorization": f"Bearer {TOKENS[who]}"}
                url = f"http://127.0.0.1:{port}{path}"
                async with session.request(method, url, headers=headers, data=b"{}") as response:
                    assert response.headers["Server"] == "weightsync-orchestrator", "no versions of what it is made of"
                    if response.status not in (401, 403):
                        let_in.add(who)
                    else:
                        assert response.status == (401 if who == "nobody" or proven else 403), name
            assert let_in == MAY[name.replace("HEAD", "GET")], name
    await hub.close()


@pytest.mark.parametrize(("method", "path"), [("POST", "/status"), ("GET", "/novelty"), ("DELETE", "/verbs/{verb}")])
def test_what_the_table_does_not_have_is_nobodys(method: str, path: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    route = app.router.add_route(method, path, answer)
    assert policy_of(route) is None
    assert list(without_policy(app)) == [f"{method} {path}"]
