"""How daemon and agent prove to each other that they hold one token, which itself never travels.

Each draws a nonce for each connection and answers the other's with an HMAC (RFC 2104, SHA-256) over both nonces, the
run, the channel, what the connection is for and who speaks; the agent's covers what it says first as well. So nothing
that was said on one connection serves on another one, in the other direction, for another run or purpose, or through
another TLS connection: the channel is named by the daemon's certificate (as RFC 5929's tls-server-end-point), which
whoever stands between the two cannot present.

The daemon proves itself in the answer to the upgrade, and an agent that does not believe it says nothing further.

An engine's server asks for a key of its own before its admin routes (``admin_key``). It is made from the same token, so
that nobody has to hand out another secret, and is good for nothing else.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

KEY_HEADER: Final = "Weightsync-Key"
"""Of the request: which token; see ``key_of``."""

NONCE_HEADER: Final = "Weightsync-Nonce"
"""Of request and answer: NONCE_BYTES in hexadecimal, drawn anew each time."""

RUN_HEADER: Final = "Weightsync-Run"
"""Of the answer: the daemon's run, which its proof covers."""

PROOF_HEADER: Final = "Weightsync-Proof"
"""Of the answer: the daemon's proof, in hexadecimal. The agent's is the beginning of its first frame."""

ADMIN_HEADER: Final = "Weightsync-Admin"
"""Of a request to an engine's admin route: admin keys with commas between, of which one has to be right."""

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32

_KEY_BYTES: Final = 16

Purpose = Literal["connect", "apply"]


@dataclass(frozen=True, slots=True)
class Challenge:
    """What both proofs of one connection cover. Nonces in hexadecimal; ``channel``: see ``channel_of``.

    ``purpose``: of the connection, so that a proof for one route is none for the other: ``connect`` as an agent, or
    ``apply`` to be a member.
    """

    run_id: str
    agent_nonce: str
    daemon_nonce: str
    channel: bytes
    purpose: Purpose = "connect"


def key_of(token: str) -> str:
    """By which the daemon finds the token among its own; it says no more of it than a proof does."""
    return _hmac(token, b"weightsync key")[:_KEY_BYTES].hex()


def admin_key(token: str, run_id: str, engine: str) -> str:
    """What opens the admin routes of ``engine`` in this run, in hexadecimal: it is sent, and neither gives the token
    nor opens another engine."""
    return _hmac(token, msgspec.msgpack.encode(("admin", run_id, engine))).hex()


def channel_of(certificate: bytes | None) -> bytes:
    """The channel's name: of the daemon's certificate in DER, empty without TLS."""
    return b"" if certificate is None else hashlib.sha256(certificate).digest()


def is_nonce(text: str) -> bool:
    """Whether ``text`` is NONCE_BYTES in lower hexadecimal digits."""
    return len(text) == 2 * NONCE_BYTES and set(text) <= set("0123456789abcdef")


def daemon_proof(token: str, challenge: Challenge) -> bytes:
    """PROOF_BYTES that only a holder of ``token`` can make."""
    return _proof(token, "daemon", challenge, b"")


def agent_proof(token: str, challenge: Challenge, said: bytes) -> bytes:
    """PROOF_BYTES that only a holder of ``token`` can make, for exactly these bytes of Hello or Application."""
    return _proof(token, "agent", challenge, said)


def same(one: bytes, other: bytes) -> bool:
    """Whether two proofs are equal; the time taken tells nothing of them."""
    return hmac.compare_digest(one, other)


def _proof(token: str, speaker: Literal["daemon", "agent"], challenge: Challenge, said: bytes) -> bytes:
    nonces = challenge.agent_nonce, challenge.daemon_nonce
    parts = (speaker, challenge.purpose, challenge.run_id, *nonces, challenge.channel, said)
    return _hmac(token, msgspec.msgpack.encode(parts))  # an encoding in which no two lists of parts look alike


def _hmac(token: str, message: bytes) -> bytes:
    return hmac.digest(token.encode(), message, "sha256")
