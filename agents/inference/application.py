"""How an engine is told to make itself a member, and what it says of itself: its server's environment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from weightsync.agents.inference.calls import ENVIRONMENT
from weightsync.agents.link.applicant import ApplicantError, ApplicantThread
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.token import TokenError

URL_VARIABLE: Final = "WEIGHTSYNC_ENGINE_URL"
"""The base URL by which the daemon reaches the server; of several servers of one engine all, with commas between."""

ROLE_VARIABLE: Final = "WEIGHTSYNC_ENGINE_ROLE"
PAIR_VARIABLE: Final = "WEIGHTSYNC_ENGINE_PAIR"


def applicant(kind: str, environ: Mapping[str, str]) -> ApplicantThread | None:
    """Who makes this engine a member, not started yet; None where ``environ`` gives no URL.

    Raises:
        ApplicantError, TlsError: with a URL, something else is missing or wrong.
    """
    urls = environ.get(URL_VARIABLE, "")
    if not urls:
        return None
    missing = [name for name in ENVIRONMENT.values() if not environ.get(name)]
    if missing:
        raise ApplicantError(f"{URL_VARIABLE} makes this engine a member of a run; set {', '.join(missing)}, too")
    said = {
        "name": environ[ENVIRONMENT["engine"]],
        "kind": kind,
        "urls": [url.strip().rstrip("/") for url in urls.split(",")],
        "role": environ.get(ROLE_VARIABLE) or "both",
        "pair": environ.get(PAIR_VARIABLE, ""),
    }
    token_file = Path(environ[ENVIRONMENT["token_file"]])
    try:
        engine = msgspec.convert(said, Applicant)
        read_token(token_file)  # later it would only be logged
    except msgspec.ValidationError as error:
        names = f"{ENVIRONMENT['engine']}, {URL_VARIABLE}, {ROLE_VARIABLE}, {PAIR_VARIABLE}"
        raise ApplicantError(f"{error}; name, urls, role and pair are from {names}") from error
    except TokenError as error:
        raise ApplicantError(f"{ENVIRONMENT['token_file']}: {error}") from error
    return ApplicantThread(environ[ENVIRONMENT["run_id"]], engine, environ[ENVIRONMENT["hub_url"]], token_file)
