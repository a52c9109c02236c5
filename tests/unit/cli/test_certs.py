"""``certs`` and ``tokens``, as a user meets them, and what the certificates are by openssl's own judgement."""

import json
import subprocess
from pathlib import Path

import pytest
from command_line import cli, process
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.settings.problems import ConfigError


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


async def test_an_authority_the_daemons_certificate_and_one_for_each_role(tmp_path: Path) -> None:
    made = tmp_path / "certs"
    done = await process(
        "certs",
        made,
        "--host",
        "head",
        "--host",
        "192.0.2.7",
        "--days",
        "30",
        "--role",
        "engine.engine-0",
        "--role",
        "viewer",
    )
    assert (done.code, done.err) == (0, "")
    names = ["ca", "daemon", "engine.engine-0", "viewer"]
    assert sorted(file.name for file in made.iterdir()) == sorted(
        f"{name}{end}" for name in names for end in (".key", ".pem")
    )
    assert set(done.out.split()) == {str(file) for file in made.iterdir()}
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in made.glob("*.key"))
    for name, purpose in (("daemon", "sslserver"), ("engine.engine-0", "sslclient"), ("viewer", "sslclient")):
        said = openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", made / "ca.pem", made / f"{name}.pem")
        assert said.strip().endswith("OK")
    said = openssl(
        "x509", "-in", made / "daemon.pem", "-noout", "-ext", "subjectAltName,basicConstraints", "-checkend", 29 * 86400
    )
    assert "DNS:head, IP Address:192.0.2.7" in said
    assert "CA:FALSE" in said
    assert "URI:weightsync:engine.engine-0" in openssl("x509", "-in", made / "engine.engine-0.pem", "-noout", "-text")
    kept = (made / "daemon.pem").read_bytes()
    more = await cli("certs", made, "--host", "head", "--role", "operator")
    assert more.out.split() == [str(made / "operator.key"), str(made / "operator.pem")]
    assert (made / "daemon.pem").read_bytes() == kept
    assert openssl("verify", "-CAfile", made / "ca.pem", made / "operator.pem").strip().endswith("OK")
    assert "has all of them already" in (await cli("certs", made, "--role", "operator")).out


def test_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'admin' is no role. Fix: use one of trainer, engine, viewer, operator"):
        make_certificates(tmp_path / "c", ["head"], ["admin"], 2)
    with pytest.raises(ValueError, match=r"--host 'a b' is neither a host's name nor an address"):
        make_certificates(tmp_path / "c", ["a b"], ["viewer"], 2)
    assert not (tmp_path / "c").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "ca.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be used as authority"):
        make_certificates(tmp_path / "d", ["head"], ["viewer"], 2)
    with pytest.raises(ValueError, match="neither a host's name nor an address"):
        make_certificates(tmp_path / "e", ["hé"], [], 2)


async def test_tokens(tmp_path: Path) -> None:
    said = json.loads((await cli("tokens", tmp_path / "j", "--role", "viewer", "--json")).out)
    assert said == {"made": [str(tmp_path / "j" / "viewer.token")]}
    assert json.loads((await cli("tokens", tmp_path / "j", "--role", "viewer", "--json")).out) == {"made": []}
    done = await process("tokens", tmp_path / "t")
    assert done.code == 0
    assert [Path(line).name for line in done.out.split()] == [
        "trainer.token", "engine.token", "viewer.token", "operator.token",
    ]  # fmt: skip
    assert (await cli("tokens", tmp_path / "t")).out == f"{tmp_path / 't'} has all of them already\n"
    assert (await cli("tokens", tmp_path / "t", "--role", "viewer.ann")).out.strip().endswith("viewer.ann.token")
    wrong = await cli("tokens", tmp_path / "t", "--role", "admin")
    assert (wrong.code, "is no role's name" in wrong.err) == (78, True)
    (tmp_path / "file").touch()
    assert (await cli("tokens", tmp_path / "file")).code == 78
