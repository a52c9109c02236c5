"""What an agent claims, and how it is held to it. The whole of it over sockets: tests/unit/daemon/hub/test_hub.py."""

from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.daemon.access.access import Access, NotAdmitted
from weightsync.orchestrator.daemon.access.tls import ServerTls
from weightsync.orchestrator.protocol.codec import ProtocolError
from weightsync.orchestrator.protocol.proof import (
    KEY_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    RUN_HEADER,
    Challenge,
    agent_proof,
    daemon_proof,
    key_of,
)
from weightsync.orchestrator.settings.credentials import Credential
from weightsync.orchestrator.settings.sections import ListenTls

NONCE = "0a" * 32
WITHHELD: list[str] = []


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    make_certificates(tmp_path, ["head"], (), 2)
    files = {"certificate_file": tmp_path / "daemon.pem", "key_file": tmp_path / "daemon.key"}
    return ServerTls(ListenTls(ca_file=tmp_path / "ca.pem", **files))


@pytest.fixture
def access(tmp_path: Path, tls: ServerTls) -> Access:
    return Access(write_credentials(tmp_path / "credentials"), "glm", WITHHELD.append, tls)


def test_a_claim_answers_with_the_daemons_proof_and_wants_the_agents(access: Access, tls: ServerTls) -> None:
    headers = {KEY_HEADER: key_of(TOKENS["trainer"]), NONCE_HEADER: NONCE}
    claim = access.claim_of(make_mocked_request("GET", "/agents", headers=headers))
    assert claim.credential == Credential("trainer")
    assert set(WITHHELD) >= set(TOKENS.values())
    challenge = Challenge("glm", NONCE, claim.challenge.daemon_nonce, tls.channel)
    assert claim.headers() == {
        RUN_HEADER: "glm",
        NONCE_HEADER: challenge.daemon_nonce,
        PROOF_HEADER: daemon_proof(TOKENS["trainer"], challenge).hex(),
    }
    assert claim.said_in(agent_proof(TOKENS["trainer"], challenge, b"hello") + b"hello") == b"hello"
    for frame in (b"", b"hello", agent_proof(TOKENS["engine"], challenge, b"hello") + b"hello",
                  agent_proof(TOKENS["trainer"], replace(challenge, channel=b""), b"hello") + b"hello",
                  daemon_proof(TOKENS["trainer"], challenge)):  # fmt: skip
        with pytest.raises(ProtocolError, match="does not prove that it holds the token of trainer"):
            claim.said_in(frame)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({KEY_HEADER: key_of(TOKENS["trainer"])}, 400),
        ({KEY_HEADER: key_of(TOKENS["viewer"]), NONCE_HEADER: NONCE}, 403),
    ],
)
def test_who_is_not_admitted(access: Access, headers: dict[str, str], status: int) -> None:
    with pytest.raises(NotAdmitted) as refused:
        access.claim_of(make_mocked_request("GET", "/agents", headers=headers))
    assert refused.value.status == status


def test_a_proof_for_one_purpose_is_none_for_another(access: Access) -> None:
    headers = {KEY_HEADER: key_of(TOKENS["engine"]), NONCE_HEADER: NONCE}
    claim = access.claim_of(make_mocked_request("GET", "/engines", headers=headers), "apply")
    assert claim.challenge.purpose == "apply"
    assert claim.said_in(agent_proof(TOKENS["engine"], claim.challenge, b"I") + b"I") == b"I"
    as_agent = replace(claim.challenge, purpose="connect")
    assert claim.headers()[PROOF_HEADER] != daemon_proof(TOKENS["engine"], as_agent).hex()
    with pytest.raises(ProtocolError, match="does not prove"):
        claim.said_in(agent_proof(TOKENS["engine"], as_agent, b"I") + b"I")


def test_an_engine_applies_for_what_both_its_token_and_its_certificate_are_bound_to(access: Access) -> None:
    headers = {KEY_HEADER: key_of(TOKENS["engine"]), NONCE_HEADER: NONCE}
    claim = access.claim_of(make_mocked_request("GET", "/engines", headers=headers), "apply")
    assert claim.refuses_engine("a") == ""
    shown = replace(claim, certificate=Credential("engine", "a"))
    assert shown.refuses_engine("a") == ""
    assert shown.refuses_engine("b").startswith("by its certificate, engine 'b' came with the credential of engine a")
    assert replace(shown, credential=Credential("engine", "b")).refuses_engine("a").startswith("engine 'a' came with")
