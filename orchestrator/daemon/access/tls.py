"""The daemon's certificate, and what the certificates of its clients say of them."""

import ssl
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web
from weightsync.orchestrator.protocol.proof import channel_of
from weightsync.orchestrator.settings.credentials import Credential, credential_named
from weightsync.orchestrator.settings.sections import ListenTls
from weightsync.orchestrator.settings.tls import certificate_in, load_certificate, server_context

SCHEME: Final = "weightsync:"
"""Of the URI among a client certificate's alternative names: ``weightsync:engine``, ``weightsync:engine.engine-0``."""


class ServerTls:
    """One per daemon with TLS.

    Attributes:
        channel: the channel's name (``protocol/proof.py``).
        wants_certificates: whether agents and all who ask have to show one.

    Raises:
        ConfigError: a file cannot be used.
    """

    def __init__(self, tls: ListenTls) -> None:
        self._tls = tls
        self.context = server_context(tls)
        self.channel = channel_of(certificate_in(tls.certificate_file))
        self.wants_certificates = tls.client_certificates

    def again(self) -> None:
        """Read certificate and key anew, for the connections to come.

        Raises:
            ConfigError: a file cannot be used; the old ones stay.
        """
        channel = channel_of(certificate_in(self._tls.certificate_file))
        server_context(self._tls)  # a context of which half was loaded could serve nobody
        load_certificate(self.context, self._tls.certificate_file, self._tls.key_file)
        self.channel = channel


def credential_of_peer(request: web.Request) -> Credential | None:
    """What the certificate of a request's peer says of it; None without one, or without such a name in it."""
    tls: ssl.SSLObject | None = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    return None if tls is None else credential_in(tls.getpeercert() or {})


def credential_in(certificate: Mapping[str, Any]) -> Credential | None:
    """The credential of a verified certificate, as ``getpeercert`` gives it; one with two names has none."""
    names = [text for kind, text in certificate.get("subjectAltName", ()) if kind == "URI" and text.startswith(SCHEME)]
    return credential_named(names[0].removeprefix(SCHEME)) if len(names) == 1 else None
