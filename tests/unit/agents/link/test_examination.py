"""What an agent says of its surroundings, and of the daemon's clock."""

import logging
import time

import pytest
from weightsync.agents.link.examination import clock, examination
from weightsync.orchestrator.protocol.edges import FilesystemSettings, NixlSettings
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.messages import Examined, TransportSettings
from weightsync.orchestrator.protocol.names import Member

DATE = "Thu, 26 Nov 2026 12:00:00 GMT"
NOON = time.mktime(time.strptime("Thu, 26 Nov 2026 12:00:00", "%a, %d %b %Y %H:%M:%S")) - time.timezone
RANK = Member("trainer", "", 3)
WRONG = Finding("warning", "64 MB are free", "more", "shared memory")


def test_clocks() -> None:
    assert list(clock(DATE, NOON)) == []
    [ahead], [behind] = list(clock(DATE, NOON - 60)), list(clock(DATE, NOON + 61))
    assert ("60 s ahead of" in ahead.what, "60 s behind" in behind.what) == (True, True)
    assert list(clock("yesterday", NOON)) == list(clock("", NOON)) == []


async def test_all_that_is_wrong_is_said_and_logged_worst_first(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[TransportSettings] = []

    def look(transport: TransportSettings) -> list[Finding]:
        asked.append(transport)
        return [Finding("ok", "20000", check="open files"), Finding("note", "preset"), WRONG]

    said = await examination(RANK, look, NixlSettings(rails=3), (DATE, NOON - 60))
    skew = Finding("warning", "the daemon's clock is 60 s ahead of this host's", SYNCHRONISE, "clock")
    assert said == Examined(findings=(skew, WRONG, Finding("note", "preset")))
    assert asked == [NixlSettings(rails=3)]
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "trainer/3: clock: the daemon's clock is 60 s ahead of this host's. Fix: " + SYNCHRONISE),
        (logging.WARNING, "trainer/3: shared memory: 64 MB are free. Fix: more"),
    ]


SYNCHRONISE = "synchronise both hosts' clocks (chrony, NTP)"


async def test_where_nothing_is_wrong_nothing_is_said() -> None:
    said = await examination(RANK, lambda transport: [Finding("ok", "fine")], FilesystemSettings("/run"), (DATE, NOON))
    assert said is None
