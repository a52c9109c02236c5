"""What an engine says that makes itself a member, in JSON over a WebSocket of one question and one answer.

Both sides prove that they hold one token, as on an agent's connection (``protocol/proof.py``); the first frame is the
engine's proof with its ``Application`` behind it, the answer is ``Admitted`` or ``Declined``.
"""

import re
from typing import Annotated, Final, Literal

import msgspec
from weightsync.orchestrator.protocol.fields import Name, Seconds
from weightsync.orchestrator.protocol.limits import MAX_SERVERS, MAX_URL_CHARS
from weightsync.orchestrator.protocol.names import IDENTIFIER

ENGINES_PATH: Final = "/engines"
"""Where it goes, on the daemon's own port."""

MAX_APPLICATION_BYTES: Final = 192 * 1024
"""Of an application: the URLs of MAX_SERVERS servers."""

MAX_WHY_CHARS: Final = 1000
"""Of a refusal: a sentence with a name, a URL and the fix."""

Identifier = Annotated[str, msgspec.Meta(pattern=rf"^{IDENTIFIER}\Z")]
Url = Annotated[str, msgspec.Meta(max_length=MAX_URL_CHARS)]

_NUMERIC: Final = re.compile(r"([0-9]+|0[xX][0-9A-Fa-f]*)")


def is_host_name(host: str) -> bool:
    """Whether ``host`` is a name to be looked up; what ends in a number is an address, in whichever notation.

    Source: the URL standard of WHATWG, "ends in a number checker".
    """
    return ":" not in host and _NUMERIC.fullmatch(host.rstrip(".").rpartition(".")[2]) is None


class Applicant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine as it describes itself, with the fields of an entry of ``engines``.

    ``urls``: of all its API servers. ``pair``: empty for an engine on its own.
    """

    name: Identifier
    urls: Annotated[tuple[Url, ...], msgspec.Meta(min_length=1, max_length=MAX_SERVERS)]
    kind: Identifier = "vllm"
    role: Literal["prefill", "decode", "both"] = "both"
    pair: Annotated[str, msgspec.Meta(pattern=rf"^({IDENTIFIER})?\Z")] = ""


class Application(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``engine`` wants to be a member of ``run_id``, or is one and is still there."""

    run_id: Name
    engine: Applicant


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted"):
    """The answer: it is a member, and is to apply again after ``again_seconds``, or it will be none any more."""

    again_seconds: Seconds


class Declined(msgspec.Struct, frozen=True, kw_only=True, tag="declined"):
    """The answer: it is not taken in. ``status``: as of HTTP; ``why`` names the field, its value and the fix."""

    status: int
    why: Annotated[str, msgspec.Meta(max_length=MAX_WHY_CHARS)]
