"""TLS as the settings name it: contexts of the standard library, for the daemon's listener and for those who ask."""

import re
import ssl
from pathlib import Path
from typing import Final

from weightsync.orchestrator.files.ownership import NotOurs, followed, secret
from weightsync.orchestrator.settings.problems import ConfigError, Problem, not_ours
from weightsync.orchestrator.settings.sections import ListenTls

_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

MAX_CERTIFICATE_CHARS: Final = 1024 * 1024
"""Of a chain; one certificate has a thousand."""


def server_context(tls: ListenTls) -> ssl.SSLContext:
    """Of the daemon's listener: TLS 1.3, and where ``client_certificates`` are asked for, those of the CA.

    Raises:
        ConfigError: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes a session, and a stranger would have two made for him
    load_certificate(context, tls.certificate_file, tls.key_file)
    if tls.client_certificates:
        # Not CERT_REQUIRED: who may go without is for the table of policies to say, and a refusal by words helps more.
        context.verify_mode = ssl.CERT_OPTIONAL
        _load_ca(context, tls.ca_file)
    return context


def client_context(ca_file: Path | None, certificate_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """Of whoever asks a server: its name and certificate are checked, by ``ca_file`` or the system's authorities.

    Raises:
        ConfigError: a file cannot be used.
    """
    context = ssl.create_default_context() if ca_file is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        _load_ca(context, ca_file)
    if certificate_file is not None:
        load_certificate(context, certificate_file, key_file or certificate_file)
    return context


def load_certificate(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    """Have ``context`` present this certificate from now on.

    Raises:
        ConfigError: a file cannot be used; the key has to be ours alone to write and to read.
    """
    try:
        context.load_cert_chain(certificate_file, secret(key_file), password=_no_password)
    except NotOurs as error:
        raise not_ours(error) from error
    except (OSError, ValueError) as error:  # of ssl, too
        problem = f"cannot be used with {certificate_file} as certificate and key: {_reason(error)}"
        fix = "name a PEM file with the certificate and one with its key, without a password"
        raise ConfigError(key_file, Problem("", "", problem, fix)) from error


def certificate_in(path: Path) -> bytes:
    """The first certificate of a PEM file, in DER: the server's own.

    Raises:
        ConfigError: there is none.
    """
    try:
        with path.open(encoding="ascii") as stream:
            found = _CERTIFICATE.search(stream.read(MAX_CERTIFICATE_CHARS))
        return ssl.PEM_cert_to_DER_cert(found[0] if found else "")
    except (OSError, ValueError) as error:
        problem = Problem("", "", f"holds no certificate: {_reason(error)}", "name a PEM file")
        raise ConfigError(path, problem) from error


def _load_ca(context: ssl.SSLContext, ca_file: Path) -> None:
    try:
        context.load_verify_locations(followed(ca_file))
    except NotOurs as error:
        raise not_ours(error) from error
    except (OSError, ValueError) as error:
        problem = f"cannot be used as authority: {_reason(error)}"
        raise ConfigError(ca_file, Problem("", "", problem, "name a PEM file with its certificate")) from error


def _no_password() -> str:
    raise ValueError("the key asks for a password, and nobody is here to type one")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
