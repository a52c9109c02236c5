"""An endpoint's card: what was sealed comes back, and nothing that is torn or another's is believed."""

import hashlib

import msgspec
import pytest
from weightsync.agents.transport.nixl.card import SCHEMA, Card, replaces, seal, unseal
from weightsync.agents.transport.nixl.errors import MetadataError
from weightsync.orchestrator.protocol.layout import Region

CARD = Card(SCHEMA, "a/0-77", Region(4096, 4096), b"what NIXL says")


def test_a_sealed_card_comes_back() -> None:
    sealed = seal(CARD)
    assert sealed[:32] == hashlib.sha256(sealed[32:]).digest()
    assert unseal(sealed, "a/0-77") == CARD


@pytest.mark.parametrize(
    ("sealed", "words"),
    [
        (seal(CARD)[:-1], "torn"),
        (bytes([seal(CARD)[0] ^ 1]) + seal(CARD)[1:], "torn"),
        (b"", "torn"),
        (seal(msgspec.structs.replace(CARD, schema=SCHEMA + 1)), f"card of schema {SCHEMA + 1}"),
        (seal(msgspec.structs.replace(CARD, name="b/0-1")), "that of b/0-1"),
        (hashlib.sha256(b"\xc1").digest() + b"\xc1", "no endpoint card"),
    ],
    ids=["cut", "one bit", "empty", "another schema", "another's", "no card"],
)
def test_another_card_is_refused(sealed: bytes, words: str) -> None:
    with pytest.raises(MetadataError, match=words) as caught:
        unseal(sealed, "a/0-77")
    assert not caught.value.retry, "only another card helps"


@pytest.mark.parametrize(
    ("process", "there", "here", "over_networks", "replaced"),
    [
        ("another", "b", "b", False, True),
        ("same", "b", "b", False, False),
        ("same", "b", "b", True, True),
        ("same", "a", "b", False, True),
        ("same", "", "b", False, False),
        ("same", "a", "", False, False),
    ],
)
def test_what_may_still_arrive_by_shared_memory_is_not_over(
    process: str, there: str, here: str, over_networks: bool, replaced: bool
) -> None:
    old = msgspec.structs.replace(CARD, process="same", boot=there)
    new = msgspec.structs.replace(CARD, name="a/0-78", process=process, boot=there)
    assert replaces(new, old, boot=here, over_networks=over_networks) is replaced
