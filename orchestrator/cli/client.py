"""Asking a running daemon over its HTTP port."""

import asyncio
import os
import ssl
from pathlib import Path
from typing import Final

import aiohttp
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.settings.credentials import Role, role_file
from weightsync.orchestrator.settings.secrets import read_tokens
from weightsync.orchestrator.settings.settings import Settings
from weightsync.orchestrator.settings.tls import client_context

MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""10,000 rounds with long reasons."""


TLS_VARIABLES: Final = ("WEIGHTSYNC_CA_FILE", "WEIGHTSYNC_CERTIFICATE_FILE", "WEIGHTSYNC_KEY_FILE")
"""The agents' own."""

MAX_REFUSAL_BYTES: Final = 16_384

FAREWELL_SECONDS: Final = 0.1
"""For the end of a TLS connection, which takes an answer of the daemon; aiohttp does not wait for it."""


_ADDRESS: Final = "give the daemon's own address, as its listen or advertise_url say, without a path"

_NO_TOKEN: Final = "give --token-file, or --config of the daemon (then its credentials serve)"

_TOKEN: Final = "--token-file must name a file of that role, in the credentials of this very daemon"


class Unreachable(Exception):
    """No usable answer from the daemon."""


class NotDone(Exception):
    """The daemon understands, and does not do it."""


class Denied(Exception):
    """The daemon refuses the token."""


def token_for(token_file: Path | None, settings: Settings | None, role: Role = "viewer") -> str | None:
    """The token in ``token_file``, else that of ``role`` in the directory that ``settings`` name; None without both.

    Where there is none for viewers, the operator's serves.

    Raises:
        ConfigError: the file cannot be used.
    """
    if token_file is None and settings is not None:
        token_file = role_file(settings.credentials, role)
        if role == "viewer" and not token_file.exists():
            token_file = role_file(settings.credentials, "operator")
    return None if token_file is None else read_tokens(token_file)[0]


def tls_for(url: str, settings: Settings | None) -> ssl.SSLContext | None:
    """For an https ``url``: authority, certificate and key of the variables, else the authority of ``settings``.

    Raises:
        ConfigError: a file cannot be used.
    """
    if not url.startswith("https:"):
        return None
    ca, certificate, key = (Path(os.environ[name]) if os.environ.get(name) else None for name in TLS_VARIABLES)
    if ca is None and settings is not None and settings.listen.tls is not None:
        ca = settings.listen.tls.ca_file
    return client_context(ca, certificate, key)


async def fetch(
    url: str,
    token: str | None,
    timeout_seconds: float,
    limit: int = MAX_ANSWER_BYTES,
    order: bytes | None = None,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    """The body of a 200 answer of at most ``limit`` bytes, within a total of ``timeout_seconds``.

    With ``order``, it is posted, and an answer in plain text that is not 200 is a refusal.

    Raises:
        Unreachable, Denied, NotDone.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    where, method = url.partition("?")[0], "GET" if order is None else "POST"
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            aiohttp.ClientSession() as session,
            session.request(
                method, url, headers=headers, data=order, allow_redirects=False, ssl=tls or True
            ) as response,
        ):
            if response.status in (401, 403):
                why = clean((await response.content.read(MAX_REFUSAL_BYTES)).decode(errors="replace").strip(), 300)
                raise Denied(f"{where} refuses the token: {why}. Fix: {_TOKEN if token else _NO_TOKEN}")
            if order is not None and response.status != 200 and response.content_type == "text/plain":
                raise NotDone(clean((await response.content.read(MAX_REFUSAL_BYTES)).decode(errors="replace").strip()))
            if response.status == 503:
                why = clean((await response.content.read(MAX_REFUSAL_BYTES)).decode(errors="replace").strip(), 300)
                raise Unreachable(f"{where} answered 503: {why}")
            if response.status != 200:
                raise Unreachable(f"{where} answered {response.status}. Fix: {_ADDRESS}")
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > limit:
                    raise Unreachable(f"{where} answers with more than {limit} bytes")
            return bytes(data)
    except TimeoutError as error:
        raise Unreachable(f"{where} did not answer within {timeout_seconds:g} s") from error
    except aiohttp.ClientConnectorError as error:
        reason = error.os_error.strerror or str(error)
        raise Unreachable(f"the daemon cannot be reached at {where}: {reason}. Fix: {_fix(error)}") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise Unreachable(f"the daemon cannot be reached at {where}: {error}. Fix: {_fix(error)}") from error
    finally:
        if tls is not None:
            await asyncio.sleep(FAREWELL_SECONDS)


def _fix(error: Exception) -> str:
    """What to do about a connection that did not come about, or broke."""
    if isinstance(error, ssl.SSLCertVerificationError) or isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return f"{TLS_VARIABLES[0]} must name the ca.pem of this run, and the URL a name that certs was given as --host"
    if isinstance(error, aiohttp.ClientSSLError):
        return "write http:// where the daemon has no listen.tls; else another program has that port"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "start it (weightsync-orchestrator run), or give the address that it has (--url, listen, advertise_url)"
    return "write https:// where the daemon has listen.tls; else another program has that port, or it is ending"
