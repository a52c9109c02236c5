"""How an agent reaches its daemon over TLS: by files that its own environment names, and nobody else."""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from weightsync.agents.errors import AgentError
from weightsync.orchestrator.files.ownership import NotOurs, followed, secret

CA_VARIABLE: Final = "WEIGHTSYNC_CA_FILE"
"""The authority of the run's certificates; without it the system's are believed."""

CERTIFICATE_VARIABLE: Final = "WEIGHTSYNC_CERTIFICATE_FILE"
KEY_VARIABLE: Final = "WEIGHTSYNC_KEY_FILE"
"""What the agent shows where the daemon asks for certificates."""


class TlsError(AgentError, ValueError):
    """TLS cannot be used as the environment says. The operator's fault; the message names the variable."""


def tls_context(url: str, environment: Mapping[str, str] | None = None) -> ssl.SSLContext | None:
    """For ``url``: None where it is ``ws://``.

    Raises:
        TlsError: a file cannot be used (the authority where others can write it, the key also where they can read it),
            or a variable asks for TLS and ``url`` does not: it is never left out silently.
    """
    environment = os.environ if environment is None else environment
    ca, certificate, key = (environment.get(name) for name in (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE))
    if not url.startswith("wss://"):
        if ca or certificate or key:
            names = ", ".join(
                name for name in (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE) if environment.get(name)
            )
            raise TlsError(f"{names} is set, and {url} is not TLS: write wss://…, or unset it")
        return None
    try:
        context = ssl.create_default_context(cafile=followed(Path(ca)) if ca else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if certificate:
            context.load_cert_chain(certificate, secret(Path(key or certificate)), password=_no_password)
    except (OSError, ValueError, NotOurs) as error:
        what = f"{CA_VARIABLE} ({ca}), {CERTIFICATE_VARIABLE} ({certificate}) or {KEY_VARIABLE} ({key})"
        raise TlsError(f"{what} cannot be used: {getattr(error, 'strerror', None) or error}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key asks for a password, and nobody is here to type one")
