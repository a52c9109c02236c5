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
