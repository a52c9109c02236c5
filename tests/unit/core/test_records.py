"""What the journal holds reads back as it was written, and in order."""

import math
from typing import get_args

import msgspec
import pytest
from recordings import recording
from weightsync.orchestrator.core.errors import JournalUnreadable, RecordUnwritable
from weightsync.orchestrator.core.memory import Memory, replay
from weightsync.orchestrator.core.records import (
    AnyRecord,
    Committed,
    EpochBegan,
    LiveDirty,
    Record,
    RoundBegan,
    RoundEnded,
    Taint,
    decode_record,
    decode_row,
    encode_record,
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
