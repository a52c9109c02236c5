"""What the hub asks about a stranger: may this agent come in, and does it prove what it claims?"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web
from weightsync.orchestrator.daemon.access.credentials import Credentials
from weightsync.orchestrator.daemon.access.door import DoorLimits
from weightsync.orchestrator.daemon.access.guard import NO_CERTIFICATE, Guard
from weightsync.orchestrator.daemon.access.refusals import Refusals
from weightsync.orchestrator.daemon.access.tls import ServerTls, credential_of_peer
from weightsync.orchestrator.protocol.codec import ProtocolError
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.proof import (
    KEY_HEADER,
    NONCE_BYTES,
    NONCE_HEADER,
    PROOF_BYTES,
    PROOF_HEADER,
    RUN_HEADER,
    Challenge,
    Purpose,
    agent_proof,
    daemon_proof,
    is_nonce,
    same,
)
from weightsync.orchestrator.settings.credentials import AGENTS, Credential

WRONG_TOKEN: Final = "wrong or missing token"


class NotAdmitted(Exception):
    """``status`` and the text are what is answered."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Claim:
    """An agent says which token it holds; its first frame has to prove it."""

    token: str
    credential: Credential
    challenge: Challenge
    certificate: Credential | None = None

    def refuses(self, member: Member) -> str:
        """Why the token or the certificate does not admit ``member``; empty where both do."""
        shown = "" if self.certificate is None else self.certificate.refuses(member)
        return self.credential.refuses(member) or (shown and f"by its certificate, {shown}")

    def refuses_engine(self, name: str) -> str:
        """Why the token or the certificate does not admit the engine ``name``; empty where both do."""
        shown = "" if self.certificate is None else self.certificate.refuses_engine(name)
        return self.credential.refuses_engine(name) or (shown and f"by its certificate, {shown}")

    def headers(self) -> dict[str, str]:
        """Of the answer to the upgrade: the daemon's proof, and what it covers."""
        return {
            RUN_HEADER: self.challenge.run_id,
            NONCE_HEADER: self.challenge.daemon_nonce,
            PROOF_HEADER: daemon_proof(self.token, self.challenge).hex(),
        }

    def said_in(self, frame: bytes) -> bytes:
        """What an agent's first frame says, a Hello or an Application, behind its proof.

        Raises:
            ProtocolError: it does not prove that it holds the token, for these bytes on this connection.
        """
        proof, said = frame[:PROOF_BYTES], frame[PROOF_BYTES:]
        if not same(proof, agent_proof(self.token, self.challenge, said)):
            raise ProtocolError(f"it does not prove that it holds the token of {self.credential}")
        return said


class Access:
    """One per daemon.

    Args:
        directory: of the token files.
        withhold: keeps a token out of the log.
        tls: None: there is none.
        limits: what strangers may cost; None: as the daemon has it.

    Attributes:
        limited: told of ``limits`` when they are others.

    Raises:
        ConfigError: a token file cannot serve.
    """

    def __init__(
        self,
        directory: Path,
        run_id: str,
        withhold: Callable[[str], None],
        tls: ServerTls | None = None,
        limits: DoorLimits | None = None,
    ) -> None:
        self._limits = limits
        self.credentials, self.refusals, self.tls = Credentials(directory, withhold), Refusals(), tls
        self.guard = Guard(self.credentials, self.refusals, tls is not None and tls.wants_certificates)
        self._run_id = run_id
        self.limited: Callable[[DoorLimits], None] = lambda _: None

    @property
    def limits(self) -> DoorLimits:
        """What strangers may cost, as far as their number goes: with TLS there are fewer."""
        if self._limits is not None:
            return self._limits
        return DoorLimits() if self.tls is None else DoorLimits().of_dearer(self.tls.price())

    async def again(self) -> None:
        """Read tokens and certificate anew.

        Raises:
            ConfigError: a file cannot serve.
        """
        await self.credentials.again()
        if self.tls is not None:
            await asyncio.to_thread(self.tls.again)
            self.limited(self.limits)

    def claim_of(self, request: web.Request, purpose: Purpose = "connect") -> Claim:
        """What an agent claims that asks for a connection for ``purpose``.

        Raises:
            NotAdmitted: no token of ours, or one that is no agent's.
        """
        known = self.credentials.of_key(request.headers.get(KEY_HEADER, ""))
        nonce = request.headers.get(NONCE_HEADER, "")
        if known is None:
            raise NotAdmitted(401, WRONG_TOKEN)
        token, credential = known
        if not is_nonce(nonce):
            raise NotAdmitted(400, f"{NONCE_HEADER} must be {NONCE_BYTES} bytes in hexadecimal")
        if credential.role not in AGENTS:
            wanted = " or ".join(sorted(AGENTS))
            raise NotAdmitted(403, f"an agent needs the token of role {wanted}, and this is one of {credential.role}")
        certificate = credential_of_peer(request)
        if self.tls is not None and self.tls.wants_certificates and certificate is None:
            raise NotAdmitted(403, NO_CERTIFICATE)
        channel = b"" if self.tls is None else self.tls.channel
        challenge = Challenge(self._run_id, nonce, secrets.token_hex(NONCE_BYTES), channel, purpose)
        return Claim(token, credential, challenge, certificate)
