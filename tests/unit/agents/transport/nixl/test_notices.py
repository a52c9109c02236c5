"""What peers tell each other of chunks survives the way, and anything else is no notice."""

import pytest
from weightsync.agents.transport.nixl.notices import MAX_NOTICE_BYTES, Notice, decode, encode
from weightsync.orchestrator.protocol.names import RoundName


@pytest.mark.parametrize("what", ["landed", "scattered"])
def test_a_notice_arrives_as_it_was(what):
    notice = Notice(what, RoundName(3, 1 << 40), 1 << 40)
    assert decode(encode(notice)) == notice
    assert len(encode(notice)) < MAX_NOTICE_BYTES


@pytest.mark.parametrize(
    "message",
    [b"", b"hello", b"\xc1", encode(Notice("landed", RoundName(1, 1), 0))[:-1], b"\x93\xa6landed\x92\x01\x01\xff",
     b"\x93\xa5loose\x92\x01\x01\x00", b"x" * (MAX_NOTICE_BYTES + 1)],
)  # fmt: skip
def test_what_is_none_is_none(message):
    assert decode(message) is None
