"""``certs``: a small authority of one run, the daemon's certificate, and one for each role of its clients.

Keys are of the curve P-256. The names of clients are URIs, as ``daemon/access/tls.py`` reads them.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from weightsync.orchestrator.daemon.access.tls import SCHEME
from weightsync.orchestrator.settings.credentials import ROLES, credential_named
from weightsync.orchestrator.settings.problems import ConfigError, Problem

CA: Final = "ca"
DAEMON: Final = "daemon"

_NAME: Final = re.compile(r"[A-Za-z0-9*_][A-Za-z0-9_.-]{0,252}")

_SLACK: Final = datetime.timedelta(hours=1)
"""Clocks of one cluster differ by seconds."""


def make_certificates(directory: Path, hosts: Sequence[str], roles: Sequence[str], days: int) -> list[Path]:
    """Write what ``directory`` does not have yet: ``NAME.pem`` and ``NAME.key`` of ca, daemon and each of ``roles``.

    Args:
        hosts: names and addresses by which the daemon is reached.
        roles: ``engine``, ``engine.NAME``.
        days: until they expire.

    Returns:
        The files that were made.

    Raises:
        ConfigError: no role's name, or files of another kind are there.
        ValueError: one of ``hosts`` is no name and no address.
        OSError: the directory cannot be written.
    """
    for role in roles:
        if credential_named(role) is None:
            raise ConfigError(directory, Problem("", "", f"{role!r} is no role", f"use one of {', '.join(ROLES)}"))
    names = [_host(host) for host in hosts]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made: list[Path] = []
    authority = _authority(directory, days, made)
    _issue(directory, DAEMON, names, ExtendedKeyUsageOID.SERVER_AUTH, authority, days, made)
    for role in roles:
        uri = x509.UniformResourceIdentifier(SCHEME + role)
        _issue(directory, role, [uri], ExtendedKeyUsageOID.CLIENT_AUTH, authority, days, made)
    return made


_Authority = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _authority(directory: Path, days: int, made: list[Path]) -> _Authority:
    certificate_file, key_file = directory / f"{CA}.pem", directory / f"{CA}.key"
    if certificate_file.exists() or key_file.exists():
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            problem = f"cannot be used as authority: {error}"
            raise ConfigError(key_file, Problem("", "", problem, "name another directory")) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(key_file, Problem("", "", "is no key of ours", "name another directory"))
        return certificate, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weightsync of this run")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    _write(directory, CA, certificate, key, made)
    return certificate, key


def _issue(
    directory: Path,
    name: str,
    names: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    authority: _Authority,
    days: int,
    made: list[Path],
) -> None:
    if (directory / f"{name}.pem").exists():
        return
    issuer, issuer_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"weightsync {name}"[:64])])
    builder = (
        _builder(subject, issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    _write(directory, name, builder.sign(issuer_key, hashes.SHA256()), key, made)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _write(
    directory: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, made: list[Path]
) -> None:
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    # The key first: a certificate that is there has its key.
    for path, data, mode in (
        (directory / f"{name}.key", secret, 0o600),
        (directory / f"{name}.pem", certificate.public_bytes(pem), 0o644),
    ):
        path.unlink(missing_ok=True)  # what an interrupted call has left
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with open(file, "wb") as stream:
            stream.write(data)
        made.append(path)


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if not _NAME.fullmatch(text):
            raise ValueError(f"--host {text!r} is neither a host's name nor an address") from None
        return x509.DNSName(text)
