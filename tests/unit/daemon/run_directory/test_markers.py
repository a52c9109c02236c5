"""The marker directory: real files, every kind of bad one, and what a scan costs."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.run_directory import markers
from weightsync.orchestrator.daemon.run_directory.markers import MarkerDirectory, MarkerWriteError
from weightsync.orchestrator.protocol.limits import MAX_MARKER_BYTES
from weightsync.orchestrator.protocol.markers import (
    MarkerError,
    decode_manifest,
    encode_manifest,
    manifest,
    parse_step,
    step_name,
)
from weightsync.orchestrator.protocol.names import Version

RUN = "glm"
OLD = time.time() - 3600


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "broadcasts").mkdir()
    return tmp_path


@pytest.fixture
def directory(run: Path) -> MarkerDirectory:
    return MarkerDirectory(run, RUN)


def put(run: Path, step: int | str, kind: str = "STABLE", content: bytes = b"", at: float | None = None) -> Path:
    folder = run / "broadcasts" / (f"step_{step}" if isinstance(step, int) else step)
    folder.mkdir(exist_ok=True)
    path = folder / kind
    path.write_bytes(content)
    if at is not None:
        os.utime(path, (at, at))
        os.utime(folder, (at, at))
    return path


def says(step: int, generation: int = 7, run_id: str = RUN) -> bytes:
    return encode_manifest(manifest(run_id, Version(generation, step)))


def waiting(directory: MarkerDirectory) -> list[int]:
    return [step.step for step in directory.scan().waiting]


def test_an_empty_stable_is_enough(run: Path, directory: MarkerDirectory) -> None:
    put(run, 3)
    put(run, 12, content=says(12))
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [3, 12]
    assert scan.problems == ()
    empty, told = (step.stable for step in scan.waiting)
    assert empty is not None
    assert empty.manifest is None
    assert told is not None
    assert told.manifest is not None
    assert told.manifest.version == Version(7, 12)


def test_nothing_yet(tmp_path: Path) -> None:
    assert MarkerDirectory(tmp_path, RUN).scan() == markers.Scan((), ())


def test_a_missing_run_directory_is_said_once(tmp_path: Path) -> None:
    directory = MarkerDirectory(tmp_path / "absent", RUN)
    assert [problem.path for problem in directory.scan().problems] == [str(tmp_path / "absent")]
    assert directory.scan().problems == ()
    (tmp_path / "absent").mkdir()
    assert directory.scan().problems == ()
    assert directory.problems == ()


BAD = {
    "torn": b'{"schema": 2, "run_id": "gl',
    "no object": b"[1, 2]",
    "no JSON": b"\x00\xff\x80",
    "no step": b'{"schema": 2, "run_id": "glm", "generation": 1}',
    "wrong type": b'{"schema": 2, "run_id": "glm", "generation": "x", "step": 5}',
    "negative": b'{"schema": 2, "run_id": "glm", "generation": -1, "step": 5}',
    "newer schema": b'{"schema": 3, "run_id": "glm", "generation": 1, "step": 5}',
    "deep": b"[" * 60000,
    "foreign run": encode_manifest(manifest("other", Version(7, 5))),
    "other step": encode_manifest(manifest(RUN, Version(7, 6))),
    "oversized": b" " * (MAX_MARKER_BYTES + 1),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_contents_are_one_problem_and_disturb_nothing(
    run: Path, directory: MarkerDirectory, content: bytes
) -> None:
    put(run, 4, content=says(4))
    path = put(run, 5, content=content)
    put(run, 6)
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [4, 6]
    (problem,) = scan.problems
    assert problem.path == "broadcasts/step_5/STABLE"
    assert problem.what
    assert problem.fix
    assert not directory.scan().problems
    assert directory.problems == (problem,)
    assert path.read_bytes() == content
    path.write_bytes(says(5))
    assert waiting(directory) == [4, 5, 6]
    assert not directory.problems


def test_a_foreign_run_is_named(run: Path, directory: MarkerDirectory) -> None:
    put(run, 5, content=says(5, run_id="other"))
    assert "belongs to run 'other', this daemon serves 'glm'" in directory.scan().problems[0].what


WRONG_NAMES = ["step_007", "step_", "step_x", "step_1.tmp", "STEP_1", "step_-1", "step_" + "9" * 19, "step_٣"]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_wrong_names_are_ignored_once(run: Path, directory: MarkerDirectory, name: str) -> None:
    put(run, name)
    put(run, 1)
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [1]
    assert [(problem.path, problem.what) for problem in scan.problems] == [
        (f"broadcasts/{name}", "wrongly named, ignored")
    ]
    assert directory.scan().problems == ()


def test_hidden_names_are_silent(run: Path, directory: MarkerDirectory) -> None:
    put(run, ".nfs0001")
    put(run, ".step_1.tmp")
    assert directory.scan() == markers.Scan((), ())


@pytest.mark.parametrize("name", ["stable", "STABLE.json", "Stable.tmp"])
def test_a_near_miss_is_pointed_out(run: Path, directory: MarkerDirectory, name: str) -> None:
    put(run, 1, kind=name)
    put(run, 2, kind="model.safetensors")
    problems = directory.scan().problems
    assert [(problem.path, problem.fix) for problem in problems] == [(f"broadcasts/step_1/{name}", "name it STABLE")]


def test_symbolic_links_are_not_followed(run: Path, directory: MarkerDirectory) -> None:
    elsewhere = run / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "STABLE").write_bytes(says(1))
    (run / "broadcasts" / "step_1").symlink_to(elsewhere)
    put(run, 2).unlink()
    (run / "broadcasts" / "step_2" / "STABLE").symlink_to(elsewhere / "STABLE")
    (run / "broadcasts" / "step_3").write_text("a file")
    scan = directory.scan()
    assert scan.waiting == ()
    assert {problem.path: problem.what for problem in scan.problems} == {
        "broadcasts/step_1": "is a symbolic link, ignored",
        "broadcasts/step_2/STABLE": "not believed: it is a symbolic link",
        "broadcasts/step_3": "is no directory, ignored",
    }
    with pytest.raises(MarkerWriteError):
        directory.write("COMMITTED", manifest(RUN, Version(1, 1)))
    assert not (elsewhere / "COMMITTED").exists()


def test_broadcasts_may_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "broadcasts").symlink_to(tmp_path / "real")
    put(tmp_path, 1)
    directory = MarkerDirectory(tmp_path, RUN)
    scan = directory.scan()
    assert scan.waiting == ()
    assert [problem.path for problem in scan.problems] == ["broadcasts"]


def test_what_is_no_regular_file_is_not_opened(run: Path, directory: MarkerDirectory) -> None:
    for step in (1, 2):
        put(run, step).unlink()
    os.mkfifo(run / "broadcasts" / "step_1" / "STABLE")
    (run / "broadcasts" / "step_2" / "STABLE").mkdir()
    scan = directory.scan()
    assert [problem.what for problem in scan.problems] == ["not believed: it is no regular file"] * 2


def test_no_permission_is_a_problem_of_that_step_only(
    run: Path, directory: MarkerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = put(run, 1).stat().st_ino
    put(run, 2)
    real = os.open

    def opened(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        # Raised here because a test that runs as root may read everything.
        if os.stat(path, dir_fd=dir_fd).st_ino == refused:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", opened)
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [2]
    assert [(problem.path, problem.what) for problem in scan.problems] == [
        ("broadcasts/step_1/STABLE", "cannot be read: Permission denied")
    ]


def test_an_outcome_settles_its_generation_only(run: Path, directory: MarkerDirectory) -> None:
    put(run, 1, content=says(1, generation=7))
    directory.write("COMMITTED", manifest(RUN, Version(7, 1), sequence=4))
    assert waiting(directory) == []
    put(run, 1, content=says(1, generation=8))
    (found,) = directory.scan().waiting
    assert found.committed is not None
    assert found.committed.manifest is not None
    assert found.committed.manifest.sequence == 4
    directory.write("FAILED", manifest(RUN, Version(8, 1), reason="shapes"))
    assert waiting(directory) == []
    assert sorted(path.name for path in (run / "broadcasts" / "step_1").iterdir()) == ["FAILED", "STABLE"]


def test_a_version_that_is_staged_again_after_it_failed_waits_for_another_outcome(
    run: Path, directory: MarkerDirectory
) -> None:
    put(run, 1, content=encode_manifest(manifest(RUN, Version(7, 1), restaged=1)))
    directory.write("FAILED", manifest(RUN, Version(7, 1), reason="no engine"))
    assert waiting(directory) == [1]
    directory.write("COMMITTED", manifest(RUN, Version(7, 1), restaged=1, sequence=4))
    assert waiting(directory) == []


def test_an_empty_stable_is_settled_by_a_later_outcome(run: Path, directory: MarkerDirectory) -> None:
    stable = put(run, 1, at=OLD)
    directory.write("COMMITTED", manifest(RUN, Version(7, 1)))
    assert waiting(directory) == []
    os.utime(stable, (time.time() + 5, time.time() + 5))
    assert waiting(directory) == [1]


def test_a_touch_is_seen_although_the_directory_does_not_change(run: Path, directory: MarkerDirectory) -> None:
    stable = put(run, 1, at=OLD)
    put(run, 1, "COMMITTED", says(1), at=OLD + 1)
    assert waiting(directory) == []
    folder = stable.parent.stat().st_mtime_ns
    os.utime(stable)
    assert stable.parent.stat().st_mtime_ns == folder
    assert waiting(directory) == [1]


def test_unchanged_steps_are_not_read_again(
    run: Path, directory: MarkerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(300):
        put(run, step, at=OLD)
        put(run, step, "COMMITTED", says(step), at=OLD)
    fresh = put(run, 300)
    assert waiting(directory) == [300]
    opened: list[object] = []
    real = os.open

    def counted(path: object, *arguments: object, **keywords: object) -> int:
        opened.append(path)
        return real(path, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", counted)
    assert waiting(directory) == [300]
    assert opened == [run, "broadcasts", "step_300", "STABLE"]
    fresh.unlink()
    fresh.parent.rmdir()
    assert waiting(directory) == []


def test_written_markers_are_whole_json_and_leave_nothing_else(run: Path, directory: MarkerDirectory) -> None:
    (run / "broadcasts").rmdir()
    told = manifest(RUN, Version(7, 9), sequence=3, round="2.5", digest="ab", reason="")
    directory.write("TRANSFER_READY", told)
    folder = run / "broadcasts" / "step_9"
    (folder / ".COMMITTED.tmp").write_text("left by a dead daemon")
    directory.write("COMMITTED", told)
    assert sorted(path.name for path in folder.iterdir()) == ["COMMITTED", "TRANSFER_READY"]
    assert json.loads((folder / "COMMITTED").read_bytes()) == {
        "schema": 2, "run_id": RUN, "generation": 7, "step": 9, "sequence": 3, "round": "2.5", "digest": "ab",
    }  # fmt: skip
    assert decode_manifest((folder / "COMMITTED").read_bytes()) == told
    put(run, 9, content=says(9))
    assert waiting(directory) == [], "its outcome settles it"


def test_stable_is_not_ours_to_write(directory: MarkerDirectory) -> None:
    with pytest.raises(ValueError, match="trainer's"):
        directory.write("STABLE", manifest(RUN, Version(1, 1)))


def test_a_failed_write_is_typed(tmp_path: Path) -> None:
    with pytest.raises(MarkerWriteError, match="COMMITTED cannot be written"):
        MarkerDirectory(tmp_path / "absent", RUN).write("COMMITTED", manifest(RUN, Version(1, 1)))


def test_too_many_steps_watch_the_newest(
    run: Path, directory: MarkerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markers, "MAX_STEPS", 2)
    for step in (9, 10, 11):
        put(run, step)
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [10, 11]
    assert "3 step directories" in scan.problems[0].what


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
