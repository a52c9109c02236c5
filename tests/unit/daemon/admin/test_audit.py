"""The audit log keeps every line, for its owner's eyes, in bounded files, and nobody changes one unnoticed."""

import hashlib
import json
import stat
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.admin.audit import MAX_SHOWN, NOTHING, Audit, AuditLine, newest, verify


def line(verb: str = "hold", reason: str = "") -> AuditLine:
    return AuditLine(
        time="t", who="ann", address="::1", credential="operator", verb=verb, target="e0", reason=reason, result="done"
    )


def file_of(directory: Path) -> Path:
    return directory / "audit.jsonl"


def test_lines_are_appended_also_by_the_next_daemon(tmp_path: Path) -> None:
    first = Audit(tmp_path).append(line("hold", "a\nb"))
    second = Audit(tmp_path).append(line("release"))
    file = file_of(tmp_path)
    texts = file.read_bytes().splitlines()
    read = [json.loads(text) for text in texts]
    assert [(each["verb"], each["reason"]) for each in read] == [("hold", "a\nb"), ("release", "")]
    assert [each["number"] for each in read] == [1, 2]
    assert [each["before"] for each in read] == [NOTHING, hashlib.sha256(texts[0]).hexdigest()]
    assert [first, second] == [hashlib.sha256(text).hexdigest() for text in texts]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    whole = verify(tmp_path)
    assert (whole.first, whole.last, whole.head, whole.problems) == (1, 2, second, ())


def test_a_full_file_makes_room_and_the_chain_goes_on(tmp_path: Path) -> None:
    audit = Audit(tmp_path, max_bytes=600)
    for number in range(9):
        audit.append(line(f"verb{number}"))
    files = [tmp_path / "audit.jsonl.1", tmp_path / "audit.jsonl"]
    kept = [json.loads(text)["verb"] for file in files for text in file.read_text().splitlines()]
    assert kept == [f"verb{number}" for number in range(9)][-len(kept) :]
    assert 2 < len(kept) < 9
    assert all(file.stat().st_size < 1200 for file in files)
    whole = verify(tmp_path)
    assert (whole.first, whole.last, whole.problems) == (10 - len(kept), 9, ())
    files[0].unlink()
    assert "and audit.jsonl.1 with those before it is not there" in verify(tmp_path).problems[0]


def test_a_file_that_was_only_just_moved_is_followed(tmp_path: Path) -> None:
    audit = Audit(tmp_path)
    audit.append(line("a"))
    file_of(tmp_path).rename(tmp_path / "audit.jsonl.1")
    audit.append(line("b"))
    assert verify(tmp_path).problems == ()
    assert verify(tmp_path).last == 2


def changed(text: str) -> str:
    return text.replace('"verb":"verb3"', '"verb":"verbX"')


def without(text: str) -> str:
    return "".join(each for each in text.splitlines(True) if "verb3" not in each)


def swapped(text: str) -> str:
    lines = text.splitlines(True)
    lines[2], lines[3] = lines[3], lines[2]
    return "".join(lines)


def doubled(text: str) -> str:
    return "".join(each * (1 + ("verb3" in each)) for each in text.splitlines(True))


def beheaded(text: str) -> str:
    return "".join(text.splitlines(True)[1:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed, "audit.jsonl line 5: line 4 is not what it was when this one was written"),
        (without, "audit.jsonl line 4: is line 5, and follows line 3"),
        (swapped, "audit.jsonl line 3: is line 4, and follows line 2"),
        (doubled, "audit.jsonl line 5: is line 4, and follows line 4"),
        (beheaded, "audit.jsonl line 1: is line 2, and audit.jsonl.1 with those before it is not there"),
        (lambda text: text.replace(NOTHING, "1" * 64), "audit.jsonl line 1: is the first line, and names one before"
         " it"),
        (lambda text: text.replace('{"number":3,', "{"), "audit.jsonl line 3: is line 0, and follows line 2"),
        (lambda text: text + "garbage\n", "audit.jsonl line 7: is no line of the audit log"),
        (lambda text: "\n" + text, "audit.jsonl line 1: is no line of the audit log"),
        (lambda text: text.replace("verb3", "verb3" * 20_000), "audit.jsonl line 4: is no line of the audit log"),
    ],
)  # fmt: skip
def test_what_was_done_to_it_shows(tmp_path: Path, change: object, says: str) -> None:
    for number in range(6):
        Audit(tmp_path).append(line(f"verb{number}"))
    file = file_of(tmp_path)
    assert callable(change)
    file.write_text(change(file.read_text()))
    assert says in verify(tmp_path).problems


def test_lines_cut_off_at_the_end_show_by_a_hash_that_was_noted(tmp_path: Path) -> None:
    hashes = [Audit(tmp_path).append(line(f"verb{number}")) for number in range(3)]
    assert verify(tmp_path, hashes[1]).problems == ()
    file = file_of(tmp_path)
    file.write_text("".join(file.read_text().splitlines(True)[:2]))
    assert verify(tmp_path).problems == ()
    assert verify(tmp_path, hashes[1]).problems == ()
    (said,) = verify(tmp_path, hashes[2]).problems
    assert said.startswith(f"no line has the hash {hashes[2]}")
    Audit(tmp_path).append(line("another"))
    assert verify(tmp_path, hashes[2]).problems == (said,)


@pytest.mark.parametrize("tail", ["", '{"number":3,"bef', "garbage\n", "a\nb"])
def test_what_was_cut_off_by_a_full_disk_is_kept_and_followed(tmp_path: Path, tail: str) -> None:
    for verb in ("a", "b"):
        Audit(tmp_path).append(line(verb))
    file = file_of(tmp_path)
    file.write_text(file.read_text() + tail)
    Audit(tmp_path).append(line("c"))
    Audit(tmp_path).append(line("d"))
    problems = verify(tmp_path).problems
    assert all("is no line of the audit log" in problem for problem in problems)
    assert len(problems) == len(tail.splitlines())
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["verb"], last["number"]) == ("d", 4 + len(tail.splitlines()))


def test_an_empty_log_is_whole_and_a_hopeless_one_is_bounded(tmp_path: Path) -> None:
    empty = verify(tmp_path)
    assert (empty.first, empty.last, empty.head, empty.problems) == (0, 0, "", ())
    file_of(tmp_path).write_text("x\n" * 100)
    hopeless = verify(tmp_path).problems
    assert (len(hopeless), hopeless[-1]) == (MAX_SHOWN + 1, f"… and {100 - MAX_SHOWN} more")
    Audit(tmp_path).append(line())
    assert json.loads(file_of(tmp_path).read_text().splitlines()[-1])["number"] == 101


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        Audit(tmp_path / "absent").append(line())
    file_of(tmp_path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Audit(tmp_path).append(line())
    assert not (tmp_path / "elsewhere").exists()


def test_the_newest_lines_are_those_at_the_ends_of_the_files(tmp_path: Path) -> None:
    assert newest(tmp_path, 5) == []
    audit = Audit(tmp_path, max_bytes=600)
    for number in range(9):
        audit.append(line(f"verb{number}"))
    assert (tmp_path / "audit.jsonl.1").exists()
    for count in (1, 2, 3, 4):
        assert [one.verb for one in newest(tmp_path, count)] == [f"verb{number}" for number in range(9 - count, 9)]


def test_what_is_no_line_is_not_among_the_newest(tmp_path: Path) -> None:
    Audit(tmp_path).append(line("hold"))
    with file_of(tmp_path).open("ab") as file:
        file.write(b"\xff{\n[[[\n")
    Audit(tmp_path).append(line("release"))
    assert [one.verb for one in newest(tmp_path, 9)] == ["hold", "release"]
    assert [one.verb for one in newest(tmp_path, 1)] == ["release"]
