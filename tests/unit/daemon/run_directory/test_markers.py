"""One step's markers: written whole, refused by name, and read as they were written."""

import json
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.run_directory.markers import MarkerWriteError, write_marker
from weightsync.orchestrator.protocol.limits import MAX_MARKER_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import (
    MarkerError,
    decode_manifest,
    manifest,
    parse_step,
    step_name,
)
from weightsync.orchestrator.protocol.names import Version

RUN = "glm"


def test_written_markers_are_whole_json_and_leave_nothing_else(tmp_path: Path) -> None:
    told = manifest(RUN, Version(7, 9), sequence=3, round="2.5", digest="ab", reason="")
    write_marker(tmp_path, "TRANSFER_READY", told)
    folder = tmp_path / "broadcasts" / "step_9"
    (folder / ".COMMITTED.tmp").write_text("left by a dead daemon")
    write_marker(tmp_path, "COMMITTED", told)
    assert sorted(path.name for path in folder.iterdir()) == ["COMMITTED", "TRANSFER_READY"]
    assert json.loads((folder / "COMMITTED").read_bytes()) == {
        "schema": SCHEMA_VERSION, "run_id": RUN, "generation": 7, "step": 9, "sequence": 3, "round": "2.5",
        "digest": "ab",
    }  # fmt: skip
    assert decode_manifest((folder / "COMMITTED").read_bytes()) == told


def test_stable_is_not_ours_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer's"):
        write_marker(tmp_path, "STABLE", manifest(RUN, Version(1, 1)))


def test_a_failed_write_is_typed(tmp_path: Path) -> None:
    with pytest.raises(MarkerWriteError, match="COMMITTED cannot be written"):
        write_marker(tmp_path / "absent", "COMMITTED", manifest(RUN, Version(1, 1)))


def test_step_names() -> None:
    assert parse_step("step_0") == 0
    assert parse_step(step_name(10**18 - 1)) == 10**18 - 1
    for step in (-1, 10**18):
        with pytest.raises(ValueError, match="18 digits"):
            step_name(step)


def test_a_manifest_has_a_limit() -> None:
    with pytest.raises(MarkerError, match="more than"):
        decode_manifest(b"x" * (MAX_MARKER_BYTES + 1))
    assert decode_manifest(b" \n") is None


def test_a_manifest_says_only_what_it_has_fields_for() -> None:
    told = manifest(RUN, Version(1, 2), round="1.2", engines="a, b", reason="x" * 10_000)
    assert (told.engines, len(told.reason)) == ("a, b", 4000)
    with pytest.raises(MarkerError, match="has no colour"):
        manifest(RUN, Version(1, 2), colour="red")
    with pytest.raises(MarkerError, match="sequence"):
        manifest(RUN, Version(1, 2), sequence=-1)


def test_an_outcome_takes_the_place_of_the_other_one(tmp_path: Path) -> None:
    write_marker(tmp_path, "FAILED", manifest(RUN, Version(7, 9), reason="no engine"))
    write_marker(tmp_path, "COMMITTED", manifest(RUN, Version(7, 9), restaged=1))
    assert [path.name for path in (tmp_path / "broadcasts" / "step_9").iterdir()] == ["COMMITTED"]
