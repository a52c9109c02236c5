"""The fold of the journal is what its records say, reads back as it was, and remembers no more than it must."""

import copy
from typing import Any

import pytest
from recordings import recording
from weightsync.orchestrator.core import memory as memory_module
from weightsync.orchestrator.core.errors import JournalUnreadable
from weightsync.orchestrator.core.memory import REMEMBERED_ROUNDS, Memory, keep_newest, replay, saved
from weightsync.orchestrator.core.records import (
    Committed,
    Decided,
    EpochBegan,
    MemorySaved,
    RoundBegan,
    RoundEnded,
    StagedAgain,
    VersionFailed,
    decode_record,
    encode_record,
)
from weightsync.orchestrator.protocol.names import RoundName, Version

VERSION = Version(7, 1)


# ------------------------------------------------------------------------------------------------- what is remembered
def committed(*versions: Version) -> Memory:
    memory = Memory()
    for sequence, version in enumerate(versions, start=1):
        replay(memory, Committed(round=RoundName(1, sequence), version=version, sequence=sequence))
    return memory


def test_the_newest_versions_are_known_by_name_and_how_far_the_others_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "REMEMBERED_VERSIONS", 3)
    memory = committed(*(Version(7, step) for step in (10, 20, 30, 40, 50)))
    assert list(memory.done) == [Version(7, 30), Version(7, 40), Version(7, 50)]
    assert [memory.forgot(Version(7, step)) for step in (5, 10, 15, 20, 25, 30, 60)] == [True] * 4 + [False] * 3
    assert not memory.forgot(Version(8, 10)), "another trainer's step of the same number"
    assert (memory.committed, memory.sequence) == (Version(7, 50), 5)


def test_a_step_far_ahead_of_its_followers_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "REMEMBERED_VERSIONS", 2)
    memory = committed(*(Version(7, step) for step in (1_000_000, 1, 2, 3)))
    assert memory.forgotten == {7: 1}
    assert not memory.forgot(Version(7, 4))


def test_failures_are_remembered_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "REMEMBERED_FAILURES", 2)
    memory = Memory()
    for step in range(1, 5):
        replay(memory, StagedAgain(version=Version(7, step), restaged=1))
        replay(memory, VersionFailed(version=Version(7, step), reason=f"{step}"))
    assert memory.failed == {Version(7, 3): "3", Version(7, 4): "4"}
    assert list(memory.restaged) == [Version(7, 3), Version(7, 4)]
    assert [memory.forgot(Version(7, step)) for step in (2, 3, 5)] == [True, False, False]


def test_members_that_come_and_go_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "REMEMBERED_MEMBERS", 2)
    memory = Memory()
    for number, members in enumerate((("a/0", "b/0"), ("a/0", "c/0")), start=1):
        name = RoundName(1, number)
        replay(memory, RoundBegan(round=name, version=Version(7, number), attempt=1, engines=()))
        replay(memory, Decided(round=name, version=Version(7, number), digests=dict.fromkeys(members, "d")))
    assert memory.held == {"a/0": ((Version(7, 2), "d"), (Version(7, 1), "d")), "c/0": ((Version(7, 2), "d"),)}


def test_a_damaged_snapshot_is_not_guessed_at() -> None:
    with pytest.raises(JournalUnreadable, match="snapshot"):
        replay(Memory(), MemorySaved(memory=b"\xc1"))


def test_of_large_rounds_fewer_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "REMEMBERED_MEMBERS", 10)
    memory = Memory()
    for number in range(1, 9):
        name, members = RoundName(1, number), [f"a/{rank}" for rank in range(4)]
        replay(memory, RoundBegan(round=name, version=VERSION, attempt=1, engines=("a",)))
        replay(memory, Decided(round=name, version=VERSION, digests=dict.fromkeys(members, "d")))
        replay(memory, RoundEnded(
            round=name, version=VERSION, attempt=1, engines=("a",), left_out=(), outcome="committed", reason="",
            bytes=0, descriptors=0, times={},
        ))  # fmt: skip
    assert [name.number for name in memory.ended] == [7, 8]
    assert set(memory.ended[name].digests) == set(members)


def test_nobody_remembers_for_ever(drive: Any) -> None:
    memory = Memory()
    for number in range(1, 3 * REMEMBERED_ROUNDS):
        name = RoundName(1, number)
        replay(memory, RoundBegan(round=name, version=VERSION, attempt=1, engines=()))
        replay(memory, RoundEnded(
            round=name, version=VERSION, attempt=1, engines=(), left_out=(), outcome="failed", reason="", bytes=0,
            descriptors=0, times={},
        ))  # fmt: skip
    assert len(memory.ended) == REMEMBERED_ROUNDS
    assert RoundName(1, number) in memory.ended


def test_the_oldest_make_room() -> None:
    kept: dict[str, int] = {}
    assert [keep_newest(kept, key, number, 3) for number, key in enumerate("abcd")] == [[], [], [], ["a"]]
    assert list(kept.items()) == [("b", 1), ("c", 2), ("d", 3)]


def test_what_comes_again_is_the_newest() -> None:
    kept = {"a": 0, "b": 1}
    assert keep_newest(kept, "a", 5, 2) == []
    assert list(kept.items()) == [("b", 1), ("a", 5)]
    assert keep_newest(kept, "c", 6, 1) == ["b", "a"]


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_stands_for_all_that_was_before_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any place: whoever begins there knows what he knows who has read everything."""
    monkeypatch.setattr(memory_module, "REMEMBERED_VERSIONS", 4)
    _, records = recording(seed)
    whole = Memory()
    for place, record in enumerate(records):
        replay(whole, record)
        if place % 7 and place + 1 < len(records):
            continue
        began = Memory()
        replay(began, EpochBegan(epoch=999))
        replay(began, decode_record(encode_record(saved(whole))))
        assert began == whole
        rest = copy.deepcopy(whole)
        for later in records[place + 1 :]:
            replay(began, later)
            replay(rest, later)
        assert began == rest
