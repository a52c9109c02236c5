"""The sections: unions by type, and what they become for core and agents."""

from pathlib import Path

from settings_files import Loaded
from weightsync.orchestrator.core.policy import GroupAddress
from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings
from weightsync.orchestrator.settings.sections import FilesystemSection, NixlSection, TcpStoreSection


def test_unions(loaded: Loaded) -> None:
    settings = loaded("transport: {type: filesystem}\nrendezvous: {type: tcpstore, host: head, port: 29502}\n")
    assert settings.transport == FilesystemSection()
    assert settings.transport.message(Path("/runs/a")) == FilesystemSettings("/runs/a")
    assert settings.rendezvous == TcpStoreSection(host="head", port=29502, timeout_seconds=1200)
    assert NixlSection().message(Path("/runs/a")) == NixlSettings()


def test_only_the_store_has_a_group_address(loaded: Loaded) -> None:
    store = loaded("rendezvous: {type: tcpstore, host: head, port: 29502}\n").rendezvous
    assert store.group_address() == GroupAddress(host="head", port=29502, timeout_seconds=1200)
    assert loaded().rendezvous.group_address() is None


def test_a_section_without_type_is_of_the_default_one(loaded: Loaded) -> None:
    assert loaded("transport: {rails: 3}\n").transport == NixlSection(rails=3)
