"""An engine's place, from the environment of its server and nowhere else: its daemon, its run, its name, its token.

Whoever reaches a server's admin routes may only say the same again. Without a place an engine does not start.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from weightsync.agents.errors import AgentError
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.token import MIN_TOKEN_CHARS, TokenError

TOKEN_VARIABLE: Final = "WEIGHTSYNC_TOKEN_FILE"
"""File with the engine's token. Nothing else says where one is."""

VARIABLES: Final = {
    "hub_url": "WEIGHTSYNC_HUB_URL",
    "run_id": "WEIGHTSYNC_RUN_ID",
    "engine": "WEIGHTSYNC_ENGINE",
}
"""Fields of ``init_info``, and what says them first."""

LOOPBACK_VARIABLE: Final = "WEIGHTSYNC_LOOPBACK_DEMO"
"""1: for a demo on one machine, VARIABLES may be left out. Then anybody on this machine may call the admin routes, and
a daemon that is reached by loopback may say the rest."""


class PlaceError(AgentError):
    """The server's environment does not say what an engine needs. The operator's fault; the message names variables."""

    fault: Fault = "config"


@dataclass(frozen=True, slots=True)
class Place:
    """``demo``: LOOPBACK_VARIABLE is set, and what is empty here a daemon on this machine may say."""

    token_file: Path
    hub_url: str
    run_id: str
    engine: str
    demo: bool = False


def place_of(environ: Mapping[str, str]) -> Place:
    """The place that ``environ`` gives, with a look into the token's file.

    Raises:
        PlaceError: something is missing, or the token cannot serve.
    """
    switch = environ.get(LOOPBACK_VARIABLE, "")
    if switch not in ("", "0", "1"):
        raise PlaceError(f"{LOOPBACK_VARIABLE} is {clean(switch, 40)!r}; it may be 0 or 1")
    demo = switch == "1"
    given = {field: environ.get(variable, "").strip() for field, variable in VARIABLES.items()}
    wanted = [TOKEN_VARIABLE, *(() if demo else VARIABLES.values())]
    if missing := [name for name in wanted if not environ.get(name, "").strip()]:
        raise PlaceError(
            f"weightsync: {', '.join(missing)} not set in this server's environment: an engine that does not know its "
            "daemon, run, name and token would take weights from whoever reaches it. Fix: set WEIGHTSYNC_HUB_URL="
            f"ws://HOST:7410/agents, WEIGHTSYNC_RUN_ID, WEIGHTSYNC_ENGINE and {TOKEN_VARIABLE}; for a demo on this "
            f"machine only, {LOOPBACK_VARIABLE}=1 and {TOKEN_VARIABLE}"
        )
    place = Place(Path(environ[TOKEN_VARIABLE].strip()), **given, demo=demo)
    if given["hub_url"] and demo and not is_loopback(given["hub_url"]):
        raise PlaceError(
            f"{LOOPBACK_VARIABLE}=1 is for a daemon on this machine, and WEIGHTSYNC_HUB_URL is {given['hub_url']}; "
            "unset one of them"
        )
    try:
        token = read_token(place.token_file)
    except TokenError as error:
        raise PlaceError(f"{TOKEN_VARIABLE}: {error}") from error
    if len(token) < MIN_TOKEN_CHARS:
        what = f"{TOKEN_VARIABLE}: {place.token_file} holds a token of {len(token)} characters, which can be guessed"
        raise PlaceError(f"{what}; openssl rand -hex 32 > {place.token_file}")
    return place


def is_loopback(url: str) -> bool:
    """Whether the host of ``url`` is this machine, by its address or as localhost."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
