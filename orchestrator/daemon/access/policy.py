"""Which role may use which route. What is not in the table is refused, whoever asks."""

from collections.abc import Iterator, Mapping
from typing import Final, Literal

from aiohttp import web
from weightsync.orchestrator.settings.credentials import Role

Policy = Literal["public", "proven"] | frozenset[Role]
"""``public``: supervisors, load balancers and a browser before the page's files run hold no credential. ``proven``: an
agent's or an engine's, whose token is proved on the connection and never sent (``protocol/proof.py``). Else those whose
credential the request bears."""

_OPERATORS: Final[frozenset[Role]] = frozenset({"operator"})
_VIEWERS: Final[frozenset[Role]] = frozenset({"viewer", "operator"})

POLICY: Final[Mapping[str, Policy]] = {
    "GET /healthz": "public",
    "GET /readyz": "public",
    "GET /engines/{engine}/ready": "public",
    "GET /": "public",
    "GET /page/{file}": "public",
    "GET /agents": "proven",
    "GET /engines": "proven",
    "GET /status": _VIEWERS,
    "GET /rounds": _VIEWERS,
    "GET /metrics": _VIEWERS,
    "GET /plan/layouts": _VIEWERS,
    "GET /plan/explanation": _VIEWERS,
    "GET /plan/rates": _VIEWERS,
    "GET /stream": _VIEWERS,
    "GET /audit": _VIEWERS,
    "POST /verbs/{verb}": _OPERATORS,
}


def policy_of(route: web.AbstractRoute) -> Policy | None:
    """The policy of one route; None: there is none, and nobody may use it."""
    path = "" if route.resource is None else route.resource.canonical
    method = "GET" if route.method == "HEAD" else route.method  # aiohttp adds it to each GET
    return POLICY.get(f"{method} {path}")


def without_policy(app: web.Application) -> Iterator[str]:
    """The routes of ``app`` that the table does not have."""
    for route in app.router.routes():
        if policy_of(route) is None:
            yield f"{route.method} {'' if route.resource is None else route.resource.canonical}"
