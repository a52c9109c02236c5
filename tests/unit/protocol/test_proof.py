"""Both sides' proofs, against HMAC worked out another way, and whatever they must not be mistaken for."""

import hashlib
import itertools
from dataclasses import replace

import msgspec
import pytest
from weightsync.orchestrator.protocol.proof import (
    Challenge,
    admin_key,
    agent_proof,
    channel_of,
    daemon_proof,
    is_nonce,
    key_of,
    same,
)

TOKEN = "0123456789abcdef"
CHALLENGE = Challenge("glm", "ab" * 32, "cd" * 32, b"channel")


def hmac_by_hand(key: bytes, message: bytes) -> bytes:
    """RFC 2104 §2 with SHA-256 (blocks of 64 bytes)."""
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).digest()


def test_they_are_hmacs_over_all_that_is_said() -> None:
    parts = ["daemon", "connect", "glm", "ab" * 32, "cd" * 32, b"channel", b""]
    assert daemon_proof(TOKEN, CHALLENGE) == hmac_by_hand(TOKEN.encode(), msgspec.msgpack.encode(parts))
    parts = ["agent", "connect", "glm", "ab" * 32, "cd" * 32, b"channel", b"hello"]
    assert agent_proof(TOKEN, CHALLENGE, b"hello") == hmac_by_hand(TOKEN.encode(), msgspec.msgpack.encode(parts))
    assert key_of(TOKEN) == hmac_by_hand(TOKEN.encode(), b"weightsync key")[:16].hex()
    assert channel_of(b"der") == hashlib.sha256(b"der").digest()
    assert channel_of(None) == b""


def test_no_two_of_them_are_alike() -> None:
    others = [
        CHALLENGE,
        replace(CHALLENGE, purpose="apply"),
        replace(CHALLENGE, run_id="glm2"),
        replace(CHALLENGE, agent_nonce=CHALLENGE.daemon_nonce, daemon_nonce=CHALLENGE.agent_nonce),
        replace(CHALLENGE, channel=b""),
        replace(CHALLENGE, channel=b"channe", daemon_nonce=CHALLENGE.daemon_nonce + "l"),
    ]
    proofs = [daemon_proof(TOKEN, other) for other in others]
    proofs += [agent_proof(TOKEN, other, hello) for other in others for hello in (b"", b"hello")]
    proofs.append(daemon_proof(TOKEN + "0", CHALLENGE))
    assert not any(same(one, other) for one, other in itertools.combinations(proofs, 2))


@pytest.mark.parametrize(
    ("text", "is_one"), [("ab" * 32, True), ("AB" * 32, False), ("ab" * 31, False), ("äb" * 32, False)]
)
def test_what_a_nonce_is(text: str, is_one: bool) -> None:
    assert is_nonce(text) is is_one


def test_an_admin_key_is_of_one_engine_in_one_run() -> None:
    key = admin_key(TOKEN, "glm", "a0")
    assert bytes.fromhex(key) == hmac_by_hand(TOKEN.encode(), msgspec.msgpack.encode(["admin", "glm", "a0"]))
    others = [(TOKEN, "glm", "a1"), (TOKEN, "glma", "0"), (TOKEN, "", ""), (TOKEN + "f", "glm", "a0")]
    keys = [key, key_of(TOKEN), *(admin_key(*other) for other in others)]
    assert len(set(keys)) == len(keys)
