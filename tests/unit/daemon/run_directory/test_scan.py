"""The scan of the run directory: real files, every kind of bad one, and what it costs."""

import errno
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from weightsync.orchestrator.daemon.run_directory import listing
from weightsync.orchestrator.daemon.run_directory import scan as scans
from weightsync.orchestrator.daemon.run_directory.markers import MarkerWriteError, write_marker
from weightsync.orchestrator.daemon.run_directory.scan import MarkerDirectory, Scan
from weightsync.orchestrator.protocol.limits import MAX_MARKER_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import (
    encode_manifest,
    manifest,
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
    """For which no time passes, so that it reads everything at once."""
    return MarkerDirectory(run, RUN, clock=lambda: 0.0)


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
    assert MarkerDirectory(tmp_path, RUN).scan() == Scan((), ())


def test_a_missing_run_directory_is_said_once(tmp_path: Path) -> None:
    directory = MarkerDirectory(tmp_path / "absent", RUN)
    assert [problem.path for problem in directory.scan().problems] == [str(tmp_path / "absent")]
    assert directory.scan().problems == ()
    (tmp_path / "absent").mkdir()
    assert directory.scan().problems == ()
    assert directory.problems == ()


BAD = {
    "torn": b'{"schema": %d, "run_id": "gl' % SCHEMA_VERSION,
    "no object": b"[1, 2]",
    "no JSON": b"\x00\xff\x80",
    "no step": b'{"schema": %d, "run_id": "glm", "generation": 1}' % SCHEMA_VERSION,
    "wrong type": b'{"schema": %d, "run_id": "glm", "generation": "x", "step": 5}' % SCHEMA_VERSION,
    "negative": b'{"schema": %d, "run_id": "glm", "generation": -1, "step": 5}' % SCHEMA_VERSION,
    "newer schema": b'{"schema": %d, "run_id": "glm", "generation": 1, "step": 5}' % (SCHEMA_VERSION + 1),
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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"step_\xff\xfe", "broadcasts/step_\\xff\\xfe: wrongly named"),
        (b"two\nlines", "broadcasts/two lines: wrongly named"),
        (b"\x1b[2J", "broadcasts/\\x1b[2J: wrongly named"),
        ("step_٣".encode(), "broadcasts/step_٣: wrongly named"),
    ],
)
def test_a_name_that_is_no_text_is_shown_as_text(
    run: Path, directory: MarkerDirectory, name: bytes, shown: str
) -> None:
    put(run, 3)
    os.mkdir(os.path.join(os.fsencode(run / "broadcasts"), name))
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [3]
    (problem,) = scan.problems
    assert str(problem).startswith(shown)
    assert str(problem).isprintable()
    assert str(problem).encode()
    assert directory.scan().problems == ()


def test_a_near_miss_that_is_no_text_is_shown_as_text(run: Path, directory: MarkerDirectory) -> None:
    put(run, 3, "x")
    os.mknod(os.path.join(os.fsencode(run / "broadcasts" / "step_3"), b"STABLE.\xff"))
    assert "step_3/STABLE.\\xff: wrongly named" in str(directory.scan().problems[0])


def test_hidden_names_are_silent(run: Path, directory: MarkerDirectory) -> None:
    put(run, ".nfs0001")
    put(run, ".step_1.tmp")
    assert directory.scan() == Scan((), ())


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
        write_marker(run, "COMMITTED", manifest(RUN, Version(1, 1)))
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
    write_marker(run, "COMMITTED", manifest(RUN, Version(7, 1), sequence=4))
    assert waiting(directory) == []
    put(run, 1, content=says(1, generation=8))
    (found,) = directory.scan().waiting
    assert found.committed is not None
    assert found.committed.manifest is not None
    assert found.committed.manifest.sequence == 4
    write_marker(run, "FAILED", manifest(RUN, Version(8, 1), reason="shapes"))
    assert waiting(directory) == []
    assert sorted(path.name for path in (run / "broadcasts" / "step_1").iterdir()) == ["FAILED", "STABLE"]


def test_a_version_that_is_staged_again_after_it_failed_waits_for_another_outcome(
    run: Path, directory: MarkerDirectory
) -> None:
    put(run, 1, content=encode_manifest(manifest(RUN, Version(7, 1), restaged=1)))
    write_marker(run, "FAILED", manifest(RUN, Version(7, 1), reason="no engine"))
    assert waiting(directory) == [1]
    write_marker(run, "COMMITTED", manifest(RUN, Version(7, 1), restaged=1, sequence=4))
    assert waiting(directory) == []


def test_an_empty_stable_is_settled_by_a_later_outcome(run: Path, directory: MarkerDirectory) -> None:
    stable = put(run, 1, at=OLD)
    write_marker(run, "COMMITTED", manifest(RUN, Version(7, 1)))
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


def test_too_many_steps_watch_the_newest(
    run: Path, directory: MarkerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_STEPS", 2)
    for step in (9, 10, 11):
        put(run, step)
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [10, 11]
    assert "more than 2 step directories" in scan.problems[0].what
    put(run, 12)
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [11, 12]
    assert scan.problems == ()


# ------------------------------------------------------------------------------------------------------- many of them
class Counted:
    """A scan whose clock counts: each look in turn takes one second."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.seconds = 0
        self.looked: list[int] = []
        self.directory = MarkerDirectory(run, RUN, clock=self._clock, **options)
        look = self.directory._look

        def counted(root: int, step: int, anew: bool = False) -> None:
            self.looked.append(step)
            look(root, step, anew)

        monkeypatch.setattr(self.directory, "_look", counted)
        monkeypatch.setattr(scans, "NEWEST", 2)
        monkeypatch.setattr(scans, "TURN_SECONDS", 0)
        monkeypatch.setattr(scans, "QUICK_SECONDS", 1)

    def _clock(self) -> float:
        self.seconds += 1
        return self.seconds

    def scan(self) -> tuple[Scan, list[int]]:
        self.looked.clear()
        return self.directory.scan(), sorted(self.looked)


def settle(run: Path, steps: Iterable[int], at: float | None = OLD) -> None:
    for step in steps:
        put(run, step, content=says(step), at=at)
        put(run, step, "COMMITTED", says(step), at=at)


def test_the_first_scan_takes_no_longer_than_a_later_one_and_begins_with_the_newest(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "IN_TURN_SECONDS", 4)
    settle(run, range(1, 11))
    put(run, 1, content=says(1, generation=8), at=OLD)
    counted = Counted(run, monkeypatch)
    scan, looked = counted.scan()
    assert (scan.waiting, scan.unread, min(looked)) == ((), True, 8)
    pieces = 1
    while scan.unread:
        scan, looked = counted.scan()
        pieces += 1
    assert pieces == 4
    assert [step.step for step in scan.waiting] == [1], "the last one that it came to"


def test_what_is_settled_is_looked_at_in_turn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "IN_TURN_SECONDS", 1000)
    settle(run, range(1, 11))
    counted = Counted(run, monkeypatch)
    counted.scan()
    monkeypatch.setattr(scans, "IN_TURN_SECONDS", 5)
    first, second, third = (counted.scan()[1] for _ in range(3))
    assert (first, second, third) == ([6, 7, 8, 9, 10], [3, 4, 5, 9, 10], [1, 2, 9, 10])
    put(run, 4, content=says(4, generation=8))
    assert counted.scan()[0].waiting == (), "not its turn"
    assert [step.step for step in counted.scan()[0].waiting] == [4]
    assert 4 in counted.scan()[1], "from now on it is looked at each time"


def test_a_step_that_is_asked_for_is_seen_at_once_and_from_then_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that has gone back stages a step which lies far below the newest."""
    monkeypatch.setattr(scans, "IN_TURN_SECONDS", 1000)
    settle(run, range(1, 11))
    counted = Counted(run, monkeypatch)
    counted.scan()
    monkeypatch.setattr(scans, "IN_TURN_SECONDS", 0)
    assert counted.directory.look(3).waiting == ()
    put(run, 3, content=says(3, generation=8), at=OLD + 5)
    scan, looked = counted.scan()
    assert ([step.step for step in scan.waiting], looked) == ([3], [3, 9, 10])
    settle(run, [3], at=OLD + 9)
    write_marker(run, "COMMITTED", manifest(RUN, Version(7, 3)))
    assert counted.directory.look(3).waiting == ()


def test_looks_do_not_add_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "IN_TURN_SECONDS", 0)
    settle(run, range(1, 101))
    counted = Counted(run, monkeypatch)
    for step in range(1, 101):
        counted.directory.look(step)
    assert len(set(counted.scan()[1])) == scans.ASKED


def test_a_look_needs_no_listing(run: Path, directory: MarkerDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    put(run, 5)

    def refused(_: object) -> list[str]:
        raise AssertionError("listed")

    monkeypatch.setattr(os, "listdir", refused)
    assert [step.step for step in directory.look(5).waiting] == [5]
    assert [step.step for step in directory.look(6).waiting] == [5]


def test_of_many_left_over_markers_the_youngest_are_told_of(
    run: Path, directory: MarkerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that has gone back to step 1 is among them, and the core has no hundred thousand to go through."""
    monkeypatch.setattr(scans, "MAX_WAITING", 3)
    for step in range(2, 9):
        put(run, step, at=OLD + step)
    put(run, 1, at=OLD + 100)
    assert [step.step for step in directory.scan().waiting] == [1, 7, 8]
    (problem,) = directory.scan().problems
    assert "more than 3 steps have a STABLE without an outcome" in problem.what
    assert [step.step for step in directory.look(2).waiting] == [1, 2, 7, 8], "whatever its time says, it is asked for"
    assert directory.scan().problems == ()


def test_an_unchanged_directory_is_not_listed_again(
    run: Path, directory: MarkerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(run, 5, at=OLD)
    os.utime(run / "broadcasts", (OLD, OLD))
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda root: (listed.append(root), real(root))[1])
    assert waiting(directory) == [5]
    assert waiting(directory) == [5]
    assert len(listed) == 1
    put(run, 6)
    assert waiting(directory) == [5, 6]
    assert waiting(directory) == [5, 6], "its time stamp is too young to be sure of"
    assert len(listed) == 3


def test_a_listing_that_takes_long_is_not_made_all_the_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    slow = 3.0
    real = os.listdir

    def listed(root: int) -> list[str]:
        nonlocal now
        now += slow
        return real(root)

    monkeypatch.setattr(os, "listdir", listed)
    directory = MarkerDirectory(run, RUN, network=True, clock=lambda: now)
    assert waiting(directory) == []
    put(run, 5)
    now = 32.0
    assert waiting(directory) == []
    assert [step.step for step in directory.look(5).waiting] == [5], "what is asked for waits for no listing"
    put(run, 6)
    now = 34.0
    assert waiting(directory) == [5, 6]


def test_a_network_file_system_is_asked_anew_for_the_newest_steps_without_stable(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client keeps the time stamps of directories for a while: here they never change."""
    monkeypatch.setattr(scans, "REREAD", 2)
    for step in (1, 2, 3):
        put(run, step, kind="model.safetensors", at=OLD)
    directory = MarkerDirectory(run, RUN, network=True)
    assert waiting(directory) == []
    real = scans._identity
    stale = {step_name(step): real(step_name(step), os.open(run / "broadcasts", os.O_RDONLY)) for step in (1, 2, 3)}
    monkeypatch.setattr(scans, "_identity", lambda name, root: stale[name])
    for step in (1, 2, 3):
        put(run, step)
    assert waiting(directory) == [2, 3]
    assert [step.step for step in directory.look(1).waiting] == [1, 2, 3], "this one was asked for"
    local = MarkerDirectory(run, RUN)
    local._unchanged |= {step: identity for step, (identity, _) in zip((1, 2, 3), stale.values(), strict=True)}
    assert waiting(local) == [], "the same stamps are believed of a local one"


def test_twenty_thousand_strays_are_one_line(run: Path, directory: MarkerDirectory) -> None:
    for number in range(20_000):
        (run / "broadcasts" / f"stray-{number}").touch()
    put(run, 5)
    scan = directory.scan()
    assert [step.step for step in scan.waiting] == [5]
    (problem,) = scan.problems
    assert "stray-0" in problem.what
    assert directory.scan().problems == ()
    assert directory.problems == (problem,)
