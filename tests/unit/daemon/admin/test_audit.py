"""The audit log keeps every line, for its owner's eyes, in bounded files."""

import json
import stat
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.admin.audit import Audit, AuditLine


def line(verb: str = "hold", reason: str = "") -> AuditLine:
    return AuditLine(
        time="t", who="ann", address="::1", credential="operator", verb=verb, target="e0", reason=reason, result="done"
    )


def test_lines_are_appended_also_by_the_next_daemon(tmp_path: Path) -> None:
    Audit(tmp_path).append(line("hold", "a\nb"))
    Audit(tmp_path).append(line("release"))
    file = tmp_path / "audit.jsonl"
    read = [json.loads(text) for text in file.read_text().splitlines()]
    assert [(each["verb"], each["reason"]) for each in read] == [("hold", "a\nb"), ("release", "")]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_full_file_makes_room(tmp_path: Path) -> None:
    audit = Audit(tmp_path, max_bytes=200)
    for number in range(9):
        audit.append(line(f"verb{number}"))
    files = [tmp_path / "audit.jsonl.1", tmp_path / "audit.jsonl"]
    kept = [json.loads(text)["verb"] for file in files for text in file.read_text().splitlines()]
    assert kept == [f"verb{number}" for number in range(9)][-len(kept) :]
    assert all(file.stat().st_size < 400 for file in files)


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        Audit(tmp_path / "absent").append(line())
