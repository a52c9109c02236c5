"""The window of one worker: who may enter, what lets it go, and what its memory counts as afterwards."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.window import REMEMBERED_ROUNDS, Update, UpdateFailed, Windows
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Commit,
    EngineStatus,
    Expose,
    Exposed,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import RoundName, Version

ROUND, OTHER = RoundName(1, 1), RoundName(1, 2)
OLD, NEW = Version(7, 1), Version(7, 2)
UPDATE = Update(ROUND, NEW, 60.0)

TOLD = Update(ROUND, NEW, 60.0, exposes=True)

EXPOSE = Expose(round=ROUND)
VERIFY = Verify(round=ROUND, version=NEW, deadline_seconds=1.0)
COMMIT = Commit(round=ROUND, version=NEW)
TORN = Abort(round=ROUND, torn=True, reason="a writer was lost")
CLEAN = Abort(round=ROUND, torn=False, reason="an engine could not pause")


@dataclass
class Worker:
    """A worker whose daemon answers by script: ``answers`` maps what the worker says to what it hears then."""

    windows: Windows = field(default_factory=lambda: Windows(Holdings()))
    said: list[Any] = field(default_factory=list)
    answers: dict[type, list[Any]] = field(default_factory=dict)

    def tell(self, word: Any) -> None:
        self.said.append(word)
        for answer in self.answers.get(type(word), []):
            self.windows.heard(answer)

    def verify(self, order: Verify) -> Verified:
        return Verified(round=order.round, digest=(1, 2), bytes=3, apply_seconds=0.0, digest_seconds=0.0)

    def hold(self, update: Update = UPDATE, synchronise: Callable[[], None] = lambda: None) -> None:
        self.windows.serve_round(update, synchronise, self.verify, self.tell)


def serving() -> Worker:
    """A worker that holds a committed version."""
    worker = Worker(answers={RoundName: [Commit(round=OTHER, version=OLD)]})
    worker.hold(Update(OTHER, OLD, 60.0))
    worker.said.clear()
    return worker


def after(worker: Worker, *answers: Any) -> Worker:
    """The worker, answered so once it stands still."""
    worker.answers = {RoundName: list(answers)}
    return worker


def test_nothing_may_run_before_the_first_commit() -> None:
    assert not Holdings().may_run


def test_a_committed_round_is_served() -> None:
    worker = after(serving(), VERIFY, COMMIT)
    worker.hold()
    assert worker.said[0] == ROUND
    assert isinstance(worker.said[1], Verified)
    assert worker.said[2] == EngineStatus(applied=NEW) == worker.windows.holdings.status
    assert worker.windows.holdings.may_run


def test_nothing_runs_inside() -> None:
    worker, seen = after(serving(), VERIFY, COMMIT), []

    def verify(order: Verify) -> Verified:
        seen.append(worker.windows.holdings.may_run)
        return Worker.verify(worker, order)

    worker.verify = verify  # type: ignore[method-assign]
    worker.hold()
    assert seen == [False]


@pytest.mark.parametrize(
    ("word", "torn", "reason"), [(TORN, True, "a writer was lost"), (CLEAN, False, "an engine could not pause")]
)
def test_an_abort_leaves_the_memory_as_the_daemon_says(word: Abort, torn: bool, reason: str) -> None:
    worker = after(serving(), word)
    with pytest.raises(UpdateFailed, match=reason):
        worker.hold()
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=torn)
    assert worker.said[-1] == worker.windows.holdings.status
    assert worker.windows.holdings.may_run is not torn


def test_torn_memory_is_not_mended_by_a_round_that_wrote_nothing() -> None:
    worker = after(serving(), TORN)
    with pytest.raises(UpdateFailed):
        worker.hold()
    again = Abort(round=RoundName(1, 9), torn=False, reason="given up")
    with pytest.raises(UpdateFailed):
        after(worker, again).hold(Update(RoundName(1, 9), NEW, 60.0))
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True)


def test_torn_memory_is_repaired_by_a_committed_round() -> None:
    worker = after(serving(), TORN)
    with pytest.raises(UpdateFailed):
        worker.hold()
    after(worker, Commit(round=RoundName(1, 9), version=NEW)).hold(Update(RoundName(1, 9), NEW, 60.0))
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)


def test_the_deadline_tears_because_a_grant_may_have_been_given() -> None:
    worker = serving()
    now = iter([0.0, 61.0])
    worker.windows._clock = lambda: next(now)
    with pytest.raises(UpdateFailed, match="nothing was decided within 60 s"):
        worker.hold()
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True)


def test_a_worker_that_never_said_quiesced_is_not_torn() -> None:
    """No grant is given before; so whatever fails until then leaves the memory as it was."""
    worker = serving()

    def fail() -> None:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        worker.hold(synchronise=fail)
    assert worker.windows.holdings.status == EngineStatus(applied=OLD)
    assert worker.said == [EngineStatus(applied=OLD)]


def test_a_worker_that_fails_later_is() -> None:
    worker = after(serving(), VERIFY)

    def fail(order: Verify) -> Verified:
        raise MemoryError

    worker.verify = fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        worker.hold()
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True)


def test_an_abort_before_the_entry_makes_the_call_fail_at_once() -> None:
    worker = serving()
    worker.windows.heard(CLEAN)
    with pytest.raises(UpdateFailed, match="an engine could not pause"):
        worker.hold()
    assert worker.said == []
    assert worker.windows.holdings.may_run


@pytest.mark.parametrize("word", [VERIFY, COMMIT])
def test_other_words_before_the_entry_are_forgotten(word: Any) -> None:
    worker = serving()
    worker.windows.heard(word)
    with pytest.raises(UpdateFailed):
        after(worker, CLEAN).hold()


def test_words_about_another_round_or_version_let_nobody_out() -> None:
    stray = [
        Commit(round=OTHER, version=NEW),
        Commit(round=ROUND, version=OLD),
        Abort(round=OTHER, torn=True, reason=""),
    ]
    worker = after(serving(), *stray, COMMIT)
    worker.hold()
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)
    worker = after(serving(), *stray, TORN)
    with pytest.raises(UpdateFailed, match=TORN.reason):
        worker.hold()
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True)


def test_words_left_over_from_a_round_are_not_those_of_the_next() -> None:
    worker = after(serving(), COMMIT, TORN)
    worker.hold()
    after(worker, Commit(round=RoundName(1, 9), version=NEW)).hold(Update(RoundName(1, 9), NEW, 60.0))
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)


def test_a_repeated_call_gets_the_answer_of_the_first() -> None:
    worker = after(serving(), COMMIT)
    worker.hold()
    said = len(worker.said)
    worker.hold()
    assert len(worker.said) == said
    failing = after(serving(), TORN)
    for _ in range(2):
        with pytest.raises(UpdateFailed, match="a writer was lost"):
            failing.hold()
    assert len(failing.said) == 2


def test_a_late_abort_does_not_undo_a_commit() -> None:
    worker = after(serving(), COMMIT)
    worker.hold()
    worker.windows.heard(TORN)
    worker.hold()
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)


def test_ends_are_remembered_within_bounds() -> None:
    windows = Windows(Holdings())
    for number in range(3 * REMEMBERED_ROUNDS):
        windows.heard(Abort(round=RoundName(1, number), torn=False, reason="never began"))
    assert len(windows._ended) == REMEMBERED_ROUNDS


def test_the_daemons_word_comes_from_another_thread() -> None:
    worker = serving()
    inside = threading.Event()
    worker.tell = lambda word: inside.set() if isinstance(word, RoundName) else None  # type: ignore[method-assign]
    call = threading.Thread(target=worker.hold)
    call.start()
    assert inside.wait(10)
    assert worker.windows.holdings.status.window == ROUND
    worker.windows.heard(COMMIT)
    call.join(10)
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)


# ---------------------------------------------------------------------------------------- told before anybody may write
def abandoned(worker: Worker, *answers: Any) -> Worker:
    """The worker, whose daemon says ``answers`` and is then gone for longer than its lease."""
    worker = after(worker, *answers)
    gone = iter([False] * len(answers))
    worker.windows._abandoned = lambda: next(gone, True)
    return worker


def test_a_worker_whose_daemon_is_gone_before_any_grant_leaves_with_what_it_had() -> None:
    worker = abandoned(serving())
    with pytest.raises(UpdateFailed, match="the daemon is gone for longer than its lease, and nobody was granted"):
        worker.hold(TOLD)
    assert worker.windows.holdings.status == EngineStatus(applied=OLD)
    assert worker.windows.holdings.may_run
    assert worker.said == [ROUND, EngineStatus(applied=OLD)]


def test_once_exposed_it_waits_for_the_end_and_is_torn() -> None:
    worker = abandoned(serving(), EXPOSE)
    with pytest.raises(UpdateFailed, match=r"nothing was decided within 0\.01 s"):
        worker.hold(Update(ROUND, NEW, 0.01, exposes=True))
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True)
    assert worker.said == [ROUND, Exposed(round=ROUND), EngineStatus(applied=OLD, torn=True)]


def test_where_no_word_can_come_any_more_nothing_is_waited_for() -> None:
    worker = serving()
    worker.windows._deaf = lambda: "it was closed"
    with pytest.raises(UpdateFailed, match=r"round 1\.1: it was closed"):
        worker.hold(TOLD)
    assert worker.windows.holdings.status == EngineStatus(applied=OLD)
    with pytest.raises(UpdateFailed):
        worker.hold(Update(RoundName(1, 3), NEW, 60.0))
    assert worker.windows.holdings.status.torn, "somebody may have been granted"


def test_a_word_that_came_before_is_heard() -> None:
    worker = after(serving(), EXPOSE, COMMIT)
    worker.windows._deaf = lambda: "it was closed"
    worker.hold(TOLD)
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)


def test_a_round_that_does_not_tell_exposes_with_quiesced() -> None:
    worker = abandoned(serving())
    with pytest.raises(UpdateFailed, match="nothing was decided"):
        worker.hold(Update(ROUND, NEW, 0.01))
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True)


def test_the_deadline_does_not_tear_a_worker_that_was_never_exposed() -> None:
    worker = serving()
    with pytest.raises(UpdateFailed, match="nothing was decided"):
        worker.hold(Update(ROUND, NEW, 0.01, exposes=True))
    assert worker.windows.holdings.status == EngineStatus(applied=OLD)


def test_a_whole_round_with_exposure() -> None:
    worker = after(serving(), EXPOSE, EXPOSE, VERIFY, COMMIT)
    worker.hold(TOLD)
    exposed, again, verified = worker.said[1:4]
    assert exposed == again == Exposed(round=ROUND)
    assert isinstance(verified, Verified)
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)


def test_an_exposure_that_comes_after_the_worker_has_left_is_not_answered() -> None:
    """So that no grant is given for memory that may serve by then."""
    worker = abandoned(serving())
    with pytest.raises(UpdateFailed):
        worker.hold(TOLD)
    assert worker.windows.heard(EXPOSE) is None
    assert worker.windows.holdings.status == EngineStatus(applied=OLD)
    assert len(worker.said) == 2


# -------------------------------------------------------------------------------- mended by a daemon that was away
def torn_after(*answers: Any, worker: Worker | None = None, update: Update = UPDATE) -> Worker:
    """A worker whose round ended by its deadline after these words."""
    worker = after(worker or serving(), *answers)
    with pytest.raises(UpdateFailed, match="nothing was decided"):
        worker.hold(Update(update.round, update.version, 0.05, update.exposes))
    assert worker.windows.holdings.status.torn
    return worker


def test_a_commit_mends_what_was_verified_before_the_daemon_was_gone() -> None:
    worker = torn_after(VERIFY)
    assert worker.windows.heard(COMMIT) == EngineStatus(applied=NEW) == worker.windows.holdings.status
    worker.hold()  # the update call, if it is repeated, has succeeded
    assert worker.windows.heard(COMMIT) is None


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ([], COMMIT),
        ([VERIFY], Commit(round=ROUND, version=OLD)),
        ([VERIFY], Commit(round=OTHER, version=NEW)),
        ([VERIFY], TORN),
        ([], VERIFY),
    ],
    ids=["never verified", "another version", "another round", "torn, says the daemon", "verify"],
)
def test_nothing_else_does(said: list[Any], word: Any) -> None:
    worker = torn_after(*said)
    assert worker.windows.heard(word) is None
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True)


def test_memory_that_could_not_be_verified_is_not_mended() -> None:
    worker = serving()

    def verify(order: Verify) -> Verified:
        return Verified(round=order.round, digest=(0, 0), bytes=0, apply_seconds=0, digest_seconds=0, error="no part 2")

    worker.verify = verify  # type: ignore[method-assign]
    torn_after(VERIFY, worker=worker)
    assert worker.windows.heard(COMMIT) is None
    assert worker.windows.holdings.status.torn


def test_a_later_round_that_may_have_written_makes_the_old_digest_worthless() -> None:
    again = Update(RoundName(1, 9), NEW, 60.0)
    worker = torn_after(VERIFY)
    torn_after(worker=worker, update=again)
    assert worker.windows.heard(COMMIT) is None
    assert worker.windows.holdings.status.torn


def test_a_later_round_in_which_nobody_was_granted_does_not() -> None:
    worker = torn_after(VERIFY)
    after(worker)
    with pytest.raises(UpdateFailed):
        worker.hold(Update(RoundName(1, 9), NEW, 0.01, exposes=True))
    assert worker.windows.heard(COMMIT) == EngineStatus(applied=NEW)


def test_a_commit_of_an_earlier_round_mends_nothing_while_another_is_inside() -> None:
    worker = torn_after(VERIFY)
    seen: list[Any] = []
    worker.tell = lambda word: seen.append(worker.windows.heard(COMMIT))  # type: ignore[method-assign]
    with pytest.raises(UpdateFailed):
        worker.hold(Update(RoundName(1, 9), NEW, 0.01, exposes=True))
    assert seen[0] is None


def test_a_daemon_that_knows_that_nobody_was_granted_mends_whole_memory_only() -> None:
    worker = torn_after()
    assert worker.windows.heard(CLEAN) == EngineStatus(applied=OLD) == worker.windows.holdings.status
    torn = torn_after(VERIFY)
    torn_after(worker=torn, update=Update(RoundName(1, 9), NEW, 60.0))
    assert torn.windows.heard(Abort(round=RoundName(1, 9), torn=False, reason="nobody wrote")) is None
    assert torn.windows.holdings.status.torn, "it was torn before that round"


# ---------------------------------------------------------------------------------------------------------------- holds
def test_a_hold_is_kept_through_rounds_until_a_commit_or_its_end() -> None:
    worker = serving()
    assert worker.windows.holdings.hold(True, "to look at it") == EngineStatus(applied=OLD, held=True)
    assert worker.windows.holdings.held_because == "to look at it"
    with pytest.raises(UpdateFailed):
        after(worker, CLEAN).hold()
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, held=True)
    assert worker.windows.holdings.may_run, "of its weights"
    assert worker.windows.holdings.hold(False, "") == EngineStatus(applied=OLD)
    worker.windows.holdings.hold(True, "again")
    after(worker, Commit(round=RoundName(1, 9), version=NEW)).hold(Update(RoundName(1, 9), NEW, 60.0))
    assert worker.windows.holdings.status == EngineStatus(applied=NEW)
    assert worker.windows.holdings.held_because == ""


def test_a_hold_that_comes_inside_a_round_leaves_the_window_open() -> None:
    worker = serving()
    worker.tell = lambda word: worker.windows.holdings.hold(True, "now")  # type: ignore[method-assign]
    seen: list[EngineStatus] = []

    def verify(order: Verify) -> Verified:
        seen.append(worker.windows.holdings.status)
        return Worker.verify(worker, order)

    worker.verify = verify  # type: ignore[method-assign]
    with pytest.raises(UpdateFailed):
        worker.windows.serve_round(Update(ROUND, NEW, 0.05), lambda: worker.windows.heard(VERIFY), verify, worker.tell)
    assert seen == [EngineStatus(applied=OLD, window=ROUND, held=True)]
    assert worker.windows.holdings.status == EngineStatus(applied=OLD, torn=True, held=True)
