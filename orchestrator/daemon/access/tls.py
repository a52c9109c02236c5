"""The daemon's certificate, and what the certificates of its clients say of them."""

import contextlib
import ssl
import time
from asyncio import sslproto
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web
from weightsync.orchestrator.protocol.proof import channel_of
from weightsync.orchestrator.settings.credentials import Credential, credential_named
from weightsync.orchestrator.settings.sections import ListenTls
from weightsync.orchestrator.settings.tls import certificate_in, load_certificate, server_context

SCHEME: Final = "weightsync:"
"""Of the URI among a client certificate's alternative names: ``weightsync:engine``, ``weightsync:engine.engine-0``."""

READ_BYTES: Final = 16 * 1024
"""Of each connection's buffer, as large as a record of TLS. asyncio's own of 256 KiB is filled with zeros for each
connection before its first byte: half a gigabyte for 2,000 strangers."""

TRIALS: Final = 3
"""Of a handshake, of which the fastest counts."""

PRICE: Final = 2.0
"""What a stranger costs with TLS over one without: twice the time (1 ms over 0.45) and memory (70 kB over 30)."""

CHEAP_SECONDS: Final = 0.001
"""Of our side of a handshake's arithmetic, which PRICE has within it: 0.3 ms with a key of P-256, 0.6 of RSA-2048. It
is 5 ms of RSA-4096, and the loop stands still for each."""


class ServerTls:
    """One per daemon with TLS.

    Attributes:
        channel: the channel's name (``protocol/proof.py``).
        wants_certificates: whether agents and all who ask have to show one.
        handshake_seconds: processor time that one handshake costs us.

    Raises:
        ConfigError: a file cannot be used.
    """

    def __init__(self, tls: ListenTls) -> None:
        self._tls = tls
        self.context = server_context(tls)
        self.channel = channel_of(certificate_in(tls.certificate_file))
        self.wants_certificates = tls.client_certificates
        self.handshake_seconds = handshake_seconds(self.context)
        sslproto.SSLProtocol.max_size = READ_BYTES

    def price(self) -> float:
        """What a stranger costs, over one without TLS."""
        return PRICE * max(1.0, self.handshake_seconds / CHEAP_SECONDS)

    def again(self) -> None:
        """Read certificate and key anew, for the connections to come.

        Raises:
            ConfigError: a file cannot be used; the old ones stay.
        """
        channel = channel_of(certificate_in(self._tls.certificate_file))
        server_context(self._tls)  # a context of which half was loaded could serve nobody
        load_certificate(self.context, self._tls.certificate_file, self._tls.key_file)
        self.channel = channel
        self.handshake_seconds = handshake_seconds(self.context)


def handshake_seconds(server: ssl.SSLContext) -> float:
    """Processor time of a server's side of one handshake, tried out in memory."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return min(_tried(server, client) for _ in range(TRIALS))


def _tried(server: ssl.SSLContext, client: ssl.SSLContext) -> float:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    seconds = 0.0
    for _ in range(2):  # TLS 1.3: what the client says, what the server answers, and that the client has understood
        with contextlib.suppress(ssl.SSLWantReadError):
            theirs.do_handshake()
        began = time.thread_time()
        with contextlib.suppress(ssl.SSLWantReadError):
            ours.do_handshake()
        seconds += time.thread_time() - began
    return seconds


def credential_of_peer(request: web.Request) -> Credential | None:
    """What the certificate of a request's peer says of it; None without one, or without such a name in it."""
    tls: ssl.SSLObject | None = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    return None if tls is None else credential_in(tls.getpeercert() or {})


def credential_in(certificate: Mapping[str, Any]) -> Credential | None:
    """The credential of a verified certificate, as ``getpeercert`` gives it; one with two names has none."""
    names = [text for kind, text in certificate.get("subjectAltName", ()) if kind == "URI" and text.startswith(SCHEME)]
    return credential_named(names[0].removeprefix(SCHEME)) if len(names) == 1 else None
