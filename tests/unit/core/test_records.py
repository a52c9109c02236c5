"""What the journal holds reads back as it was written, in order, and is not kept for ever."""

import copy
import math
from typing import Any, get_args

import msgspec
import pytest
from recordings import recording
from weightsync.orchestrator.core import records as records_module
from weightsync.orchestrator.core.errors import JournalUnreadable, RecordUnwritable
from weightsync.orchestrator.core.records import (
    REMEMBERED_ROUNDS,
    AnyRecord,
    Committed,
    Decided,
    EpochBegan,
    LiveDirty,
    Memory,
    MemorySaved,
    Record,
    RoundBegan,
    RoundEnded,
    StagedAgain,
    Taint,
    VersionFailed,
    decode_record,
    decode_row,
    encode_record,
    keep_newest,
    replay,
    saved,
)
from weightsync.orchestrator.protocol.limits import MAX_COUNT, MAX_REASON_CHARS
from weightsync.orchestrator.protocol.names import RoundName, Version

VERSION = Version(7, 1)


@pytest.mark.parametrize("seed", range(4))
def test_commits_only_grow(seed: int) -> None:
    _, records = recording(seed)
    order = [record.sequence for record in records if isinstance(record, Committed)]
    assert order == sorted(order)
    epochs = [record.epoch for record in records if isinstance(record, EpochBegan)]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("seed", range(2))
def test_records_survive_the_journal(seed: int) -> None:
    for record in recording(seed)[1]:
        assert decode_record(encode_record(record)) == record


ENDED = RoundEnded(
    round=RoundName(1, 7), version=VERSION, attempt=1, engines=("e0",), left_out=(), outcome="failed", reason="why",
    bytes=5, descriptors=1, times={"total": 1.5},
)  # fmt: skip


def test_a_row_of_history_is_written_whatever_agents_reported() -> None:
    row = msgspec.structs.replace(
        ENDED, bytes=2**70, descriptors=2**64, reason="prefix: " + "\ud800\n" * 5000,
        times={"wire": math.nan, "total": math.inf, "stall": -math.inf, "digest": 2.0},
    )  # fmt: skip
    assert decode_record(encode_record(row)) == row
    assert (row.bytes, row.descriptors) == (MAX_COUNT, MAX_COUNT)
    assert row.times == {"wire": 0.0, "total": 0.0, "stall": 0.0, "digest": 2.0}
    assert len(row.reason) == MAX_REASON_CHARS


def test_every_text_for_people_is_cleaned() -> None:
    """Of records that come to be as well: whoever adds a reason names it in ``spoken``."""
    for kind in get_args(AnyRecord):
        assert {"reason"} & set(kind.__struct_fields__) <= set(kind.spoken), kind


@pytest.mark.parametrize(
    "record",
    [
        EpochBegan(epoch=2**70),
        EpochBegan(epoch="nine"),  # type: ignore[arg-type]
        LiveDirty(round=RoundName(1, 1), writers={"trainer/0": math.nan}),  # type: ignore[dict-item]
        RoundBegan(round=RoundName(1, 1), version=VERSION, attempt=1, engines=("\ud800",)),
        RoundBegan(round=RoundName(-1, 1), version=VERSION, attempt=1, engines=()),
        RoundBegan(round=RoundName(1, 1), version=Version(7, 10**18), attempt=1, engines=()),
        Committed(round=RoundName(1, 1), version=VERSION, sequence=True),
    ],
)
def test_what_could_not_be_read_back_is_not_written(record: Record) -> None:
    with pytest.raises(RecordUnwritable, match=f"{type(record).__name__} is not written"):
        encode_record(record)


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b'{"type":"RoundEnded","round":[1,7],"version":[7,1],"times":{"total":null}}', "unreadable"),
        (b'{"type":"RoundEnded","round":[1,7],"written by":"a later release"}', "unreadable"),
        (encode_record(ENDED).replace(b"1.5", b"null"), "failed"),
    ],
)
def test_a_round_is_over_even_if_its_row_cannot_be_read(body: bytes, outcome: str) -> None:
    memory = Memory()
    replay(memory, RoundBegan(round=ENDED.round, version=VERSION, attempt=1, engines=()))
    row = decode_record(body)
    assert isinstance(row, RoundEnded)
    assert row.outcome == outcome
    assert row.reason.startswith("this row of the journal cannot be read: ")
    replay(memory, row)
    assert memory.open_rounds == {}
    assert decode_record(encode_record(row)) == row


def test_what_the_fold_asks_of_a_row_is_kept_or_the_row_refused() -> None:
    taint = Taint(5, "host", "boot", {"e0/0": 6})
    whole = msgspec.structs.replace(
        ENDED, engines=("e0", "e1"), left_out=("e1",), outcome="committed", unclosed={"trainer/0": taint}
    )
    memory = Memory()
    replay(memory, decode_record(encode_record(whole).replace(b"1.5", b"null")))
    assert memory.live == {"e0"}
    assert memory.unclosed == {("trainer/0", ENDED.round): taint}
    with pytest.raises(JournalUnreadable):
        decode_record(encode_record(whole).replace(b"1.5", b"null").replace(b'"host"', b"null"))


@pytest.mark.parametrize(
    "body",
    [
        b'{"type":"RoundEnded"}', b"", b"{", b"\xff", b"[" * 100_000, b'{"type":"OfTheFuture","round":[1,7]}',
        b'{"type":"Committed","round":[1,7]}', b'{"type":"EpochBegan","epoch":null}',
    ],
)  # fmt: skip
def test_anything_else_that_cannot_be_read_is_refused(body: bytes) -> None:
    with pytest.raises(JournalUnreadable, match=r"an entry of the journal cannot be read .*Fix: restore"):
        decode_record(body)
    row = decode_row(body)
    assert isinstance(row, RoundEnded)
    assert row.outcome == "unreadable", "where it is only shown"


def test_damage_is_refused_whatever_it_reads_as() -> None:
    body = encode_record(ENDED)
    with pytest.raises(JournalUnreadable, match="damaged: its checksum is wrong"):
        decode_record(body, intact=False)
    assert isinstance(decode_row(body, intact=False), RoundEnded)


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


# ------------------------------------------------------------------------------------------------- what is remembered
def committed(*versions: Version) -> Memory:
    memory = Memory()
    for sequence, version in enumerate(versions, start=1):
        replay(memory, Committed(round=RoundName(1, sequence), version=version, sequence=sequence))
    return memory


def test_the_newest_versions_are_known_by_name_and_how_far_the_others_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "REMEMBERED_VERSIONS", 3)
    memory = committed(*(Version(7, step) for step in (10, 20, 30, 40, 50)))
    assert list(memory.done) == [Version(7, 30), Version(7, 40), Version(7, 50)]
    assert [memory.forgot(Version(7, step)) for step in (5, 10, 15, 20, 25, 30, 60)] == [True] * 4 + [False] * 3
    assert not memory.forgot(Version(8, 10)), "another trainer's step of the same number"
    assert (memory.committed, memory.sequence) == (Version(7, 50), 5)


def test_a_step_far_ahead_of_its_followers_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "REMEMBERED_VERSIONS", 2)
    memory = committed(*(Version(7, step) for step in (1_000_000, 1, 2, 3)))
    assert memory.forgotten == {7: 1}
    assert not memory.forgot(Version(7, 4))


def test_the_oldest_make_room() -> None:
    kept: dict[str, int] = {}
    assert [keep_newest(kept, key, number, 3) for number, key in enumerate("abcd")] == [[], [], [], ["a"]]
    assert list(kept.items()) == [("b", 1), ("c", 2), ("d", 3)]


def test_what_comes_again_is_the_newest() -> None:
    kept = {"a": 0, "b": 1}
    assert keep_newest(kept, "a", 5, 2) == []
    assert list(kept.items()) == [("b", 1), ("a", 5)]
    assert keep_newest(kept, "c", 6, 1) == ["b", "a"]


def test_failures_are_remembered_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "REMEMBERED_FAILURES", 2)
    memory = Memory()
    for step in range(1, 5):
        replay(memory, StagedAgain(version=Version(7, step), restaged=1))
        replay(memory, VersionFailed(version=Version(7, step), reason=f"{step}"))
    assert memory.failed == {Version(7, 3): "3", Version(7, 4): "4"}
    assert list(memory.restaged) == [Version(7, 3), Version(7, 4)]
    assert [memory.forgot(Version(7, step)) for step in (2, 3, 5)] == [True, False, False]


def test_members_that_come_and_go_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "REMEMBERED_MEMBERS", 2)
    memory = Memory()
    for number, members in enumerate((("a/0", "b/0"), ("a/0", "c/0")), start=1):
        name = RoundName(1, number)
        replay(memory, RoundBegan(round=name, version=Version(7, number), attempt=1, engines=()))
        replay(memory, Decided(round=name, version=Version(7, number), digests=dict.fromkeys(members, "d")))
    assert memory.held == {"a/0": (Version(7, 2), "d"), "c/0": (Version(7, 2), "d")}


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_stands_for_all_that_was_before_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any place: whoever begins there knows what he knows who has read everything."""
    monkeypatch.setattr(records_module, "REMEMBERED_VERSIONS", 4)
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


def test_a_damaged_snapshot_is_not_guessed_at() -> None:
    with pytest.raises(JournalUnreadable, match="snapshot"):
        replay(Memory(), MemorySaved(memory=b"\xc1"))


def test_of_large_rounds_fewer_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "REMEMBERED_MEMBERS", 10)
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
