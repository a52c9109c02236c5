"""No report at any time ends the daemon; whoever is to blame is left out, and the others go on."""

from collections.abc import Callable
from typing import Any

import pytest
from fleets import ANNOUNCE, BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core.commands import Drop
from weightsync.orchestrator.core.errors import ImpossibleTransition, Trouble
from weightsync.orchestrator.core.events import AbortAsked, Appended, Call, CallFailed
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.core.round.reports import handle
from weightsync.orchestrator.core.round.transitions import Phase, Report
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Closed,
    EngineStatus,
    Expose,
    Exposed,
    Grant,
    Left,
    Quiesced,
    TrainerStatus,
    Verify,
)
from weightsync.orchestrator.protocol.names import Member, Version

TRAINER, ENGINE = trainer(), rank("e0")
IN_ORDER = list(Phase)


def test_a_pair_without_an_entry_tells_its_story(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.PAUSING)
    with pytest.raises(ImpossibleTransition, match=r"round 1\.1 .* resumed in phase pausing \(why\).*e0"):
        handle(Turn(fleet.fleet, 0.0, 1), going, Report.RESUMED, Trouble("why"))


@pytest.mark.parametrize("phase", IN_ORDER)
@pytest.mark.parametrize("word", ["quiesced", "exposed", "closed", "verified", "left"])
def test_no_word_at_any_time_ends_the_daemon(drive: Any, phase: Phase, word: str) -> None:
    """Said twice, because a repetition is out of turn everywhere."""
    fleet = drive()
    going = fleet.to(phase)
    words = {
        "quiesced": (ENGINE, Quiesced(round=going.name)),
        "exposed": (ENGINE, Exposed(round=going.name)),
        "closed": (TRAINER, fleet.closed()),
        "verified": (ENGINE, fleet.verified()),
        "left": (ENGINE, Left(round=going.name, status=EngineStatus())),
    }
    for _ in range(2):
        fleet.says(*words[word])
    fleet.passes(1.0)


@pytest.mark.parametrize(
    ("phase", "word"),
    [
        (Phase.PAUSING, "quiesced"),
        (Phase.QUIESCING, "exposed"),
        (Phase.QUIESCING, "closed"),
        (Phase.MARKING, "verified"),
        (Phase.EXPOSING, "closed"),
    ],
)
def test_a_word_out_of_turn_costs_its_agent_the_connection(drive: Any, phase: Phase, word: str) -> None:
    """And is not believed later."""
    fleet = drive()
    going = fleet.to(phase)
    words: dict[str, Any] = {
        "quiesced": (ENGINE, Quiesced(round=going.name)),
        "exposed": (ENGINE, Exposed(round=going.name)),
        "closed": (TRAINER, fleet.closed()),
        "verified": (ENGINE, fleet.verified()),
    }
    member = words[word][0]
    fresh = fleet.says(*words[word])
    assert [(c.member, c.connection) for c in fresh if isinstance(c, Drop)] == [(member, fleet.connections[member])]
    assert (going.phase, going.quiesced & {ENGINE} if phase is Phase.PAUSING else set()) == (phase, set())
    assert (going.closed, going.final, going.verified) == ({}, set(), {})
    assert member not in fleet.fleet.agents
    fleet.connect(member, incarnation=77)
    assert fleet.fleet.agents[member].hello.incarnation == 77, "who died meanwhile keeps nobody out"


def test_a_worker_that_leaves_by_itself_costs_its_engine(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.QUIESCING)
    fleet.says(ENGINE, Left(round=going.name, status=EngineStatus()))
    assert (going.phase, going.remaining()) == (Phase.QUIESCING, ["e1"])
    assert [abort.torn for abort in fleet.sent(ENGINE, Abort)] == [False]


def test_a_digest_that_comes_before_it_is_asked_for_is_not_believed(drive: Any) -> None:
    """It may be of bytes that were written to afterwards."""
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    fleet.says(ENGINE, fleet.verified())
    assert going.verified == {}
    assert "VERIFIED before it was asked" in fleet.told()


def test_the_first_report_is_the_one_that_counts(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, fleet.verified())
    fleet.says(ENGINE, fleet.verified(digest=(0, 0)))
    assert going.phase is Phase.VERIFYING
    assert going.verified[ENGINE].digest != (0, 0)


def test_closed_without_a_grant_of_this_round_changes_nothing(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    other = type(going.name)(going.name.epoch, going.name.number + 9)
    fleet.says(TRAINER, Closed(round=other))
    assert going.phase is Phase.WRITING
    assert going.closed == {}


def test_the_record_of_a_round_that_is_over_completes_no_other(drive: Any) -> None:
    """LiveDirty was on its way to the disk when the round was given up; the next must not take it for its own."""
    fleet = drive()
    going = fleet.to(Phase.MARKING)
    fleet.happens(AbortAsked(fleet.id(), "an operator", ""))
    assert fleet.fleet.round is None
    assert fleet.fleet.awaited is None
    fleet.happens(Appended(fleet.id(), "LiveDirty", going.name))
    assert fleet.sent(TRAINER, Grant) == []


# ---------------------------------------------------------------------------------------------------------- left out
BAD = [
    (Phase.PAUSING, lambda fleet: fleet.fails("e0", Call.PAUSE), "e0: pause failed: 500"),
    (Phase.QUIESCING, lambda fleet: fleet.fails("e0", Call.SWITCH), "e0: switch failed: 500"),
    (Phase.QUIESCING, lambda fleet: fleet.answers("e0", Call.SWITCH), "e0 ended its update call before the round did"),
    (
        Phase.VERIFYING,
        lambda fleet: fleet.says(ENGINE, fleet.verified(error="bad HBM")),
        "e0/0 could not verify: bad HBM",
    ),
]


@pytest.mark.parametrize(("phase", "fault", "why"), BAD)
def test_before_the_decision_too_the_others_go_on_without_who_is_to_blame(
    drive: Any, phase: Phase, fault: Callable[[Any], object], why: str
) -> None:
    fleet = drive(("e0", "e1", "e2"))
    going = fleet.to(phase)
    fault(fleet)
    assert (fleet.fleet.round, going.remaining(), going.engines["e0"].left_out) == (going, ["e1", "e2"], why)
    torn = phase is Phase.VERIFYING
    for member in fleet.ranks_of("e0"):
        assert fleet.sent(member, Abort) == [Abort(round=going.name, torn=torn, reason=why)]
    assert fleet.fleet.engines["e0"].failures == 1
    finish(fleet, going, "e1", "e2")
    assert fleet.fleet.memory.committed == going.version
    assert fleet.fleet.memory.live == {"e1", "e2"}


def finish(fleet: Any, going: Any, *engines: str) -> None:
    """What is left of the round goes well."""
    for name in engines:
        if Call.PAUSE in fleet.fleet.engines[name].calls:
            fleet.answers(name, Call.PAUSE, True)
    members = fleet.ranks_of(*engines)
    if going.phase is Phase.QUIESCING:
        for member in members:
            fleet.says(member, Quiesced(round=going.name))
    if going.phase is Phase.MARKING:
        fleet.durable()
    if going.phase is Phase.EXPOSING:
        for member in members:
            fleet.says(member, Exposed(round=going.name))
    if going.phase is Phase.WRITING:
        fleet.says(TRAINER, fleet.closed())
    for member in members:
        fleet.says(member, fleet.verified())
    fleet.durable()
    for name in engines:
        for member in fleet.ranks_of(name):
            fleet.says(member, Left(round=going.name, status=EngineStatus(applied=going.version)))
        fleet.answers(name, Call.SWITCH)
        fleet.answers(name, Call.FINISH)
        fleet.answers(name, Call.RESUME, False)
    fleet.durable()
    assert fleet.fleet.round is None


def test_nobody_is_granted_before_every_worker_knows_that_it_is_exposed(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.MARKING)
    for member in fleet.ranks_of():
        assert fleet.sent(member, Expose) == [Expose(round=going.name)], "while the disk works"
    first, *others = fleet.ranks_of()
    fleet.says(first, Exposed(round=going.name))
    fleet.durable()
    for member in others:
        assert (going.phase, fleet.sent(TRAINER, Grant)) == (Phase.EXPOSING, [])
        fleet.says(member, Exposed(round=going.name))
    assert (going.phase, len(fleet.sent(TRAINER, Grant))) == (Phase.WRITING, 1)


def test_a_worker_that_does_not_say_so_costs_its_engine_its_place_and_no_memory(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.EXPOSING)
    for member in fleet.ranks_of("e1"):
        fleet.says(member, Exposed(round=going.name))
    fleet.passes(fleet.fleet.policy.finish + 1.0)
    assert (going.phase, going.remaining()) == (Phase.WRITING, ["e1"])
    (abort,) = fleet.sent(ENGINE, Abort)
    assert (abort.torn, "exposing took longer" in abort.reason) == (False, True)
    (grant,) = fleet.sent(TRAINER, Grant)
    assert {member.engine for member in grant.members} == {"e1"}
    assert fleet.fleet.engines["e0"].torn_by is None


@pytest.mark.parametrize("phase", [Phase.MARKING, Phase.EXPOSING])
def test_who_comes_back_before_the_grant_is_told_again_that_it_is_exposed(drive: Any, phase: Phase) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(phase)
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, engine=EngineStatus(window=going.name))
    assert fleet.sent(ENGINE, Expose) == [Expose(round=going.name)] * 2


def test_who_leaves_while_others_verify_is_waited_for_no_more(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, Left(round=going.name, status=EngineStatus(torn=True)))
    assert going.remaining() == ["e1"]
    for member in fleet.ranks_of("e1"):
        fleet.says(member, fleet.verified())
    assert going.phase is Phase.DECIDING


def test_who_is_left_out_while_writers_write_is_written_to_no_more(drive: Any) -> None:
    fleet = drive(("e0", "e1", "e2"))
    going = fleet.to(Phase.WRITING)
    fleet.says(ENGINE, Left(round=going.name, status=EngineStatus(torn=True)))
    (abort,) = fleet.sent(TRAINER, Abort)
    assert (abort.torn, set(abort.members)) == (True, set(fleet.ranks_of("e0")))
    peers = tuple(PeerTransfer(m, BYTES_PER_EDGE, 1, 0.1, (11, 13)) for m in fleet.ranks_of("e1", "e2"))
    fleet.says(TRAINER, Closed(round=going.name, peers=peers, final=False))
    assert going.phase is Phase.VERIFYING, "it need not have closed towards e0"
    finish(fleet, going, "e1", "e2")
    assert set(fleet.fleet.unclosed) == {(TRAINER, going.name)}
    assert set(fleet.fleet.unclosed[TRAINER, going.name].targets) == set(fleet.ranks_of("e0"))
    assert fleet.fleet.tainted("e0") == [(TRAINER, going.name)]
    assert fleet.fleet.tainted("e1") == []


def test_a_decision_needs_enough_engines(drive: Any) -> None:
    fleet = drive(("e0", "e1", "e2"), options={"min_engines": 2})
    going = fleet.to(Phase.QUIESCING)
    fleet.fails("e0", Call.SWITCH)
    assert fleet.fleet.round is going
    fleet.fails("e1", Call.SWITCH)
    assert fleet.fleet.round is None
    assert going.reason == "e1: switch failed: 500; 1 engines are left and a commit needs 2"
    for member in fleet.ranks_of("e2"):
        assert [abort.torn for abort in fleet.sent(member, Abort)] == [False]


@pytest.mark.parametrize("phase", [Phase.PAUSING, Phase.QUIESCING, Phase.VERIFYING])
def test_engines_that_are_done_wait_no_longer_than_their_patience(drive: Any, phase: Phase) -> None:
    fleet = drive(("e0", "e1"), options={"patience": 5.0})
    going = fleet.to(phase)
    for member in fleet.ranks_of("e1"):
        if phase is Phase.QUIESCING:
            fleet.says(member, Quiesced(round=going.name))
        if phase is Phase.VERIFYING:
            fleet.says(member, fleet.verified())
    if phase is Phase.PAUSING:
        fleet.answers("e1", Call.PAUSE, True)
    fleet.passes(0.25)
    fleet.passes(5.0)
    assert going.remaining() == ["e1"]
    assert going.phase is not phase


def test_when_nobody_is_done_it_is_nobodys_patience(drive: Any) -> None:
    fleet = drive(("e0", "e1"), options={"patience": 5.0, "transfer": 60.0})
    going = fleet.to(Phase.WRITING)
    fleet.passes(59.0)
    assert going.remaining() == ["e0", "e1"]
    fleet.passes(1.0)
    assert fleet.fleet.round is None
    assert (going.trouble.fault, going.reason) == ("trainer", "writing took longer than 60 s; missing: trainer/0")
    assert [state.failures for state in fleet.fleet.engines.values()] == [0, 0]


def test_an_engine_takes_its_pair_with_it(drive: Any) -> None:
    fleet = drive(("e0", "e1", "e2"), (("e0", "e1"),), options={"min_engines": 1})
    going = fleet.to(Phase.VERIFYING)
    fleet.says(rank("e0", 1), fleet.verified(error="gone"))
    assert going.remaining() == ["e2"]
    assert going.engines["e1"].left_out == "e0/1 could not verify: gone"
    assert "e1 is left out of step 1 (generation 7): e0/1 could not verify: gone; it stays paused" in fleet.told()
    assert [state.failures for state in fleet.fleet.engines.values()] == [1, 0, 0], "it is e0's fault alone"


# ---------------------------------------------------------------------------------------------------- reconnects
@pytest.mark.parametrize("phase", IN_ORDER)
@pytest.mark.parametrize("member", [TRAINER, ENGINE])
@pytest.mark.parametrize("noticed", [True, False])
def test_a_reconnect_costs_nothing_but_its_messages(drive: Any, phase: Phase, member: Member, noticed: bool) -> None:
    """Whether the end of the old connection is noticed before the new one's Hello or never."""
    fleet = drive(("e0", "e1"))
    going = fleet.to(phase)
    inside = phase not in (Phase.PAUSING, Phase.QUIESCING, Phase.RECORDING)
    status = EngineStatus(window=going.name if inside else None)
    if phase is Phase.RECORDING:
        status = EngineStatus(applied=going.version)
    staged = fleet.fleet.agents[TRAINER].staged
    if noticed:
        fleet.loses(member)
        fleet.passes(1.0)
    fleet.connect(member, TrainerStatus(staged=going.version) if member == TRAINER else status)
    fleet.says(member, ANNOUNCE)
    assert staged is not None
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.committed == going.version
    assert fleet.fleet.memory.live == {"e0", "e1"}


@pytest.mark.parametrize(
    ("phase", "member", "kind"), [(Phase.WRITING, TRAINER, Grant), (Phase.VERIFYING, ENGINE, Verify)]
)
def test_what_a_lost_connection_may_have_lost_is_said_again(
    drive: Any, phase: Phase, member: Member, kind: type[Any]
) -> None:
    fleet = drive()
    going = fleet.to(phase)
    fleet.connect(member, EngineStatus(window=going.name) if member == ENGINE else TrainerStatus(staged=going.version))
    first, again = fleet.sent(member, kind)
    assert first == again
    fleet.connect(
        member, EngineStatus(window=going.name) if member == ENGINE else TrainerStatus(open_rounds=(going.name,))
    )
    assert len(fleet.sent(member, kind)) == (3 if member == ENGINE else 2), "a writer that has its grant needs no other"


@pytest.mark.parametrize(("member", "left"), [(TRAINER, []), (ENGINE, ["e1"])])
def test_who_does_not_come_back_in_time_is_gone(drive: Any, member: Member, left: list[str]) -> None:
    fleet = drive(("e0", "e1"), options={"heartbeat": 5.0})
    going = fleet.to(Phase.WRITING)
    fleet.loses(member)
    fleet.passes(4.9)
    assert going.remaining() == ["e0", "e1"]
    fleet.passes(0.1)
    assert (going.remaining() if fleet.fleet.round is going else []) == left


def test_another_process_is_not_the_member(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    connection = fleet.connections[ENGINE]
    fleet.connect(ENGINE, EngineStatus(), incarnation=555)
    assert going.remaining() == ["e0", "e1"], "a duplicate is refused"
    fleet.connections[ENGINE] = connection
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, EngineStatus(), incarnation=555)
    assert going.remaining() == ["e1"]
    assert going.engines["e0"].left_out == "e0/0 was started anew"


@pytest.mark.parametrize(("member", "left"), [(TRAINER, None), (ENGINE, ["e1"])])
def test_nor_is_one_whose_layout_has_changed(drive: Any, member: Member, left: list[str] | None) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.MARKING)
    fleet.says(member, Announce(layout=Layout((), (), b"other")))
    assert (going.remaining() if fleet.fleet.round is going else None) == left
    if left is not None:
        fleet.durable()
        for other in fleet.ranks_of("e1"):
            fleet.says(other, Exposed(round=going.name))
        assert {m.engine for grant in fleet.sent(TRAINER, Grant) for m in grant.members} == {"e1"}


# ------------------------------------------------------------------------------------------------- after the decision
def serve(fleet: Any, going: Any, name: str) -> None:
    for member in fleet.ranks_of(name):
        fleet.says(member, Left(round=going.name, status=EngineStatus(applied=going.version)))
    fleet.answers(name, Call.SWITCH)
    fleet.answers(name, Call.FINISH)


def test_each_engine_serves_as_soon_as_it_can(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.SWITCHING)
    serve(fleet, going, "e1")
    assert [fleet.called(name, Call.RESUME) for name in ("e0", "e1")] == [0, 1]


@pytest.mark.parametrize(("options", "pairs"), [({"together": True}, ()), ({}, (("e0", "e1"),))])
def test_or_with_those_that_it_must_serve_with(drive: Any, options: dict[str, Any], pairs: Any) -> None:
    fleet = drive(("e0", "e1"), pairs, options=options)
    going = fleet.to(Phase.SWITCHING)
    serve(fleet, going, "e1")
    assert [fleet.called(name, Call.RESUME) for name in ("e0", "e1")] == [0, 0]
    serve(fleet, going, "e0")
    assert [fleet.called(name, Call.RESUME) for name in ("e0", "e1")] == [1, 1]


def test_but_not_for_longer_than_their_patience(drive: Any) -> None:
    fleet = drive(("e0", "e1"), options={"together": True, "patience": 5.0, "finish": 60.0})
    going = fleet.to(Phase.SWITCHING)
    serve(fleet, going, "e1")
    fleet.passes(0.25)
    fleet.passes(5.0)
    assert going.remaining() == ["e1"]
    assert fleet.called("e1", Call.RESUME) == 1


@pytest.mark.parametrize("call", [Call.FINISH, Call.RESUME])
def test_a_call_that_fails_then_costs_its_engine_only_its_place(drive: Any, call: Call) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.SWITCHING)
    for name in ("e0", "e1"):
        for member in fleet.ranks_of(name):
            fleet.says(member, Left(round=going.name, status=EngineStatus(applied=going.version)))
        fleet.answers(name, Call.SWITCH)
    fleet.answers("e0", Call.FINISH)
    if call is Call.RESUME:
        fleet.answers("e1", Call.FINISH)
    fleet.fails("e1", call, "503")
    assert going.engines["e1"].left_out == f"e1: {call} failed: 503"
    fleet.answers("e0", Call.RESUME, False)
    fleet.durable()
    assert (fleet.fleet.memory.committed, fleet.fleet.memory.live) == (going.version, {"e0"})


def test_the_answer_of_the_update_call_may_be_lost(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.SWITCHING)
    for member in fleet.ranks_of():
        fleet.says(member, Left(round=going.name, status=EngineStatus(applied=going.version)))
    fleet.fails("e0", Call.SWITCH, "timed out")
    assert going.remaining() == ["e0"]
    assert fleet.called("e0", Call.FINISH) == 1


def test_what_is_decided_is_committed_though_no_engine_is_left(drive: Any) -> None:
    """A daemon that died now would commit it at its next start."""
    fleet = drive(("e0", "e1"), options={"finish": 10.0})
    going = fleet.to(Phase.SWITCHING)
    fleet.passes(30.0)
    assert going.phase is Phase.RECORDING
    fleet.durable()
    (ended,) = [record for record in fleet.written() if isinstance(record, RoundEnded)]
    assert (ended.outcome, ended.left_out, fleet.fleet.memory.committed) == ("committed", ("e0", "e1"), going.version)
    assert fleet.failures() == []
    for name in ("e0", "e1"):  # they come out of it later, and are let serve
        for member in fleet.ranks_of(name):
            fleet.says(member, Left(round=going.name, status=EngineStatus(applied=going.version)))
        fleet.answers(name, Call.SWITCH)
        fleet.passes(fleet.policy.probe_interval)
        assert fleet.called(name, Call.RESUME) == 1


def test_a_worker_that_leaves_with_another_version_is_no_reason_to_end(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.SWITCHING)
    fleet.says(ENGINE, Left(round=going.name, status=EngineStatus(applied=Version(7, 99))))
    assert going.engines["e0"].left_out == (
        "e0/0 left the round holding step 99 (generation 7), not step 1 (generation 7)"
    )
    serve(fleet, going, "e1")
    fleet.answers("e1", Call.RESUME, False)
    fleet.durable()
    assert fleet.called("e0", Call.RESUME) == 0


# -------------------------------------------------------------------------------------------------------- a catch-up
def test_a_catch_up_ends_when_a_new_version_has_waited_long_enough(drive: Any) -> None:
    fleet = drive(("e0", "e1"), options={"patience": 5.0})
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.loses_engine("e1")
    fleet.settle()
    fleet.bring("e1", EngineStatus(), incarnation=555)
    fleet.plan()
    fleet.settle()
    going = fleet.round
    assert going.catch_up
    fleet.stage(2)
    fleet.passes(4.9)
    assert fleet.fleet.round is going
    fleet.passes(0.2)
    assert going.reason == "a new version has waited 5 s for it"
    fleet.answers("e1", Call.PAUSE, True)
    fleet.settle()
    assert (fleet.round.version, list(fleet.round.engines)) == (Version(7, 2), ["e0", "e1"])


def test_probes_are_no_affair_of_the_round(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    for call in (Call.PROBE, Call.ATTACH):
        fleet.fleet.engines["e0"].calls[call] = 99
        fleet.happens(CallFailed(fleet.id(), "e0", call, 99, "500"))
    assert going.phase is Phase.WRITING
    assert going.engines["e0"].http_seconds == pytest.approx(0.01), "of its pause alone"
