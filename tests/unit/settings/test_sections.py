"""The sections: unions by type, and what they become for core and agents."""

from pathlib import Path

import pytest
from settings_files import MINIMAL, Loaded, Refusal
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


ADMIT = "engines_admit: {names: [a*], hosts: [10.1.0.0/16]}\n"


def test_engines_may_come_by_themselves_alone(loaded: Loaded) -> None:
    admit = loaded(ADMIT, ENGINES="[]").engines_admit
    assert admit is not None
    assert (admit.names, admit.hosts, admit.proxies, admit.api_key_file) == (("a*",), ("10.1.0.0/16",), (), None)
    assert (admit.at_most, admit.leave_seconds) == (64, 60.0)
    assert loaded().engines_admit is None


@pytest.mark.parametrize(
    ("admit", "key", "words"),
    [
        ("{hosts: [h]}", "engines_admit.names", "the key is missing"),
        ("{names: [a*]}", "engines_admit.hosts", "the key is missing"),
        ("{names: [], hosts: [h]}", "engines_admit.names", ""),
        ("{names: [a/*], hosts: [h]}", "engines_admit.names[0]", ""),
        ("{names: [a*], hosts: [10.1.*]}", "engines_admit.hosts[0]", "is no network such as"),
        ("{names: [a*], hosts: [h], proxies: [proxy]}", "engines_admit.proxies[0]", "is no network such as"),
        ("{names: [a*], hosts: [h], at_most: 0}", "engines_admit.at_most", ""),
        ("{names: [a*], hosts: [h], leave_seconds: 1}", "engines_admit.leave_seconds", ""),
    ],
)
def test_who_may_come_is_said_rightly(refusal: Refusal, admit: str, key: str, words: str) -> None:
    (problem,) = refusal(MINIMAL + f"engines_admit: {admit}\n").problems
    assert (problem.key, words in problem.problem) == (key, True)
