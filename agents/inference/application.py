"""How an engine is told to make itself a member, and what it says of itself: its server's environment."""

from collections.abc import Mapping
from typing import Final

import msgspec
from weightsync.agents.inference.place import VARIABLES, place_of
from weightsync.agents.link.applicant import ApplicantError, ApplicantThread
from weightsync.orchestrator.protocol.application import Applicant

URL_VARIABLE: Final = "WEIGHTSYNC_ENGINE_URL"
"""The base URL by which the daemon reaches the server; of several servers of one engine all, with commas between."""

ROLE_VARIABLE: Final = "WEIGHTSYNC_ENGINE_ROLE"
PAIR_VARIABLE: Final = "WEIGHTSYNC_ENGINE_PAIR"


def applicant(kind: str, environ: Mapping[str, str]) -> ApplicantThread | None:
    """Who makes this engine a member, not started yet; None where ``environ`` gives no URL.

    Raises:
        ApplicantError, PlaceError, TlsError: with a URL, something else is missing or wrong.
    """
    urls = environ.get(URL_VARIABLE, "")
    if not urls:
        return None
    place = place_of(environ)
    if missing := [variable for field, variable in VARIABLES.items() if not getattr(place, field)]:
        raise ApplicantError(f"{URL_VARIABLE} makes this engine a member of a run; set {', '.join(missing)}, too")
    said = {
        "name": place.engine,
        "kind": kind,
        "urls": [url.strip().rstrip("/") for url in urls.split(",")],
        "role": environ.get(ROLE_VARIABLE) or "both",
        "pair": environ.get(PAIR_VARIABLE, ""),
    }
    try:
        engine = msgspec.convert(said, Applicant)
    except msgspec.ValidationError as error:
        names = f"{VARIABLES['engine']}, {URL_VARIABLE}, {ROLE_VARIABLE}, {PAIR_VARIABLE}"
        raise ApplicantError(f"{error}; name, urls, role and pair are from {names}") from error
    return ApplicantThread(place.run_id, engine, place.hub_url, place.token_file)
