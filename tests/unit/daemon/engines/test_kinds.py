"""Which client an engine of the settings gets."""

from pathlib import Path

import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.daemon.access.tls import credential_of_peer
from weightsync.orchestrator.daemon.engines import kinds
from weightsync.orchestrator.daemon.engines.errors import EngineUnreachable, UnknownEngineKind
from weightsync.orchestrator.daemon.engines.interface import EngineSetup
from weightsync.orchestrator.daemon.engines.kinds import check_kinds, client_of, keys_now, section_of
from weightsync.orchestrator.daemon.engines.vllm import VllmClient
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.proof import admin_key
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.sections import EngineSection, EnginesTls, ListenTls, PauseSection
from weightsync.orchestrator.settings.settings import load
from weightsync.orchestrator.settings.tls import server_context


class Abacus:
    """A client that only remembers how it was made."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup


async def test_vllm_is_the_default() -> None:
    client = client_of(EngineSection(name="a", url="http://127.0.0.1:1"), PauseSection(), EnginesTls(), tuple)
    assert isinstance(client, VllmClient)
    assert client.name == "a"
    await client.close()


def test_a_client_gets_its_part_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.CLIENTS, "abacus", Abacus)  # type: ignore[arg-type]
    (tmp_path / "key").touch(mode=0o600)
    (tmp_path / "key").write_text("k3y\n")
    engine = EngineSection(name="a", kind="abacus", url="http://h:1", api_key_file=tmp_path / "key")
    client = client_of(engine, PauseSection(mode="wait", cache="drop"), EnginesTls(), tuple)
    assert isinstance(client, Abacus)
    assert client.setup == EngineSetup("a", "http://h:1", "k3y", "wait", "drop")
    assert "k3y" not in repr(client.setup)


def test_an_unknown_kind_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.CLIENTS, "abacus", Abacus)  # type: ignore[arg-type]
    engines = [EngineSection(name="a", url="http://h:1"), EngineSection(name="b", kind="slide-rule", url="http://h:2")]
    check_kinds(engines[:1])
    with pytest.raises(UnknownEngineKind, match=r"^engine b: unknown engine kind 'slide-rule'.*one of: vllm, abacus$"):
        check_kinds(engines)
    with pytest.raises(UnknownEngineKind):
        client_of(engines[1], PauseSection(), EnginesTls(), tuple)


def test_a_key_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        client_of(
            EngineSection(name="a", url="http://h:1", api_key_file=tmp_path / "absent"),
            PauseSection(),
            EnginesTls(),
            tuple,
        )


def test_an_engine_that_was_admitted_is_as_if_it_were_listed(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: glm, directory: {tmp_path}}}
state_directory: {tmp_path / "state"}
credentials: {tmp_path}
engines_admit: {{names: [a*], hosts: [h*], api_key_file: key}}
""")
    settings = load(config, {})
    engine = Applicant(name="a", urls=("http://h:1", "http://h:2"), role="decode", pair="p")
    assert section_of(engine, settings) == EngineSection(
        name="a", url="http://h:1", more_urls=("http://h:2",), role="decode", pair="p", api_key_file=tmp_path / "key"
    )
    alone = section_of(Applicant(name="a", urls=("http://h:1",)), settings.model_copy(update={"engines_admit": None}))
    assert alone == EngineSection(name="a", url="http://h:1")


@pytest.mark.parametrize("believed", [True, False])
async def test_an_engine_over_tls_is_who_its_certificate_says_and_sees_ours(tmp_path: Path, believed: bool) -> None:
    """By the authority that ``engines_tls`` names; another one's certificate is never asked with our key."""
    make_certificates(tmp_path / "own", ["127.0.0.1"], ["operator"], 2)
    make_certificates(tmp_path / "other", ["127.0.0.1"], (), 2)
    asked: list[str] = []

    async def paused(request: web.Request) -> web.Response:
        asked.append(str(credential_of_peer(request)))
        return web.json_response({"is_paused": True})

    app = web.Application()
    app.router.add_get("/is_paused", paused)
    runner = web.AppRunner(app)
    await runner.setup()
    server = ListenTls(
        certificate_file=tmp_path / "own" / "daemon.pem", key_file=tmp_path / "own" / "daemon.key",
        ca_file=tmp_path / "own" / "ca.pem", client_certificates=True,
    )  # fmt: skip
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context(server)).start()
    engine = EngineSection(name="a", url=f"https://127.0.0.1:{runner.addresses[0][1]}")
    files = tmp_path / "own"
    tls = EnginesTls(
        ca_file=(files if believed else tmp_path / "other") / "ca.pem",
        certificate_file=files / "operator.pem", key_file=files / "operator.key",
    )  # fmt: skip
    client = client_of(engine, PauseSection(), tls, tuple)
    try:
        if believed:
            assert await client.is_paused(20.0)
        else:
            with pytest.raises(EngineUnreachable, match="certificate verify failed"):
                await client.is_paused(20.0)
    finally:
        await client.close()
        await runner.cleanup()
    assert asked == (["operator"] if believed else [])


def test_the_keys_of_an_engine_are_of_the_credentials_on_disk(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    engines = "engines: [{name: a, url: 'http://h:1'}]"
    config.write_text(f"run: {{id: glm, directory: .}}\nstate_directory: s\ncredentials: credentials\n{engines}\n")
    settings = load(config, {})
    assert keys_now(settings, "a") == ()
    write_credentials(tmp_path / "credentials")
    assert keys_now(settings, "a") == (admin_key(TOKENS["engine"], "glm", "a"),)
    assert keys_now(settings, "b") == (admin_key(TOKENS["engine"], "glm", "b"),)
