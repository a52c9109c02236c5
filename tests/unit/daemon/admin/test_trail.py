"""What the daemon writes into its audit log by itself."""

import asyncio
import hashlib
from pathlib import Path

import msgspec
import pytest
import structlog
from weightsync.orchestrator.core.records import Committed, Decided, EpochBegan
from weightsync.orchestrator.daemon.admin import trail as module
from weightsync.orchestrator.daemon.admin.audit import NAME, Audit, AuditLine, verify
from weightsync.orchestrator.daemon.admin.trail import Trail
from weightsync.orchestrator.protocol.names import RoundName, Version

ROUND, VERSION = RoundName(3, 7), Version(0xAB, 40)
DIGESTS = {"e0/1": "22" * 16, "e0/0": "11" * 16}


def decided(digests: dict[str, str] = DIGESTS) -> Decided:
    return Decided(round=ROUND, version=VERSION, digests=digests)


COMMITTED = Committed(round=ROUND, version=VERSION, sequence=5)


async def written(directory: Path, *what: object, refused: int = 0) -> list[AuditLine]:
    """What the file holds once all of it was said, and the trail ended."""
    trail = Trail(Audit(directory))
    for record in what:
        trail.durable(record)  # type: ignore[arg-type]
    for number in range(refused):
        trail.refused("wrong token", {"remote": f"192.0.2.{number}", "path": "/status", "reason": "wrong\ntoken"})
    running = asyncio.create_task(trail.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert verify(directory).problems == ()
    return [msgspec.json.decode(line, type=AuditLine) for line in (directory / NAME).read_bytes().splitlines()]


async def test_a_commit_names_version_sequence_and_digests(tmp_path: Path) -> None:
    epoch = EpochBegan(epoch=3)
    (line,) = await written(tmp_path, epoch, decided(), COMMITTED)
    whole = hashlib.sha256(f"e0/0={'11' * 16}\ne0/1={'22' * 16}\n".encode()).hexdigest()
    assert (line.number, line.who, line.verb, line.target) == (1, "the daemon", "commit", "step 40 (generation 171)")
    assert line.reason == "round 3.7, sequence 5"
    assert line.result == f"digests: {whole} of 2: e0/0={'11' * 16} e0/1={'22' * 16}"


async def test_what_an_earlier_daemon_decided(tmp_path: Path) -> None:
    (line,) = await written(tmp_path, COMMITTED)
    assert line.result == "digests: as the journal has them, decided before this daemon began"


async def test_a_large_fleet_fits_a_line(tmp_path: Path) -> None:
    many = {f"{'e' * 120}{n}/0": "ab" * 16 for n in range(5000)}
    (line,) = await written(tmp_path, decided(many), COMMITTED)
    assert line.result.endswith(" … 4936 more")
    assert len(line.result) < 16_384


async def test_refusals_say_who_from_where_and_why(tmp_path: Path) -> None:
    first, second = await written(tmp_path, refused=2)
    assert (first.verb, first.target, first.address) == ("refused", "wrong token", "192.0.2.0")
    assert (first.reason, first.result) == ("path: /status, reason: wrong token", "turned away")
    assert second.number == 2


async def test_a_disk_that_fails_ends_nothing(tmp_path: Path) -> None:
    trail = Trail(Audit(tmp_path / "absent"))
    running = asyncio.create_task(trail.run())
    with structlog.testing.capture_logs() as logs:
        trail.durable(COMMITTED)
        async with asyncio.timeout(20):
            while not logs:  # noqa: ASYNC110  # the log has no event to wait for
                await asyncio.sleep(0)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert [line["event"] for line in logs] == ["the audit log cannot be written"]
    assert logs[0]["target"] == "step 40 (generation 171)"


async def test_a_disk_that_is_slow_costs_lines_and_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    with structlog.testing.capture_logs() as logs:
        lines = await written(tmp_path, refused=5)
    assert len(lines) == 3
    assert [line["event"] for line in logs].count("the audit log's disk is too slow: a line is lost") == 2


def test_rounds_that_are_never_committed_are_forgotten(tmp_path: Path) -> None:
    trail = Trail(Audit(tmp_path))
    for number in range(100):
        trail.decided(RoundName(1, number), DIGESTS)
    assert len(trail._decided) == module.MAX_DECIDED
