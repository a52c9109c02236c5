"""Who is taken in, who is refused and why, and what a Hello says about memory."""

from dataclasses import replace
from typing import Any

import pytest
from fleets import ANNOUNCE, rank, trainer
from weightsync.orchestrator.core.commands import Accept, Drop, Refuse, Send
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import AgentLost, Call, PolicyChanged
from weightsync.orchestrator.core.records import (
    AnyRecord,
    Decided,
    EpochBegan,
    GrantOver,
    LiveDirty,
    RoundBegan,
    Taint,
    TrainerBegan,
)
from weightsync.orchestrator.core.round import blame
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.limits import MAX_COUNT, MAX_FOREIGN_EPOCH
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Commit,
    EngineStatus,
    HubRendezvous,
    Left,
    Quiesced,
    Staged,
    TrainerStatus,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

TRAINER, ENGINE = trainer(), rank("e0")
VERSION = Version(7, 1)
NAME = RoundName(1, 1)
BEGAN = RoundBegan(round=NAME, version=VERSION, attempt=1, engines=("e0",))
DIRTY = LiveDirty(round=NAME, writers={"trainer/0": Taint(100, "h1", "b1", {"e0/0": 100})})
DECIDED = Decided(round=NAME, version=VERSION, digests={"e0/0": "ab"})
STAGED = Staged(version=VERSION, bytes=1, convert_seconds=0.0, digest_seconds=0.0)


@pytest.mark.parametrize(
    ("member", "wrong", "reason"),
    [
        (TRAINER, {"schema": 99}, "it speaks schema 99"),
        (TRAINER, {"run_id": "other"}, "it belongs to run 'other'"),
        (Member("trainer", "", 5), {}, "rank 5 is outside its world of 1"),
    ],
)
def test_a_hello_of_somebody_else_is_refused_for_good(
    drive: Any, member: Member, wrong: dict[str, Any], reason: str
) -> None:
    fleet = drive()
    fleet.connect(member, **wrong)
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert reason in refusal.refused.reason
    assert not refusal.refused.retry
    assert fleet.fleet.agents == {}


def test_the_trainer_may_come_back_with_another_number_of_ranks(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER)
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, incarnation=5, generation=8, world=2)
    assert fleet.fleet.trainer_world() == 2
    fleet.loses(TRAINER)
    fleet.happens(PolicyChanged(fleet.id(), replace(fleet.fleet.policy, trainer_world=4)))
    fleet.connect(TRAINER, incarnation=6, generation=9, world=2)
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert refusal.refused.reason == "it says that there are 2 ranks, the configuration 4"


def test_an_engine_that_is_not_a_member_may_be_one_later(drive: Any) -> None:
    fleet = drive()
    fleet.connect(Member("inference", "e9", 0))
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert refusal.refused.reason == "engine 'e9' is neither configured nor admitted; engines are: e0"
    assert refusal.refused.retry


def test_a_second_process_of_the_same_rank_is_refused_by_name(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER, host="first", pid=11)
    fleet.connect(TRAINER, incarnation=5, host="second", pid=12)
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert refusal.refused.reason == "duplicate rank: trainer/0 is already connected from first pid 11"
    assert refusal.refused.retry, "the first one may be dead, and its connection not known to be"
    assert fleet.fleet.agents[TRAINER].hello.pid == 11


def test_a_second_start_of_the_trainer_waits_for_the_end_of_the_first(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER)
    first = fleet.connections[TRAINER]
    fleet.connect(TRAINER, incarnation=5, generation=8)
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert "of another trainer start is still connected" in refusal.refused.reason
    fleet.connections[TRAINER] = first
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, incarnation=5, generation=8)
    assert fleet.fleet.generation == 8
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, incarnation=100, generation=7)
    assert fleet.fleet.agents == {}, "the first start is over for good"


def test_an_agent_that_obeyed_a_later_daemon_raises_the_epoch(drive: Any) -> None:
    """The journal was lost: the agents know better."""
    fleet = drive()
    fleet.connect(TRAINER, epoch_seen=41, journal_id="of the lost journal")
    assert fleet.fleet.epoch == 42
    assert EpochBegan(epoch=42) in fleet.written()


def test_an_epoch_that_no_daemon_reaches_is_believed_of_nobody(drive: Any) -> None:
    """Going above it would leave no epoch for the next start."""
    fleet = drive()
    fleet.connect(TRAINER, epoch_seen=MAX_FOREIGN_EPOCH + 1, journal_id="made up")
    (refusal,) = refusals(fleet)
    assert f"it obeyed epoch {MAX_FOREIGN_EPOCH + 1}, and no daemon has started so often" in refusal[0]
    assert fleet.fleet.epoch == 1
    fleet.connect(TRAINER, epoch_seen=MAX_FOREIGN_EPOCH, journal_id="hardly true")
    assert fleet.fleet.epoch == MAX_FOREIGN_EPOCH + 1 < MAX_COUNT


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([BEGAN], Abort(round=NAME, torn=False, reason="the round ended while this worker was away")),
        ([BEGAN, DIRTY], Abort(round=NAME, torn=True, reason="the round ended while this worker was away")),
        ([BEGAN, DIRTY, DECIDED], Commit(round=NAME, version=VERSION)),
        ([], Abort(round=NAME, torn=True, reason="the round ended while this worker was away")),
    ],
    ids=["begun", "dirty", "decided", "unknown"],
)
@pytest.mark.parametrize("lives", [1, 2, 3])
def test_a_worker_inside_is_let_out_as_the_round_ended(
    drive: Any, records: list[AnyRecord], told: Abort | Commit, lives: int
) -> None:
    """Also by a daemon that starts after the one that ended the round."""
    for _ in range(lives):
        fleet = drive(records=records)
        records = [*records, *fleet.written()]
    fleet.connect(ENGINE, EngineStatus(window=NAME))
    assert fleet.sent(ENGINE, type(told)) == [told]
    to_agent = [type(command) for command in fleet.commands if isinstance(command, Accept | Send)]
    assert to_agent == [Accept, Send], "nothing reaches an agent before it is accepted"


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([BEGAN, DIRTY, DECIDED], Commit),
        ([BEGAN], Abort),
        ([BEGAN, DIRTY], None),
        ([], None),
    ],
    ids=["decided", "nobody was granted", "torn indeed", "nobody remembers it"],
)
def test_a_worker_that_left_as_torn_while_nobody_was_there_is_told_that_it_is_whole(
    drive: Any, records: list[AnyRecord], word: type[Any] | None
) -> None:
    """It repeats its last word to whoever comes, and knows itself whether its memory is that of the round."""
    fleet = drive(records=records)
    fleet.connect(ENGINE, EngineStatus(torn=True))
    assert fleet.sent(ENGINE, Commit) == fleet.sent(ENGINE, Abort) == []
    fleet.says(ENGINE, Left(round=NAME, status=EngineStatus(torn=True)))
    told = fleet.sent(ENGINE, Commit) + fleet.sent(ENGINE, Abort)
    assert [(type(said), said.round, getattr(said, "torn", False)) for said in told] == [
        (kind, NAME, False) for kind in filter(None, [word])
    ]


@pytest.mark.parametrize(
    ("phase", "word"),
    [
        (Phase.QUIESCING, Abort(round=NAME, torn=False, reason="e0/0 was lost: reset")),
        (Phase.WRITING, Abort(round=NAME, torn=True, reason="e0/0 was lost: reset")),
        (Phase.SWITCHING, Commit(round=NAME, version=VERSION)),
    ],
)
def test_so_is_one_that_comes_back_into_the_round_under_way(drive: Any, phase: Phase, word: Abort | Commit) -> None:
    """The word that was sent while it was away is sent again."""
    fleet = drive(("e0", "e1"))
    fleet.to(phase)
    fleet.loses(ENGINE)
    fleet.passes(fleet.policy.heartbeat)
    fleet.connect(ENGINE, EngineStatus(window=NAME))
    assert fleet.sent(ENGINE, type(word))[-1] == word


def test_a_worker_that_was_left_out_is_not_let_out_with_the_version(drive: Any) -> None:
    """Not in the round, nor after it, nor by the next daemon: its bytes are not among those that were decided."""
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, fleet.verified(digest=(0, 0)))
    for member in fleet.ranks_of("e1"):
        fleet.says(member, fleet.verified())
    fleet.durable()
    assert fleet.round.phase is Phase.SWITCHING

    def returns(to: Any) -> Abort:
        to.connect(ENGINE, EngineStatus(window=NAME))
        assert to.sent(ENGINE, Commit) == []
        word: Abort = to.sent(ENGINE, Abort)[-1]
        return word

    assert returns(fleet).torn
    again = drive(("e0", "e1"), records=fleet.written())
    assert returns(again).torn
    again.connect(rank("e1", 0), EngineStatus(window=NAME))
    assert again.sent(rank("e1", 0), Commit) == [Commit(round=NAME, version=VERSION)]


def test_a_worker_that_enters_a_round_that_is_over_is_let_out_at_once(drive: Any) -> None:
    """The update call reached it late."""
    fleet = drive()
    going = fleet.to(Phase.QUIESCING)
    fleet.fails("e0", Call.UPDATE, "timed out")
    assert fleet.fleet.round is None
    before = len(fleet.sent(ENGINE, Abort))
    fleet.says(ENGINE, Quiesced(round=going.name))
    assert [word.torn for word in fleet.sent(ENGINE, Abort)[before:]] == [False]


def test_nor_is_one_forgotten_that_was_away_while_the_decision_was_written(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.DECIDING)
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, EngineStatus(window=NAME))
    assert fleet.sent(ENGINE, Commit) == [], "it is not durable yet"
    fleet.durable()
    assert fleet.sent(ENGINE, Commit) == [Commit(round=NAME, version=VERSION, trace=going.trace)]


@pytest.mark.parametrize(
    ("hello", "closed"),
    [
        ({"incarnation": 100, "status": TrainerStatus(open_rounds=(NAME,))}, False),
        ({"incarnation": 100, "status": TrainerStatus()}, True),
        ({"incarnation": 101, "generation": 8, "host": "h1", "boot": "b1"}, True),
        ({"incarnation": 101, "generation": 8, "host": "h2", "boot": "b1"}, False),
        ({"incarnation": 101, "generation": 8, "host": "h1", "boot": "b2"}, False),
        ({"incarnation": 101, "generation": 8}, False),
    ],
    ids=["still writing", "closed meanwhile", "the process before it is dead", "elsewhere", "another boot", "unknown"],
)
def test_writers_of_a_dirty_round_count_as_unclosed_until_they_say_otherwise(
    drive: Any, hello: dict[str, Any], closed: bool
) -> None:
    fleet = drive(records=[BEGAN, DIRTY])
    assert set(fleet.fleet.unclosed) == {(TRAINER, NAME)}
    fleet.connect(TRAINER, **hello)
    assert (fleet.fleet.unclosed == {}) is closed
    over = [record for record in fleet.written() if isinstance(record, GrantOver)]
    assert [(record.round, record.writer) for record in over] == ([(NAME, "trainer/0")] if closed else [])
    next_life = drive(records=[BEGAN, DIRTY, *fleet.written()])
    assert (next_life.fleet.unclosed == {}) is closed, "nor is it forgotten by the daemon after this one"


def test_a_writer_that_was_replaced_comes_again_until_it_has_closed_its_grants(drive: Any) -> None:
    """Nothing proves it dead, and its own word is as good as that of one that is taken in."""
    fleet = drive(records=[BEGAN, DIRTY])
    for generation, incarnation in ((7, 100), (8, 101)):
        fleet.connect(
            TRAINER, incarnation=incarnation, generation=generation, status=TrainerStatus(open_rounds=(NAME,))
        )
        fleet.loses(TRAINER)
    replaced = "its trainer generation 7 was replaced by a newer start"
    for still, again in (((NAME,), True), ((), False)):
        fleet.connect(TRAINER, incarnation=100, generation=7, status=TrainerStatus(open_rounds=still))
        assert refusals(fleet)[-1] == (replaced, "trainer", again)
        assert any(pending.incarnation == 100 for pending in fleet.fleet.unclosed.values()) is again
    assert [(record.round, record.writer) for record in fleet.written() if isinstance(record, GrantOver)] == [
        (NAME, "trainer/0")
    ]


@pytest.mark.parametrize("hello", [{"schema": 99}, {"run_id": "another"}, {"incarnation": 101}])
def test_the_word_of_somebody_else_closes_nothing(drive: Any, hello: dict[str, Any]) -> None:
    fleet = drive(records=[BEGAN, DIRTY])
    fleet.connect(TRAINER, **{"incarnation": 100, "status": TrainerStatus(), **hello})
    assert set(fleet.fleet.unclosed) == {(TRAINER, NAME)}


def test_a_grant_that_nobody_knows_may_reach_everybody_here(drive: Any) -> None:
    fleet = drive()
    fleet.bring("e0")
    fleet.connect(TRAINER, TrainerStatus(open_rounds=(RoundName(9, 9),)))
    assert fleet.fleet.unclosed[TRAINER, RoundName(9, 9)].targets == {rank("e0", 0): 100, rank("e0", 1): 101}
    fleet.says(TRAINER, Closed(round=RoundName(9, 9)))
    assert fleet.fleet.unclosed == {}


def test_one_restarted_target_clears_nothing_of_the_others(drive: Any) -> None:
    taint = Taint(100, "h1", "b1", {"e0/0": 100, "e0/1": 101})
    fleet = drive(records=[BEGAN, LiveDirty(round=NAME, writers={"trainer/0": taint})])
    fleet.connect(ENGINE, incarnation=555)
    assert fleet.fleet.unclosed[TRAINER, NAME].targets == {rank("e0", 1): 101}
    assert fleet.fleet.tainted("e0") == [(TRAINER, NAME)]


def test_a_restarted_target_is_out_of_reach_of_a_writer_that_never_returns(drive: Any) -> None:
    fleet = drive(records=[BEGAN, DIRTY])
    fleet.connect(ENGINE, incarnation=100)
    assert set(fleet.fleet.unclosed) == {(TRAINER, NAME)}
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, incarnation=101)
    assert fleet.fleet.unclosed == {}


def test_the_next_trainer_ends_the_versions_of_the_one_before(drive: Any) -> None:
    fleet = drive.joined()
    fleet.says(TRAINER, STAGED)
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, generation=8, incarnation=5)
    assert fleet.failures() == ["its trainer ended before the version was committed"]


def test_but_not_the_version_of_the_round_under_way(drive: Any) -> None:
    """All its bytes are there and verified: the round goes on and commits it."""
    fleet = drive()
    going = fleet.to(Phase.VERIFYING)
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, generation=8, incarnation=5)
    assert fleet.failures() == []
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.committed == going.version


def refusals(fleet: Any) -> list[tuple[str, str, bool]]:
    """Reason, fault, and whether to try again."""
    refused = [command.refused for command in fleet.commands if isinstance(command, Refuse)]
    return [(message.reason, message.fault, message.retry) for message in refused]


def test_all_ranks_must_agree_on_how_many_there_are(drive: Any) -> None:
    fleet = drive()
    fleet.connect(rank("e0", 0), world=2)
    fleet.connect(rank("e0", 1), world=4)
    assert refusals(fleet) == [("it says that there are 4 ranks, others say [2]", "config", True)]


def test_and_with_the_configuration(drive: Any) -> None:
    fleet = drive(options={"trainer_world": 3})
    fleet.connect(TRAINER, world=2)
    assert refusals(fleet) == [("it says that there are 2 ranks, the configuration 3", "config", False)]


def test_a_trainer_of_another_size_waits_for_the_end_of_the_first(drive: Any) -> None:
    """Refused for good it would have to be started once more, only because the first one's end was noticed late."""
    fleet = drive()
    fleet.connect(TRAINER, world=2)
    fleet.connect(TRAINER, incarnation=5, generation=8, world=1)
    (refused,) = refusals(fleet)
    assert refused == ("trainer/0 of another trainer start is still connected", "trainer", True)


def test_a_trainer_that_was_replaced_stays_so_when_the_daemon_is_restarted(drive: Any) -> None:
    """Else it would be taken for a new one, and the new one be refused for good as replaced."""
    fleet = drive()
    for generation in (7, 8):
        fleet.connect(TRAINER, incarnation=generation, generation=generation)
        fleet.loses(TRAINER)
    again = drive(records=fleet.written())
    again.connect(TRAINER, incarnation=7, generation=7)
    assert refusals(again) == [("its trainer generation 7 was replaced by a newer start", "trainer", False)]
    again.connect(TRAINER, incarnation=8, generation=8)
    assert again.fleet.agents[TRAINER].hello.generation == 8
    assert [record for record in again.written() if isinstance(record, TrainerBegan)] == []


@pytest.mark.parametrize(
    "hello",
    [
        {"epoch_seen": 9, "journal_id": "another"},
        {"epoch_seen": 9, "journal_id": "journal"},
        {"epoch_seen": 1, "journal_id": "another"},
        {"epoch_seen": 1, "journal_id": "journal", "life_seen": "of a copied state directory"},
    ],
)
def test_who_obeyed_another_daemon_waits_for_the_end_of_the_round(drive: Any, hello: dict[str, Any]) -> None:
    """Its epoch would outlaw the grants of this one."""
    fleet = drive()
    fleet.to(Phase.WRITING)
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, EngineStatus(), **hello)
    reason = "it obeyed another daemon; this one takes it in after the current round"
    assert refusals(fleet) == [(reason, "daemon", True)]
    assert fleet.fleet.epoch == 1


def test_the_same_process_may_connect_again_before_its_loss_is_known(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER)
    first = fleet.connections[TRAINER]
    fleet.connect(TRAINER)
    (dropped,) = [command for command in fleet.commands if isinstance(command, Drop)]
    assert (dropped.member, dropped.connection) == (TRAINER, first)
    assert fleet.fleet.agents[TRAINER].connection == fleet.connections[TRAINER] != first


def test_the_loss_of_an_older_connection_is_none(drive: Any) -> None:
    fleet = drive()
    fleet.connect(ENGINE)
    first = fleet.connections[ENGINE]
    fleet.connect(ENGINE)
    fleet.happens(AgentLost(fleet.id(), ENGINE, first, "reset"))
    assert ENGINE in fleet.fleet.agents


def test_an_engine_whose_agent_is_gone_is_looked_at_at_once(drive: Any) -> None:
    fleet = drive.joined()
    before = fleet.called("e0", Call.PROBE)
    fleet.loses(ENGINE)
    assert fleet.called("e0", Call.PROBE) == before + 1


@pytest.mark.parametrize(("incarnation", "fits"), [(100, False), (555, True)])
def test_a_misfit_is_one_until_another_process_announces(drive: Any, incarnation: int, fits: bool) -> None:
    fleet = drive.joined()
    fleet.fleet.engines["e0"].misfit = "two shapes"
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, incarnation=incarnation)
    fleet.says(ENGINE, ANNOUNCE)
    assert (fleet.fleet.engines["e0"].misfit == "") is fits


def test_another_process_is_not_blamed_for_the_one_before(drive: Any) -> None:
    fleet = drive.joined()
    blame.put(Turn(fleet.fleet, fleet.now, 0), "e0", Trouble("bad HBM", "engine"))
    fleet.loses(ENGINE)
    fleet.connect(ENGINE)
    assert fleet.fleet.engines["e0"].failures == 1
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, incarnation=555)
    assert fleet.fleet.engines["e0"].complaint == ("", "")


def test_what_an_accepted_agent_is_told(drive: Any) -> None:
    fleet = drive(options={"heartbeat": 2.5})
    fleet.connect(TRAINER)
    (accepted,) = [command for command in fleet.commands if isinstance(command, Accept)]
    welcome = accepted.welcome
    assert (welcome.epoch, welcome.journal_id, welcome.heartbeat_seconds) == (1, "journal", 2.5)
    assert welcome.rendezvous == HubRendezvous()
