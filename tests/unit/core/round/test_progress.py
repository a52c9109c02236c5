"""What a round knows of its engines and writers."""

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.names import RoundName, Version

WRITER = trainer()


def going() -> Round:
    ranks = {rank(name, number): 100 + number for name in ("e0", "e1") for number in range(2)}
    engines = {"e0": Progress(), "e1": Progress()}
    return Round(RoundName(1, 1), Version(7, 1), 1, False, engines, ranks, {WRITER: tuple(ranks)})


@pytest.mark.parametrize(("lands", "shadow"), [("live", False), ("copy", True), ("flip", True)])
def test_what_lands_beside_live_memory_is_a_shadow(lands: Lands, shadow: bool) -> None:
    assert Progress(lands).shadow is shadow


def test_who_was_left_out_is_not_in_it() -> None:
    current = going()
    current.engines["e0"].left_out = "it died"
    assert current.remaining() == ["e1"]
    assert (current.has("e0"), current.has("e1"), current.has("stranger")) == (False, True, False)
    assert list(current.remaining_ranks()) == [rank("e1", 0), rank("e1", 1)]


def test_a_writer_is_done_with_those_who_are_left() -> None:
    current = going()
    sent = {rank("e1", number): PeerTransfer(rank("e1", number), 1, 1, 0.1, (0, 0)) for number in range(2)}
    current.closed[WRITER] = sent
    assert not current.is_done(WRITER)
    current.engines["e0"].left_out = "it died"
    assert current.is_done(WRITER)


def test_it_is_decided_once_it_is_known_on_whom() -> None:
    current = going()
    assert not current.decided
    current.live = ("e0",)
    assert current.decided
