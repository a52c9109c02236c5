"""Token files for tests, one for each role, and a peer of the daemon that proves that it holds one."""

import secrets
from pathlib import Path
from typing import Any

import aiohttp
from weightsync.orchestrator.protocol.proof import (
    KEY_HEADER,
    NONCE_BYTES,
    NONCE_HEADER,
    RUN_HEADER,
    Challenge,
    Purpose,
    agent_proof,
    key_of,
)

TOKENS = {
    "trainer": "trainer-0123456789",
    "engine": "engine-0123456789",
    "viewer": "viewer-0123456789",
    "operator": "operator-0123456789",
}


def write_credentials(directory: Path) -> Path:
    """Makes ``directory`` with one file for each role, and returns it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for role, token in TOKENS.items():
        path = directory / f"{role}.token"
        path.touch(mode=0o600)
        path.write_text(token + "\n")
    return directory


class Proving:
    """A client's WebSocket whose first frame is proved."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, token: str, nonce: str, purpose: Purpose) -> None:
        self.raw = socket
        self.answer = socket._response.headers
        self.challenge = Challenge(self.answer[RUN_HEADER], nonce, self.answer[NONCE_HEADER], b"", purpose)
        self._token = token
        self._proved = False

    async def send_bytes(self, data: bytes) -> None:
        proof = b"" if self._proved else agent_proof(self._token, self.challenge, data)
        self._proved = True
        await self.raw.send_bytes(proof + data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


async def open_agent(
    session: aiohttp.ClientSession, url: str, token: str, purpose: Purpose = "connect", **options: Any
) -> Proving:
    """A connection for ``purpose`` of whoever holds ``token``."""
    nonce = secrets.token_hex(NONCE_BYTES)
    headers = {KEY_HEADER: key_of(token), NONCE_HEADER: nonce}
    return Proving(await session.ws_connect(url, headers=headers, **options), token, nonce, purpose)
