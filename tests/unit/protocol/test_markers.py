"""Manifests and the names of directories; what the daemon does with markers is tested beside its run directory."""

from typing import Any

import pytest
from weightsync.orchestrator.protocol.limits import MAX_MARKER_BYTES, MAX_REASON_CHARS, SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import (
    Manifest,
    MarkerError,
    decode_manifest,
    encode_manifest,
    manifest,
    parse_step,
    step_name,
)
from weightsync.orchestrator.protocol.names import Version


def test_a_manifest_is_one_line_of_json_without_what_it_has_not_to_say() -> None:
    said = manifest("glm", Version(7, 40), sequence=3, round="2.9")
    line = f'{{"schema":{SCHEMA_VERSION},"run_id":"glm","generation":7,"step":40,"sequence":3,"round":"2.9"}}\n'
    assert encode_manifest(said) == line.encode()
    assert decode_manifest(line.encode()) == said
    assert said.version == Version(7, 40)


@pytest.mark.parametrize("data", [b"", b"\n", b" \t\r\n"])
def test_what_touch_makes_is_no_manifest_and_no_error(data: bytes) -> None:
    assert decode_manifest(data) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"colour": "red"}, "a manifest has no colour"),
        ({"sequence": -1}, "sequence"),
        ({"round": 5}, "round"),
        ({"restaged": 2**53 + 1}, "restaged"),
    ],
)
def test_facts_that_do_not_fit(facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(MarkerError, match=reason):
        manifest("glm", Version(7, 40), **facts)


def test_facts_cannot_rename_the_version() -> None:
    assert manifest("glm", Version(7, 40), step=41, generation=8).version == Version(7, 40)


def test_a_reason_is_cut() -> None:
    assert manifest("glm", Version(7, 40), reason="x" * 5000).reason == "x" * (MAX_REASON_CHARS - 1) + "…"
    assert manifest("glm", Version(7, 40), reason="a\ud800\nb").reason == "a\\ud800 b"


def test_the_engines_of_a_large_fleet_are_cut_and_the_marker_is_written() -> None:
    said = manifest("glm", Version(7, 40), engines=", ".join(f"{number:0128}" for number in range(4096)))
    assert said.engines.endswith("…")
    assert decode_manifest(encode_manifest(said)) == said


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"schema": %d, "run_id": "glm"' % SCHEMA_VERSION, "no whole manifest"),
        (b"[]", "no whole manifest"),
        (b"\xff", "no whole manifest"),
        (b'{"schema": 99, "run_id": "glm", "generation": 1, "step": 5}', "its schema is 99"),
        (b" " * (MAX_MARKER_BYTES + 1), "more than 65536 bytes"),
    ],
)
def test_what_is_not_believed(data: bytes, reason: str) -> None:
    with pytest.raises(MarkerError, match=reason):
        decode_manifest(data)


def test_a_manifest_that_would_not_be_read_back_is_not_written() -> None:
    giant = Manifest(schema=SCHEMA_VERSION, run_id="glm", generation=1, step=5, engines="𝄞" * (MAX_MARKER_BYTES // 2))
    with pytest.raises(MarkerError, match="exceeds the limit of 65536"):
        encode_manifest(giant)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_0", 0),
        ("step_40", 40),
        ("step_" + "9" * 18, 10**18 - 1),
        ("step_" + "9" * 19, None),
        ("step_007", None),
        ("step_-1", None),
        ("step_", None),
        ("step_4٠", None),
        ("step_4\n", None),
        ("Step_4", None),
    ],
)
def test_names_of_directories(name: str, step: int | None) -> None:
    assert parse_step(name) == step
    if step is not None:
        assert step_name(step) == name


@pytest.mark.parametrize("step", [-1, 10**18])
def test_steps_that_have_no_directory(step: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 18 digits, got {step}"):
        step_name(step)
