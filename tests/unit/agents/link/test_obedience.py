"""What binds a process: the highest epoch, one life of it, and what it said last."""

from dataclasses import replace

import msgspec
import pytest
from weightsync.agents.link.connection import NotObeyed
from weightsync.agents.link.obedience import Obedience
from weightsync.orchestrator.protocol.messages import (
    Closed,
    EngineStatus,
    Exposed,
    Left,
    NixlSettings,
    Quiesced,
    TrainerStatus,
    Verified,
    Welcome,
)
from weightsync.orchestrator.protocol.names import RoundName

OURS = Welcome(
    epoch=3, journal_id="j", life="l", heartbeat_seconds=1.0, lost_after_heartbeats=3, transport=NixlSettings(),
    rendezvous=None, lease_seconds=20.0,
)  # fmt: skip
FIRST, SECOND = RoundName(1, 9), RoundName(2, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 2}, "its epoch 2 is over: this process obeyed epoch 3, life l, journal j; end that daemon"),
        ({"journal_id": "k"}, r"another daemon of epoch 3 \(life l, journal k\): .*two daemons run on copies"),
        ({"life": "m"}, r"another daemon of epoch 3 \(life m, journal j\)"),
        ({"life": ""}, r"another daemon of epoch 3 \(life \?, journal j\)"),
    ],
)
def test_another_life_is_not_obeyed(changes: dict[str, object], reason: str) -> None:
    obedience = Obedience(7)
    obedience.obey(OURS)
    before = replace(obedience)
    with pytest.raises(NotObeyed, match=reason):
        obedience.obey(msgspec.structs.replace(OURS, **changes))
    assert obedience == before


@pytest.mark.parametrize("changes", [{}, {"epoch": 4}, {"epoch": 4, "journal_id": "k", "life": "m"}])
def test_the_same_or_a_later_one_is(changes: dict[str, object]) -> None:
    obedience, welcome = Obedience(7), msgspec.structs.replace(OURS, lease_seconds=5.0, **changes)
    obedience.obey(OURS)
    assert obedience.lease_seconds == 20.0
    obedience.obey(welcome)
    known = (obedience.epoch, obedience.journal_id, obedience.life, obedience.lease_seconds)
    assert known == (welcome.epoch, welcome.journal_id, welcome.life, 5.0)


def test_words_of_the_last_round_are_kept_one_of_each_kind_as_they_were_said() -> None:
    obedience = Obedience(7)
    quiesced, exposed = Quiesced(round=FIRST), Exposed(round=FIRST)
    verified = Verified(round=FIRST, digest=(1, 2), bytes=3, apply_seconds=0.0, digest_seconds=0.0)
    for word in (quiesced, exposed, verified, exposed):
        obedience.keep(word)
    assert obedience.repeated(EngineStatus()) == (quiesced, verified, exposed)
    left = Left(round=FIRST, status=EngineStatus())
    obedience.keep(left)
    assert obedience.repeated(EngineStatus()) == (verified, left), "who has left is inside no longer"
    closed = Closed(round=SECOND)
    obedience.keep(closed)
    assert obedience.repeated(EngineStatus()) == (closed,)
    obedience.keep(left)
    assert obedience.repeated(EngineStatus()) == (closed,), "of a round that is over"


def test_left_is_repeated_with_what_the_memory_holds_now() -> None:
    """What has happened since was told over the connection that was lost, too."""
    obedience = Obedience(7)
    verified = Verified(round=FIRST, digest=(1, 2), bytes=3, apply_seconds=0.0, digest_seconds=0.0)
    obedience.keep(verified)
    obedience.keep(Left(round=FIRST, status=EngineStatus(), switch_seconds=0.5))
    held = EngineStatus(held=True)
    assert obedience.repeated(held) == (verified, Left(round=FIRST, status=held, switch_seconds=0.5))


def test_a_trainers_words_are_repeated_as_they_are() -> None:
    obedience = Obedience(7)
    obedience.keep(Closed(round=FIRST))
    assert obedience.repeated(TrainerStatus()) == (Closed(round=FIRST),)
