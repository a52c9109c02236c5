"""Messages on the pipe between the daemon and the child that joins vLLM's group."""

import msgspec
import pytest
from weightsync.orchestrator.protocol.group import (
    LENGTH_BYTES,
    MAX_PIPE_BYTES,
    Deliver,
    Done,
    Gather,
    PipePiece,
    answers,
    checked_length,
    commands,
    packed,
)


def test_a_message_comes_behind_its_length() -> None:
    data = packed(PipePiece(2, b"abc"))
    assert data[:LENGTH_BYTES] == (len(data) - 4).to_bytes(4, "big")
    assert msgspec.msgpack.decode(data[LENGTH_BYTES:]) == {"type": "PipePiece", "rank": 2, "data": b"abc"}
    assert answers.decode(data[LENGTH_BYTES:]) == PipePiece(2, b"abc")


def test_commands_and_answers_are_apart() -> None:
    assert commands.decode(packed(Gather(5.0))[LENGTH_BYTES:]) == Gather(5.0)
    with pytest.raises(msgspec.ValidationError):
        commands.decode(packed(Done())[LENGTH_BYTES:])
    with pytest.raises(msgspec.ValidationError):
        answers.decode(packed(Deliver(1, b""))[LENGTH_BYTES:])


def test_a_length_above_the_limit() -> None:
    assert MAX_PIPE_BYTES == 64 * 1024 * 1024 + 1024
    assert checked_length(MAX_PIPE_BYTES) == MAX_PIPE_BYTES
    with pytest.raises(ValueError, match=f"{MAX_PIPE_BYTES + 1} bytes exceeds the limit"):
        checked_length(MAX_PIPE_BYTES + 1)
