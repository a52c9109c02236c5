"""Which client an engine of the settings gets."""

from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.engines import kinds
from weightsync.orchestrator.daemon.engines.errors import UnknownEngineKind
from weightsync.orchestrator.daemon.engines.interface import EngineSetup
from weightsync.orchestrator.daemon.engines.kinds import check_kinds, client_of, section_of
from weightsync.orchestrator.daemon.engines.vllm import VllmClient
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.sections import EngineSection, PauseSection
from weightsync.orchestrator.settings.settings import load


class Abacus:
    """A client that only remembers how it was made."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup


async def test_vllm_is_the_default() -> None:
    client = client_of(EngineSection(name="a", url="http://127.0.0.1:1"), PauseSection())
    assert isinstance(client, VllmClient)
    assert client.name == "a"
    await client.close()


def test_a_client_gets_its_part_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.CLIENTS, "abacus", Abacus)  # type: ignore[arg-type]
    (tmp_path / "key").write_text("k3y\n")
    engine = EngineSection(name="a", kind="abacus", url="http://h:1", api_key_file=tmp_path / "key")
    client = client_of(engine, PauseSection(mode="wait", cache="drop"))
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
        client_of(engines[1], PauseSection())


def test_a_key_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        client_of(EngineSection(name="a", url="http://h:1", api_key_file=tmp_path / "absent"), PauseSection())


def test_an_engine_that_was_admitted_is_as_if_it_were_listed(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{id: glm, directory: {tmp_path}}}
state_directory: {tmp_path / "state"}
listen: {{token_file: {tmp_path / "token"}}}
engines_admit: {{names: [a*], hosts: [h*], api_key_file: key}}
""")
    settings = load(config, {})
    engine = Applicant(name="a", urls=("http://h:1", "http://h:2"), role="decode", pair="p")
    assert section_of(engine, settings) == EngineSection(
        name="a", url="http://h:1", more_urls=("http://h:2",), role="decode", pair="p", api_key_file=tmp_path / "key"
    )
    alone = section_of(Applicant(name="a", urls=("http://h:1",)), settings.model_copy(update={"engines_admit": None}))
    assert alone == EngineSection(name="a", url="http://h:1")
