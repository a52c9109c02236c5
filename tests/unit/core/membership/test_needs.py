"""A trainer without a table is told, once, what the attached engines need; who contradicts is left out."""

from typing import Any

from weightsync.orchestrator.core.commands import MakeNeeds
from weightsync.orchestrator.core.events import Call, NeedsReady
from weightsync.orchestrator.protocol.layout import Layout, Tensor
from weightsync.orchestrator.protocol.messages import Announce, Needs, TrainerStatus
from weightsync.orchestrator.protocol.names import Member

TRAINER = Member("trainer", "", 0)
ASKING = TrainerStatus(follows_needs=True)
ANNOUNCE = Announce(layout=Layout((), (), b""))
WHY = "tensor 'w' has dtype bfloat16 at e0/0 but float32 at e1/0"


def needs(fingerprint: str = "first") -> Needs:
    return Needs(tensors=(Tensor("w", "bfloat16", (2,)),), quantized=(), fingerprint=fingerprint)


def asked(fleet: Any) -> list[MakeNeeds]:
    return [command for command in fleet.commands if isinstance(command, MakeNeeds)]


def attach(fleet: Any, *engines: str) -> None:
    for name in engines:
        fleet.passes(0.0)
        fleet.answers(name, Call.PROBE, True)
        fleet.bring(name)


def answer(fleet: Any, found: Needs, **misfits: str) -> None:
    fleet.happens(NeedsReady(fleet.id(), asked(fleet)[-1].number, found, misfits))


def test_needs_are_told_once_and_again_after_a_reconnect(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER, ASKING)
    assert "waiting for engines that say what they need: e0" in fleet.told()
    attach(fleet, "e0")
    (wanted,) = asked(fleet)
    assert [party.member for party in wanted.targets] == fleet.ranks_of("e0")
    assert fleet.sent(TRAINER, Needs) == []
    answer(fleet, needs())
    fleet.passes(1.0)
    assert fleet.sent(TRAINER, Needs) == [needs()]
    assert "trainer ranks to make their slots, which they do at their next publish (0 of 1 announced)" in fleet.told()
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, ASKING)
    assert fleet.sent(TRAINER, Needs) == [needs(), needs()]
    assert len(asked(fleet)) == 1
    fleet.says(TRAINER, ANNOUNCE)
    fleet.plan()
    assert fleet.fleet.is_confirmed(TRAINER)


def test_a_trainer_with_a_table_is_told_nothing(drive: Any) -> None:
    fleet = drive.joined()
    assert asked(fleet) == []


def test_other_ranks_are_told_by_the_first(drive: Any) -> None:
    fleet = drive()
    for number in (0, 1):
        fleet.connect(Member("trainer", "", number), ASKING, world=2)
    attach(fleet, "e0")
    answer(fleet, needs())
    assert fleet.sent(Member("trainer", "", 1), Needs) == []


def test_half_of_the_needs_are_not_told_while_engines_are_expected(drive: Any) -> None:
    fleet = drive(("e0", "e1"), options={"join": 100.0})
    fleet.connect(TRAINER, ASKING)
    attach(fleet, "e1")
    assert asked(fleet) == []
    fleet.passes(100.0)
    assert [party.member.engine for party in asked(fleet)[-1].targets] == ["e1", "e1"]
    answer(fleet, needs())
    attach(fleet, "e0")
    assert [party.member.engine for party in asked(fleet)[-1].targets] == ["e0", "e0", "e1", "e1"]
    answer(fleet, needs("both"))
    assert [told.fingerprint for told in fleet.sent(TRAINER, Needs)] == ["first", "both"]


def test_an_outdated_union_is_ignored(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER, ASKING)
    attach(fleet, "e0")
    fleet.happens(NeedsReady(fleet.id(), 99, needs(), {}))
    assert fleet.sent(TRAINER, Needs) == []


def test_an_engine_that_contradicts_is_left_out_until_it_does_not(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.connect(TRAINER, ASKING)
    attach(fleet, "e0", "e1")
    answer(fleet, needs(), e1=WHY)
    assert fleet.fleet.engines["e1"].complaint == (WHY, "config")
    assert f"e1 does not fit the other engines: {WHY}" in fleet.told()
    fleet.says(TRAINER, ANNOUNCE)
    fleet.plan()
    assert fleet.fleet.engines["e1"].misfit == WHY, "a layout of the trainer's changes nothing of that"
    fleet.loses_engine("e1")
    fleet.passes(0.0)
    fleet.settle()
    fleet.bring("e1")
    answer(fleet, needs())
    assert fleet.fleet.engines["e1"].misfit == ""
