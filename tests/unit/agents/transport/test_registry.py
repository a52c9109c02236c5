"""Which transport a Welcome asks for, and that ends which are open stay open."""

from typing import Any

import pytest
from weightsync.agents.transport.interface import Receiver, TargetMemory
from weightsync.agents.transport.registry import TRANSPORTS, Ends, UnknownTransport, transport_of
from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings
from weightsync.orchestrator.protocol.names import Version


class End(Receiver):
    """Remembers the settings that it was opened with."""

    def __init__(self) -> None:
        self.opened: list[Any] = []

    def open(self, settings: Any) -> None:
        self.opened.append(settings)

    def renew(self, memory: TargetMemory) -> None: ...

    def arrive(self, version: Version) -> None: ...


def test_every_transport_of_the_protocol_has_its_entry() -> None:
    assert set(TRANSPORTS) == {NixlSettings, FilesystemSettings}


def test_settings_of_a_newer_daemon_are_refused_by_name() -> None:
    with pytest.raises(UnknownTransport, match=r"no transport for 'carrier pigeon'.*FilesystemSettings, NixlSettings"):
        transport_of("carrier pigeon")


def test_an_end_is_opened_once_and_kept_when_another_takes_over() -> None:
    made: list[End] = []

    def make(transport: Any) -> Receiver:
        made.append(End())
        return made[-1]

    ends: Ends[Receiver] = Ends(make)
    assert list(ends) == []
    ends.open(FilesystemSettings("/a"))
    ends.open(NixlSettings())
    assert ends.current is made[1]
    ends.open(FilesystemSettings("/b"))
    assert ends.current is made[0]
    assert list(ends) == made
    assert made[0].opened == [FilesystemSettings("/a"), FilesystemSettings("/b")]


def test_an_end_that_cannot_be_opened_is_not_taken() -> None:
    class Broken(End):
        def open(self, settings: Any) -> None:
            raise UnknownTransport("no device")

    ends: Ends[Receiver] = Ends(lambda transport: Broken())
    with pytest.raises(UnknownTransport):
        ends.open(NixlSettings())
    assert list(ends) == []
