"""TLS files: what is wrong with one is named; contexts check what they should."""

import ssl
import subprocess
from pathlib import Path

import pytest
from settings_files import MINIMAL, Refusal
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.sections import ListenTls
from weightsync.orchestrator.settings.settings import load
from weightsync.orchestrator.settings.tls import certificate_in, client_context, server_context


@pytest.fixture
def files(tmp_path: Path) -> ListenTls:
    directory = tmp_path / "c"
    make_certificates(directory, ["head", "127.0.0.1"], ["viewer"], 2)
    return ListenTls(
        certificate_file=directory / "daemon.pem", key_file=directory / "daemon.key", ca_file=directory / "ca.pem"
    )


def test_certificates_of_clients_are_asked_for_where_they_are_wanted(files: ListenTls) -> None:
    assert server_context(files).verify_mode is ssl.CERT_NONE
    wanting = server_context(files.model_copy(update={"client_certificates": True}))
    assert wanting.verify_mode is ssl.CERT_OPTIONAL
    assert wanting.minimum_version is ssl.TLSVersion.TLSv1_3


def test_a_client_believes_one_authority_or_the_systems(files: ListenTls) -> None:
    own = client_context(files.ca_file, None, None)
    assert (own.check_hostname, own.verify_mode, len(own.get_ca_certs())) == (True, ssl.CERT_REQUIRED, 1)
    systems = client_context(None, None, None)
    assert (systems.check_hostname, systems.verify_mode) == (True, ssl.CERT_REQUIRED)


def test_the_first_certificate_of_a_chain_is_the_servers(files: ListenTls, tmp_path: Path) -> None:
    own, authority = files.certificate_file.read_text(), files.ca_file.read_text()
    (tmp_path / "chain.pem").write_text(f"some text\n{own}{authority}")
    assert certificate_in(tmp_path / "chain.pem") == ssl.PEM_cert_to_DER_cert(own)


def test_what_cannot_serve_is_named(files: ListenTls, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_certificates(other, ["head"], (), 2)
    with pytest.raises(ConfigError, match=rf"{other}/daemon.key: cannot be used with .*daemon.pem .*(?i:mismatch)"):
        server_context(files.model_copy(update={"key_file": other / "daemon.key"}))
    with pytest.raises(ConfigError, match=r"absent: cannot be used .*No such file"):
        server_context(files.model_copy(update={"key_file": tmp_path / "absent"}))
    files.key_file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"daemon.key: has mode 0644, so others can read it. Fix: chmod 600"):
        server_context(files)
    files.key_file.chmod(0o666)
    with pytest.raises(ConfigError, match=r"daemon.key: has mode 0666"):
        server_context(files)
    with pytest.raises(ConfigError, match=r"daemon.key: holds no certificate"):
        certificate_in(files.key_file)
    with pytest.raises(ConfigError, match="absent: cannot be used as authority: No such file"):
        client_context(tmp_path / "absent", None, None)


def test_a_key_with_a_password_waits_for_nobody(files: ListenTls, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", str(files.key_file), "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="the key asks for a password"):
        server_context(files.model_copy(update={"key_file": locked}))


TLS = "tls: {certificate_file: c.pem, key_file: c.key, ca_file: ca.pem}"


def listening(text: str) -> str:
    return MINIMAL.replace("{port: 7410}", f"{{port: 7410, {text}}}")


def test_beyond_this_machine_it_is_tls_or_said(config: Path, refusal: Refusal, tmp_path: Path) -> None:
    says = str(refusal(listening("host: 192.0.2.7")))
    assert "listen.host is 192.0.2.7, beyond this machine, and there is no TLS" in says
    assert "listen.insecure: true" in says
    for host in ("127.0.0.1", "127.1.2.3", "'::1'", "localhost"):
        config.write_text(listening(f"host: {host}"))
        assert load(config, {}).agents_url.startswith("http://")
    config.write_text(listening("host: 192.0.2.7, insecure: true"))
    assert load(config, {}).agents_url == "http://192.0.2.7:7410"
    config.write_text(listening(f"host: 192.0.2.7, {TLS}"))
    settings = load(config, {})
    assert settings.agents_url == "https://192.0.2.7:7410"
    assert settings.listen.tls is not None
    assert settings.listen.tls.key_file == tmp_path / "c.key"


def test_tls_ends_at_the_daemon(refusal: Refusal) -> None:
    assert "the daemon speaks http (listen.tls): TLS has to end" in str(
        refusal(MINIMAL + "advertise_url: https://head")
    )
    assert "the daemon speaks https" in str(refusal(listening(TLS) + "advertise_url: http://head"))
