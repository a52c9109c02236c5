"""What the journal holds reads back as it was written, in order, and is not kept for ever."""

from typing import Any

import pytest
from recordings import recording
from weightsync.orchestrator.core.records import (
    REMEMBERED_ROUNDS,
    Committed,
    EpochBegan,
    Memory,
    RoundBegan,
    RoundEnded,
    decode_record,
    encode_record,
    replay,
)
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
