"""Each weak setting that docs/security.md and SECURITY.md warn of, in real files, told by the command itself."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import yaml
from command_line import process
from credentials import TOKENS, write_credentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from ports import free_port
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.protocol.findings import Findings

HERE: Final = "127.0.0.1"


class Place:
    """A daemon's directory in good order, and its configuration as a document that a test may spoil."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("run", "state", "tls", "away", "etc"):
            (directory / name).mkdir(mode=0o700)
        write_credentials(directory / "credentials")
        make_certificates(directory / "tls", [HERE], ("engine",), 2)
        (directory / "tls" / "ca.key").rename(directory / "away" / "ca.key")
        names = {"certificate_file": "daemon.pem", "key_file": "daemon.key", "ca_file": "ca.pem"}
        self.document: dict[str, Any] = {
            "run": {"id": "glm", "directory": "../run"},
            "state_directory": "../state",
            "credentials": "../credentials",
            "listen": {"port": free_port(), "tls": {key: f"../tls/{name}" for key, name in names.items()}},
            "engines": [{"name": "a", "url": f"https://{HERE}:{free_port()}"}],
        }
        self.config = directory / "etc" / "config.yaml"
        self.mode = 0o600

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    def engine(self, **keys: Any) -> None:
        self.document["engines"][0] |= keys

    def admit(self, **keys: Any) -> None:
        self.document["engines_admit"] = {"names": ["decode-*"], "hosts": ["10.1.0.0/16", "*.gpu.example"]} | keys

    def write(self, name: str, text: str, mode: int = 0o600) -> None:
        path = self / name
        path.write_text(text)
        path.chmod(mode)

    async def doctor(self) -> list[tuple[str, str, str, str]]:
        self.config.write_text(yaml.safe_dump(self.document))
        self.config.chmod(self.mode)
        done = await process("doctor", "--config", self.config, "--json", "--timeout", "0.5")
        assert done.out, done.err
        told = msgspec.json.decode(done.out, type=Findings)
        worst = {"error": 2, "warning": 1}
        assert done.code == max(worst.get(finding.level, 0) for finding in told.findings)
        assert not [token for token in TOKENS.values() if token in done.out]
        return [(each.level, each.check, each.what, each.fix) for each in told.findings]


def _insecure(place: Place) -> None:
    place.document["listen"] = {"host": "0.0.0.0", "port": free_port(), "insecure": True}
    place.document["advertise_url"] = "http://head:7410"


def _lists(place: Place) -> None:
    place.write("etc/engines.yaml", f"engines: [{{name: b, url: 'https://{HERE}:{free_port()}'}}]\n", 0o666)
    place.document["engines_from"] = "engines.yaml"


def _config_of_others(place: Place) -> None:
    place.mode = 0o666


def _filesystem(place: Place) -> None:
    place.document["transport"] = {"type": "filesystem"}
    (place / "run").chmod(0o777)


def _costly_key(place: Place) -> None:
    """Our own authority makes none of this kind."""
    key = rsa.generate_private_key(65537, 4096)
    name, now = x509.Name([]), datetime.datetime.now(datetime.UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(1))
    pem = serialization.Encoding.PEM
    place.write("tls/daemon.pem", certificate.sign(key, hashes.SHA256()).public_bytes(pem).decode())
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    place.write("tls/daemon.key", plain.decode())


def _tcpstore(place: Place) -> None:
    place.document["rendezvous"] = {"type": "tcpstore", "host": HERE}


def _fan_out(place: Place) -> None:
    place.document["fan_out"] = "peers"


def _short_key(place: Place) -> None:
    place.write("etc/api.key", "12345678\n")
    place.engine(api_key_file="api.key")


def _linked_journal(place: Place) -> None:
    (place / "state" / "journal.sqlite").symlink_to(place / "run" / "journal.sqlite")


WEAK: Final[dict[str, tuple[Callable[[Place], object], str, str, str, str]]] = {
    "others may write the configuration": (
        _config_of_others, "warning", "configuration", "config.yaml: has mode 0666", "chmod go-w",
    ),
    "or what is in its directory": (
        lambda place: (place / "etc").chmod(0o777), "warning", "configuration", "etc: has mode 0777", "chmod go-w",
    ),
    "or its list of engines": (_lists, "warning", "engines_from", "engines.yaml: has mode 0666", "chmod go-w"),
    "an engine's key in plain text": (
        lambda place: place.engine(url="http://192.0.2.7:8000"), "warning", "engine a",
        "http://192.0.2.7:8000 is not TLS", "https in its url",
    ),
    "of any of its servers": (
        lambda place: place.engine(more_urls=["http://192.0.2.8:8000"]), "warning", "engine a",
        "http://192.0.2.8:8000 is not TLS", "--ssl-certfile",
    ),
    "no TLS beyond this machine": (
        _insecure, "warning", "listen.insecure", "without TLS on 0.0.0.0", "set listen.tls",
    ),
    "what unpickles": (_tcpstore, "warning", "rendezvous", "tcpstore unpickles", "rendezvous: {type: hub}"),
    "engines from anywhere by name": (
        lambda place: place.admit(hosts=["*"]), "warning", "engines_admit.hosts", "* is nearly everywhere", "name the",
    ),
    "engines from anywhere by address": (
        lambda place: place.admit(hosts=["0.0.0.0/0"]), "warning", "engines_admit.hosts", "0.0.0.0/0 is nearly",
        "of your engines only",
    ),
    "proxies anywhere": (
        lambda place: place.admit(proxies=["::/0"]), "warning", "engines_admit.proxies", "::/0 is nearly everywhere",
        "of your proxies only",
    ),
    "everybody's run directory": (
        lambda place: (place / "run").chmod(0o777), "warning", "run.directory", "run has mode 0777", "chmod o-w",
    ),
    "everybody's checkpoints": (_filesystem, "warning", "run.directory", "replace weights", "chmod o-w"),
    "the authority's key is here": (
        lambda place: (place / "away" / "ca.key").rename(place / "tls" / "ca.key"), "warning", "listen.tls.ca_file",
        "ca.key is the key of", "off the daemon's host",
    ),
    "a key that costs": (_costly_key, "warning", "listen.tls", "in which the daemon hears nobody", "P-256"),
    "who lends is reached": (_fan_out, "note", "fan_out", "peers: who is on the agents' data network", "trainer"),
    "an old token still opens": (
        lambda place: place.write("credentials/engine.token", "engine-9876543210\nengine-0123456789\n"), "note",
        "credentials", "engine.token holds two tokens", "remove its second line",
    ),
    "a key that can be guessed": (
        _short_key, "warning", "api_key_file of engine a", "holds only 8 characters", "openssl rand",
    ),
    "a token that can be guessed": (
        lambda place: place.write("credentials/engine.token", "hunter2\n"), "error", "credentials",
        "a token of 7 characters, which can be guessed", "",
    ),
    "a token that others read": (
        lambda place: (place / "credentials" / "engine.token").chmod(0o644), "error", "credentials",
        "has mode 0644, so others can read it", "",
    ),
    "tokens that others put there": (
        lambda place: (place / "credentials").chmod(0o777), "error", "credentials", "has mode 0777, so others can", "",
    ),
    "a private key that others read": (
        lambda place: (place / "tls" / "daemon.key").chmod(0o644), "error", "tls", "daemon.key", "",
    ),
    "a journal that others write": (
        lambda place: (place / "state").chmod(0o777), "error", "state_directory", "state: has mode 0777", "chmod go-w",
    ),
    "a journal that is elsewhere": (
        _linked_journal, "error", "state_directory", "is a symbolic link", "put the file itself at",
    ),
}  # fmt: skip
"""How it is made weak; then level, check, and words of evidence and fix. ``config check`` gives both as one text."""


@pytest.mark.parametrize("what", WEAK)
async def test_each_is_told_with_its_field_its_value_and_the_fix(what: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    spoil, level, check, words, fix = WEAK[what]
    spoil(place)
    told = [found for found in await place.doctor() if found[:2] == (level, check)]
    assert any(words in found[2] and fix in found[3] for found in told), told


async def test_a_good_configuration_is_told_none_of_them(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.admit()
    told = await place.doctor()
    for _, level, check, words, _ in WEAK.values():
        assert not [found for found in told if found[:2] == (level, check) and words in found[2]]
    known = {"engine a", "state_directory"}  # nobody answers at the engine's URL, and a test's disk may be forgetful
    assert {check for level, check, _, _ in told if level in ("error", "warning")} <= known


async def test_a_configuration_by_links_of_ours_is_good(tmp_path: Path) -> None:
    """As Kubernetes mounts it."""
    place = Place(tmp_path)
    (place / "etc" / "..data").mkdir(mode=0o700)
    place.config.symlink_to("..data/config.yaml")
    assert ("ok", "configuration", str(place.config), "") in await place.doctor()
