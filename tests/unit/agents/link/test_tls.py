"""TLS as an agent's environment names it. Over sockets: tests/unit/agents/link/test_client.py."""

import ssl
from pathlib import Path

import pytest
from weightsync.agents.link.tls import TlsError, tls_context
from weightsync.orchestrator.cli.certs import make_certificates

URL = "wss://head:7410/agents"


def test_plain_text_needs_nothing_and_is_never_what_is_left_of_tls() -> None:
    assert tls_context("ws://head:7410/agents", {}) is None
    for name in ("WEIGHTSYNC_CA_FILE", "WEIGHTSYNC_CERTIFICATE_FILE", "WEIGHTSYNC_KEY_FILE"):
        with pytest.raises(TlsError, match=f"{name} is set, and ws://head:7410/agents is not TLS: write wss://"):
            tls_context("ws://head:7410/agents", {name: "/f"})


def test_names_are_checked_whoever_the_authority_is(tmp_path: Path) -> None:
    make_certificates(tmp_path / "c", ["head"], ["trainer"], 2)
    given = {
        "WEIGHTSYNC_CA_FILE": str(tmp_path / "c" / "ca.pem"),
        "WEIGHTSYNC_CERTIFICATE_FILE": str(tmp_path / "c" / "trainer.pem"),
        "WEIGHTSYNC_KEY_FILE": str(tmp_path / "c" / "trainer.key"),
    }
    for environment in ({}, given):
        context = tls_context(URL, environment)
        assert context is not None
        assert context.check_hostname
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    own = tls_context(URL, given)
    assert own is not None
    assert len(own.get_ca_certs()) == 1, "the run's authority and no other"


@pytest.mark.parametrize("name", ["WEIGHTSYNC_CA_FILE", "WEIGHTSYNC_CERTIFICATE_FILE"])
@pytest.mark.parametrize("text", [None, "nonsense"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str | None) -> None:
    file = tmp_path / "file.pem"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TlsError, match=rf"{name} \({file}\).* cannot be used"):
        tls_context(URL, {name: str(file)})


def test_a_key_that_others_can_read_and_an_authority_that_they_can_write_are_refused(tmp_path: Path) -> None:
    """With the key somebody else could show our certificate; with the authority he could make himself a daemon."""
    make_certificates(tmp_path / "c", ["127.0.0.1"], ["engine"], 1)
    authority, key = tmp_path / "c" / "ca.pem", tmp_path / "c" / "engine.key"
    given = {
        "WEIGHTSYNC_CA_FILE": str(authority),
        "WEIGHTSYNC_CERTIFICATE_FILE": str(tmp_path / "c" / "engine.pem"),
        "WEIGHTSYNC_KEY_FILE": str(key),
    }
    assert tls_context(URL, given) is not None
    key.chmod(0o644)
    with pytest.raises(TlsError, match=rf"{key}: has mode 0644, so others can read it. Fix: chmod 600 {key}$"):
        tls_context(URL, given)
    key.chmod(0o600)
    authority.chmod(0o666)
    with pytest.raises(TlsError, match=rf"{authority}: has mode 0666, so others can write it. Fix: chmod go-w"):
        tls_context(URL, given)
