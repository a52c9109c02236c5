"""The daemon's certificate and its clients': who is who, over real connections. Agents: agents/link/test_client.py."""

import asyncio
import hashlib
import socket
import ssl
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.guard import CREDENTIAL, NO_CERTIFICATE
from weightsync.orchestrator.daemon.access.tls import CHEAP_SECONDS, PRICE, READ_BYTES, ServerTls, credential_in
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.settings.credentials import Credential
from weightsync.orchestrator.settings.sections import ListenTls
from weightsync.orchestrator.settings.tls import client_context


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "certificates"
    make_certificates(made, ["127.0.0.1"], ["trainer", "viewer", "operator", "operator.ann"], 2)
    return made


def listening(directory: Path) -> ServerTls:
    return ServerTls(ListenTls(
        certificate_file=directory / "daemon.pem", key_file=directory / "daemon.key", ca_file=directory / "ca.pem",
        client_certificates=True,
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "token", "status", "says"),
    [
        ("viewer", "", 200, "viewer"),
        ("operator.ann", "", 200, "operator ann"),
        ("operator.ann", "operator", 200, "operator ann"),
        ("operator", "operator", 200, "operator"),
        ("viewer", "operator", 403, "the token is that of operator, and the certificate that of viewer"),
        ("trainer", "", 403, "this needs the credential of role operator or viewer, and this one is of role trainer"),
        ("viewer", "nobody's", 401, "wrong or missing token"),
        ("", "operator", 403, NO_CERTIFICATE),
        ("", "", 403, NO_CERTIFICATE),
        ("daemon", "operator", 403, NO_CERTIFICATE),
    ],
)
async def test_who_comes_by_which_certificate_and_token(
    directory: Path, tmp_path: Path, shown: str, token: str, status: int, says: str
) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=request.match_info[CREDENTIAL])

    access = Access(write_credentials(tmp_path / "credentials"), "run", str, listening(directory))
    hub = Hub(access=access, post=lambda _: None, next_id=lambda: 1, timing=HubTiming(5, 3, 5, 0.1))
    port = await hub.start("127.0.0.1", 0, lambda app: app.router.add_get("/status", answer) and None)
    context = client_context(
        directory / "ca.pem", directory / f"{shown}.pem" if shown else None, directory / f"{shown}.key"
    )
    headers = {"Authorization": f"Bearer {TOKENS.get(token, token)}"} if token else {}
    try:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(f"https://127.0.0.1:{port}/status", headers=headers, ssl=context) as response:
                    assert (response.status, (await response.text()).strip()) == (status, says)
            except (aiohttp.ClientError, ConnectionError):
                assert shown == "daemon", "a server's certificate is none of a client"
    finally:
        await hub.close()


async def test_a_connection_has_a_small_buffer_and_a_session_is_nobodys_to_resume(
    directory: Path, tmp_path: Path
) -> None:
    """asyncio's own has 256 KiB for each, which a stranger would have us fill with zeros."""
    buffers: list[int] = []

    async def answer(request: web.Request) -> web.Response:
        buffers.append(len(request.transport._ssl_protocol._ssl_buffer))  # type: ignore[union-attr]
        return web.Response(body=await request.read())

    access = Access(write_credentials(tmp_path / "credentials"), "run", str, listening(directory))
    hub = Hub(access=access, post=lambda _: None, next_id=lambda: 1, timing=HubTiming(5, 3, 5, 0.1))
    port = await hub.start("127.0.0.1", 0, lambda app: app.router.add_get("/status", answer) and None)
    context = client_context(directory / "ca.pem", directory / "viewer.pem", directory / "viewer.key")
    sent = bytes(range(256)) * 2048  # more than a buffer, and than a record
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"https://127.0.0.1:{port}/status", data=sent, ssl=context) as response,
        ):
            assert await response.read() == sent
        assert buffers == [READ_BYTES]
        with socket.create_connection(("127.0.0.1", port)) as raw:
            shaken = await asyncio.to_thread(context.wrap_socket, raw, server_hostname="127.0.0.1")
            shaken.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.to_thread(shaken.recv, 12) == b"HTTP/1.1 404"
            assert shaken.session is None or not shaken.session.has_ticket
            shaken.close()
    finally:
        await hub.close()


def test_what_a_handshake_costs_is_tried_out(directory: Path) -> None:
    tls = listening(directory)
    assert 1e-6 < tls.handshake_seconds < 1.0
    tls.handshake_seconds = CHEAP_SECONDS / 2
    assert tls.price() == PRICE
    tls.handshake_seconds = 5 * CHEAP_SECONDS
    assert tls.price() == 5 * PRICE
    tls.again()
    assert tls.handshake_seconds != 5 * CHEAP_SECONDS


def test_the_channel_is_the_certificate(directory: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert((directory / "daemon.pem").read_text())
    assert listening(directory).channel == hashlib.sha256(der).digest()


@pytest.mark.parametrize(
    ("names", "credential"),
    [
        ([("URI", "weightsync:engine.engine-0")], Credential("engine", "engine-0")),
        ([("DNS", "head"), ("URI", "https://x"), ("URI", "weightsync:viewer")], Credential("viewer")),
        ([("URI", "weightsync:viewer"), ("URI", "weightsync:operator")], None),
        ([("URI", "weightsync:admin")], None),
        ([("DNS", "weightsync:viewer")], None),
        ([], None),
    ],
)
def test_what_a_certificate_says(names: list[tuple[str, str]], credential: Credential | None) -> None:
    assert credential_in({"subjectAltName": names}) == credential
    assert credential_in({}) is None
