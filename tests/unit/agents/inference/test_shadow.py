"""A worker that serves while a version lands beside its weights: what it says, what it serves, what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
from weightsync.agents.errors import AgentError
from weightsync.agents.inference.calls import SwitchInfo
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.shadow import ShadowRounds, Superseded
from weightsync.agents.inference.window import UpdateFailed
from weightsync.agents.memory.errors import FlipFailed, PagesTorn, StandbyLost
from weightsync.orchestrator.protocol.messages import (
    Abort,
    EngineStatus,
    Expose,
    Exposed,
    Fault,
    Holding,
    Left,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import RoundName, Version

FIRST, SECOND, THIRD = RoundName(1, 1), RoundName(1, 2), RoundName(2, 3)
OLD, NEW = Version(7, 1), Version(7, 2)
DIGESTS = {OLD: (1, 11), NEW: (2, 22)}


class Memory:
    """Two versions of weights, named instead of written: what lands, and what is served."""

    bytes = 640

    def __init__(self, swaps: bool) -> None:
        self.swaps, self.restless = swaps, False
        self.arrived: Version | None = None
        self.live: Version | None = None
        self.digests = dict(DIGESTS)
        self.shows = True
        self.superseded = False
        self.settled = True
        self.audits: list[Version] = []
        self.lost: Exception | None = None
        self.failure: Exception | None = None
        self.during: Callable[[], None] = lambda: None
        self.before_it_settles: Callable[[], None] = lambda: None
        self.wrong: list[AssertionError] = []

    def landed(self, version: Version) -> tuple[int, int]:
        if self.failure is not None:
            raise self.failure
        assert self.arrived == version
        return DIGESTS[version]

    def take(self, version: Version) -> None:
        self.during()
        if self.failure is not None:
            raise self.failure
        self.live, self.arrived = self.arrived, self.live if self.swaps else self.arrived
        self.settled = not self.swaps

    def settle(self) -> None:
        try:
            self.before_it_settles()
        except AssertionError as error:  # which would be logged, as all that goes wrong beside an engine
            self.wrong.append(error)
        if self.lost is not None:
            raise self.lost
        self.settled = True

    def shown(self) -> bool:
        assert self.swaps
        return self.shows

    def audit(self) -> tuple[int, int]:
        assert self.live is not None
        self.audits.append(self.live)
        if self.superseded:
            raise Superseded("experts have moved")
        return self.digests[self.live]


class Worker:
    """A worker whose threads beside do what they have to when they are told to."""

    def __init__(self, swaps: bool = False) -> None:
        self.memory, self.holdings = Memory(swaps), Holdings()
        self.said: list[Any] = []
        self.beside: list[Callable[[], None]] = []
        self.later: list[Callable[[], None]] = []
        self.synchronised = 0
        self.shadow = ShadowRounds(
            self.holdings, self.memory, self.said.append, self.beside.append, self.later.append, lambda: 5.0
        )

    @property
    def status(self) -> EngineStatus:
        return self.holdings.status

    def computes(self) -> None:
        while self.beside:
            self.computes_one()

    def computes_one(self) -> None:
        self.beside.pop(0)()
        for error in self.memory.wrong:
            raise error

    def audits(self) -> None:
        while self.later:
            self.later.pop(0)()

    def lands(self, name: RoundName, version: Version) -> None:
        self.shadow.heard(Expose(round=name))
        self.memory.arrived = version
        self.shadow.heard(verify(name, version))

    def switches(self, name: RoundName, version: Version) -> None:
        self.shadow.switch(order(name, version), self.synchronise)

    def synchronise(self) -> None:
        self.synchronised += 1

    def words(self) -> list[Any]:
        said, self.said[:] = list(self.said), []
        return said


def verify(name: RoundName, version: Version) -> Verify:
    return Verify(round=name, version=version, deadline_seconds=20.0)


def order(name: RoundName, version: Version) -> SwitchInfo:
    return SwitchInfo(round=name, version=version, incarnations={0: 9}, cache="keep", deadline_seconds=5.0)


def serving(version: Version = OLD, swaps: bool = False) -> Worker:
    """A worker that was brought to ``version`` by the first round."""
    worker = Worker(swaps)
    worker.lands(FIRST, version)
    worker.computes()
    worker.switches(FIRST, version)
    worker.computes()
    worker.audits()
    worker.words()
    return worker


def test_a_round_from_expose_to_left() -> None:
    worker = serving()
    worker.shadow.heard(Expose(round=SECOND))
    assert worker.words() == [Exposed(round=SECOND)]
    assert worker.status == EngineStatus(applied=OLD)
    worker.memory.arrived = NEW
    worker.shadow.heard(verify(SECOND, NEW))
    assert worker.words() == [], "the digest is taken beside"
    worker.computes()
    assert worker.words() == [Verified(round=SECOND, digest=(2, 22), bytes=640, apply_seconds=0.0, digest_seconds=0.0)]
    assert worker.status == EngineStatus(applied=OLD, standby=NEW, standby_digest=(2, 22))
    assert worker.holdings.may_run
    assert worker.memory.live == OLD
    worker.switches(SECOND, NEW)
    assert worker.memory.live == NEW
    assert worker.words() == [], "nobody takes it for done before the audit has agreed"
    assert worker.status == EngineStatus(applied=OLD, standby=NEW, standby_digest=(2, 22))
    assert worker.holdings.may_run, "it serves while it is audited"
    worker.computes()
    assert worker.words() == [Left(round=SECOND, status=EngineStatus(applied=NEW))]


def test_the_device_is_idle_before_and_after_the_switch() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    seen: list[int] = []
    before = worker.synchronised
    worker.memory.during = lambda: seen.append(worker.synchronised - before)
    worker.switches(SECOND, NEW)
    assert (seen, worker.synchronised - before) == ([1], 2)


@pytest.mark.parametrize("torn", [True, False])
def test_an_abort_drops_what_has_landed_and_never_tears(torn: bool) -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.shadow.heard(Abort(round=SECOND, torn=torn, reason="a writer was lost"))
    assert worker.words() == [Left(round=SECOND, status=EngineStatus(applied=OLD))]
    assert worker.holdings.may_run
    with pytest.raises(UpdateFailed, match=r"what waits in standby is nothing, not step 2"):
        worker.switches(SECOND, NEW)
    assert worker.memory.live == OLD


def test_an_abort_or_another_round_during_the_digest_makes_it_worth_nothing() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.shadow.heard(Abort(round=SECOND, torn=True, reason="the trainer died"))
    worker.words()
    worker.computes()
    assert (worker.words(), worker.status) == ([], EngineStatus(applied=OLD))
    worker.lands(SECOND, NEW)
    worker.shadow.heard(Expose(round=THIRD))
    worker.words()
    worker.computes()
    assert (worker.words(), worker.status) == ([], EngineStatus(applied=OLD))


def test_words_about_other_rounds_change_nothing() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.shadow.heard(Abort(round=THIRD, torn=True, reason="another"))
    worker.shadow.heard(verify(THIRD, NEW))
    worker.computes()
    assert worker.words() == []
    assert worker.status.standby == NEW


def test_verify_said_again_is_answered_again_and_computed_once() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.shadow.heard(verify(SECOND, NEW))
    assert len(worker.beside) == 1
    worker.computes()
    worker.shadow.heard(verify(SECOND, NEW))
    assert [type(word) for word in worker.words()] == [Exposed, Verified, Verified]
    assert worker.beside == []


def test_expose_said_again_forgets_nothing() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.shadow.heard(Expose(round=SECOND))
    assert worker.status.standby == NEW


class Short(AgentError):
    fault: Fault = "trainer"


def test_what_cannot_be_verified_says_why_and_is_no_standby() -> None:
    worker = serving()
    worker.memory.failure = Short("half of it")
    worker.lands(SECOND, NEW)
    worker.computes()
    verified = worker.words()[-1]
    assert (verified.error, verified.fault, verified.retry) == ("Short('half of it')", "trainer", False)
    assert worker.status == EngineStatus(applied=OLD)
    with pytest.raises(UpdateFailed, match="nothing"):
        worker.switches(SECOND, NEW)


def test_another_version_than_the_one_that_waits_is_refused() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    other = Version(8, 2)
    refusal = "what waits in standby is step 2 (generation 7), not step 2 (generation 8)"
    assert worker.shadow.refusal(order(SECOND, other)) == refusal
    with pytest.raises(UpdateFailed):
        worker.switches(SECOND, other)
    assert worker.shadow.refusal(order(SECOND, NEW)) == ""


@pytest.mark.parametrize("audited", [False, True])
def test_a_switch_that_is_asked_again_takes_place_once_and_is_answered_twice(audited: bool) -> None:
    """A daemon that was away asks under the name of another round."""
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.switches(SECOND, NEW)
    if audited:
        worker.computes()
    worker.memory.during = lambda: pytest.fail("it has taken place")
    assert worker.shadow.refusal(order(THIRD, NEW)) == ""
    worker.switches(THIRD, NEW)
    worker.switches(SECOND, NEW)
    worker.computes()
    lefts = [word.round for word in worker.words()]
    assert lefts == ([SECOND, THIRD, SECOND] if audited else [SECOND, THIRD])


def test_an_audit_that_differs_tears() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.memory.digests[NEW] = (2, 23)
    worker.switches(SECOND, NEW)
    worker.computes()
    torn = EngineStatus(applied=OLD, torn=True, standby=NEW, standby_digest=(2, 22))
    assert worker.words() == [Left(round=SECOND, status=torn, fault="engine")]
    assert not worker.holdings.may_run
    worker.memory.digests = dict(DIGESTS)
    worker.switches(THIRD, NEW)  # what has landed is still whole, so it mends
    assert not worker.holdings.may_run, "torn until the audit has agreed"
    worker.computes()
    assert worker.words() == [Left(round=THIRD, status=EngineStatus(applied=NEW))]
    assert worker.holdings.may_run


def test_a_switch_that_fails_tears_and_can_be_tried_again() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.memory.failure = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        worker.switches(SECOND, NEW)
    assert worker.words() == [
        Left(
            round=SECOND,
            status=EngineStatus(applied=OLD, torn=True, standby=NEW, standby_digest=(2, 22)),
            fault="engine",
        )
    ]
    assert not worker.holdings.may_run
    worker.memory.failure = None
    worker.switches(SECOND, NEW)
    worker.computes()
    assert worker.words() == [Left(round=SECOND, status=EngineStatus(applied=NEW))]


def test_a_round_that_begins_during_the_switch_is_heard_after_it() -> None:
    """What has landed is read by the switch; nobody may be granted it meanwhile."""
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()

    def during() -> None:
        worker.shadow.heard(Expose(round=THIRD))
        assert worker.said == []
        assert worker.status.standby == NEW

    worker.memory.during = during
    worker.switches(SECOND, NEW)
    assert worker.words() == [Exposed(round=THIRD)]
    worker.computes()
    assert worker.words() == [Left(round=SECOND, status=EngineStatus(applied=NEW))]


def test_a_round_that_begins_during_the_switch_is_heard_when_it_has_failed() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.memory.during = lambda: worker.shadow.heard(Expose(round=THIRD))
    worker.memory.failure = RuntimeError("no")
    with pytest.raises(RuntimeError):
        worker.switches(SECOND, NEW)
    assert worker.words()[-1] == Exposed(round=THIRD)
    assert worker.status == EngineStatus(applied=OLD, torn=True)


def test_an_audit_of_memory_that_was_switched_again_is_worth_nothing() -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.switches(SECOND, NEW)
    late = worker.beside.pop()
    worker.lands(THIRD, OLD)
    worker.computes()
    worker.switches(THIRD, OLD)
    worker.words()
    late()
    assert worker.words() == []
    worker.computes()
    assert worker.words() == [Left(round=THIRD, status=EngineStatus(applied=OLD))]


def test_a_held_worker_is_held_no_longer_by_a_switch_but_by_what_is_said_after_it() -> None:
    worker = serving()
    worker.holdings.hold(True, "left out")
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.switches(SECOND, NEW)
    assert not worker.status.held
    worker.holdings.hold(True, "an operator looks at it")
    worker.computes()
    assert worker.status == EngineStatus(applied=NEW, held=True)
    assert worker.holdings.held_because == "an operator looks at it"


def test_nothing_runs_before_the_first_version_was_audited() -> None:
    worker = Worker()
    worker.lands(FIRST, OLD)
    worker.computes()
    worker.switches(FIRST, OLD)
    assert not worker.holdings.may_run
    worker.computes()
    assert worker.holdings.may_run


# ------------------------------------------------------------------------------------------- pages that are exchanged
def flipping() -> Worker:
    """A worker whose pages were exchanged for NEW's; nobody has looked at them yet."""
    worker = serving(swaps=True)
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.switches(SECOND, NEW)
    return worker


def test_the_version_before_waits_after_a_flip_and_comes_back_by_another() -> None:
    worker = flipping()
    worker.computes()
    before = EngineStatus(applied=NEW, standby=OLD, standby_digest=(1, 11))
    assert worker.words()[-1] == Left(round=SECOND, status=before)
    worker.switches(THIRD, OLD)
    assert worker.memory.live == OLD
    worker.computes()
    assert worker.words() == [Left(round=THIRD, status=EngineStatus(applied=OLD, standby=NEW, standby_digest=(2, 22)))]


def test_the_version_before_is_gone_once_something_lands_on_it() -> None:
    """Which nothing does before it is in its place."""
    worker = serving(swaps=True)
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.switches(SECOND, NEW)
    worker.shadow.heard(Expose(round=THIRD))
    assert (worker.words(), worker.memory.settled) == ([], False)
    assert not worker.shadow.gives_up(copied=False)
    beside = EngineStatus(applied=NEW, standby=OLD, standby_digest=(1, 11))

    def told_of_it() -> None:
        assert (worker.words(), worker.memory.settled) == ([Left(round=SECOND, status=beside)], False)
        assert not worker.shadow.gives_up(copied=False)

    worker.memory.before_it_settles = told_of_it
    worker.computes()
    assert (worker.words(), worker.memory.settled) == ([Exposed(round=THIRD)], True)
    assert worker.status == EngineStatus(applied=NEW)


@pytest.mark.parametrize("error", [StandbyLost("cuMemMap"), RuntimeError("device lost")])
def test_what_was_served_may_be_lost_and_then_nothing_lands_any_more(error: Exception) -> None:
    worker = serving(swaps=True)
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.memory.lost = error
    worker.switches(SECOND, NEW)
    worker.shadow.heard(Expose(round=THIRD))
    worker.computes()
    alone, beside = EngineStatus(applied=NEW), EngineStatus(applied=NEW, standby=OLD, standby_digest=(1, 11))
    assert worker.words() == [
        Left(round=SECOND, status=beside),
        Holding(status=alone),  # what it has said of its standby is no longer so
        Left(round=THIRD, status=alone, fault="engine", retry=not isinstance(error, StandbyLost)),
    ]
    assert (worker.status, worker.holdings.may_run) == (alone, True), "what is served is whole"
    worker.audits()
    assert (worker.words(), worker.memory.audits[-1]) == ([], NEW)


def test_pages_that_do_not_show_what_was_exchanged_tear_and_leave_nothing_in_standby() -> None:
    worker = serving(swaps=True)
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.memory.shows = False
    worker.switches(SECOND, NEW)
    worker.computes()
    assert worker.words()[-1] == Left(round=SECOND, status=EngineStatus(applied=OLD, torn=True), fault="engine")
    assert (worker.later, worker.memory.settled) == ([], True), "there is nothing left to audit"
    worker.shadow.heard(Expose(round=THIRD))
    assert worker.words() == [Exposed(round=THIRD)]


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("right", [True, False])
def test_what_batches_would_move_is_looked_at_before_the_next_one(swaps: bool, right: bool) -> None:
    worker = serving(swaps=swaps)
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.memory.restless, worker.memory.shows = True, right
    if not right:
        worker.memory.digests[NEW] = (3, 33)
    worker.switches(SECOND, NEW)
    worker.memory.digests[NEW] = (4, 44)  # a batch has moved experts; a late audit of pages says so by Superseded
    (left,) = worker.words()
    assert (left.round, left.fault, worker.holdings.may_run) == (SECOND, "" if right else "engine", right)
    worker.memory.superseded = True
    worker.computes()
    worker.audits()
    assert (worker.words(), worker.holdings.may_run) == ([], right)
    worker.shadow.heard(Expose(round=THIRD))
    assert worker.words() == [Exposed(round=THIRD)], "the next one lands as ever"


def before_it_has_settled(do: Callable[[Worker], None]) -> Worker:
    """A worker that has told of its flip to NEW, of which OLD is not in its place yet when ``do`` is done."""
    worker = flipping()

    def meanwhile() -> None:
        worker.memory.before_it_settles = lambda: None
        worker.words()
        do(worker)

    worker.memory.before_it_settles = meanwhile
    worker.computes_one()
    worker.computes_one()
    return worker


def test_a_flip_back_before_the_first_one_has_settled_has_an_end_of_its_own() -> None:
    def back(worker: Worker) -> None:
        worker.shadow.heard(Expose(round=THIRD))
        worker.switches(SECOND, OLD)

    worker = before_it_has_settled(back)
    assert worker.words() == [], "words are heard when the second one has settled"
    worker.computes()
    old = EngineStatus(applied=OLD, standby=NEW, standby_digest=(2, 22))
    assert worker.words() == [Left(round=SECOND, status=old), Exposed(round=THIRD)]
    worker.audits()
    assert (worker.words(), worker.status) == ([], EngineStatus(applied=OLD))


def test_the_first_one_settles_while_a_flip_back_is_under_way() -> None:
    worker = flipping()
    worker.words()
    worker.memory.during = worker.computes
    worker.shadow.heard(Expose(round=THIRD))
    worker.holdings.committed(NEW, OLD, (1, 11))
    worker.switches(SECOND, OLD)
    assert worker.words() == []
    worker.computes()
    assert worker.words()[-1] == Exposed(round=THIRD)


def test_a_flip_back_finds_that_standby_is_lost() -> None:
    alone = EngineStatus(applied=NEW)

    def back(worker: Worker) -> None:
        worker.memory.lost = worker.memory.failure = StandbyLost("cuMemMap")
        with pytest.raises(StandbyLost):
            worker.switches(THIRD, OLD)
        assert worker.words() == [Left(round=THIRD, status=alone, fault="engine", retry=False)]
        worker.shadow.heard(Expose(round=SECOND))
        assert worker.words() == [Left(round=SECOND, status=alone, fault="engine", retry=False)], "nothing lands there"

    worker = before_it_has_settled(back)
    worker.audits()
    assert (worker.words(), worker.holdings.may_run) == ([Holding(status=alone)], True)


def flipped() -> Worker:
    """A worker that has told of its switch to NEW, which is not audited yet."""
    worker = flipping()
    worker.computes()
    whole = EngineStatus(applied=NEW, standby=OLD, standby_digest=(1, 11))
    assert worker.words()[-1] == Left(round=SECOND, status=whole), "pages that show it are enough for that"
    return worker


def test_nobody_waits_for_the_audit_of_a_flip_and_one_that_agrees_says_nothing() -> None:
    worker = flipped()
    worker.audits()
    assert worker.words() == []
    assert worker.holdings.may_run


@pytest.mark.parametrize("failure", [False, True])
def test_an_audit_of_a_flip_that_differs_tears_and_says_so(failure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = flipped()
    if failure:

        def lost() -> tuple[int, int]:
            raise RuntimeError("device lost")

        monkeypatch.setattr(worker.memory, "audit", lost)
    worker.memory.digests[NEW] = (0, 0)
    worker.audits()
    assert worker.words() == [Holding(status=EngineStatus(applied=NEW, torn=True))]
    assert not worker.holdings.may_run
    assert worker.shadow.refusal(order(THIRD, OLD)), "nobody knows any more what is in which pages"
    monkeypatch.undo()
    worker.memory.digests = dict(DIGESTS)
    worker.lands(THIRD, NEW)
    worker.computes()
    worker.switches(THIRD, NEW)
    worker.computes()
    worker.audits()
    assert worker.words()[-1] == Left(round=THIRD, status=EngineStatus(applied=NEW))
    assert worker.holdings.may_run, "what is written anew mends it"


def test_an_audit_of_a_flip_that_is_superseded_says_nothing() -> None:
    worker = flipped()
    worker.memory.superseded = True
    worker.audits()
    assert (worker.words(), worker.holdings.may_run) == ([], True)


def test_a_flip_back_during_the_audit_ends_it_and_has_its_own() -> None:
    worker = flipped()
    late = worker.later.pop()
    worker.memory.during = late
    worker.memory.digests[NEW] = (0, 0)
    worker.switches(THIRD, OLD)
    worker.computes()
    worker.audits()
    back = EngineStatus(applied=OLD, standby=NEW, standby_digest=(2, 22))
    assert worker.words() == [Left(round=THIRD, status=back)]
    assert worker.holdings.may_run


def test_a_flip_that_the_driver_refuses_leaves_both_versions_where_they_are() -> None:
    worker = serving(swaps=True)
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.words()
    worker.memory.failure = FlipFailed("cuMemMap: out of memory")
    with pytest.raises(FlipFailed):
        worker.switches(SECOND, NEW)
    whole = EngineStatus(applied=OLD, standby=NEW, standby_digest=(2, 22))
    assert worker.words() == [Left(round=SECOND, status=whole, fault="engine")]
    assert worker.holdings.may_run
    worker.memory.failure = None
    worker.switches(THIRD, NEW)
    worker.computes()
    assert worker.status == EngineStatus(applied=NEW, standby=OLD, standby_digest=(1, 11))


def test_pages_that_are_torn_leave_nothing_in_standby() -> None:
    worker = serving(swaps=True)
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.memory.failure = PagesTorn("cuMemMap")
    with pytest.raises(PagesTorn):
        worker.switches(SECOND, NEW)
    assert worker.status == EngineStatus(applied=OLD, torn=True)


@pytest.mark.parametrize("copied", [True, False])
def test_what_lies_in_a_landing_that_is_given_up_stands_by_no_more(copied: bool) -> None:
    """What lands in pages has left the landing once it is verified."""
    worker = serving()
    worker.lands(SECOND, NEW)
    worker.computes()
    assert worker.status.standby == NEW
    assert worker.shadow.gives_up(copied=copied)
    assert worker.status.standby == (None if copied else NEW)
    assert bool(worker.shadow.refusal(order(SECOND, NEW))) == copied


@pytest.mark.parametrize("copied", [True, False])
def test_what_is_on_its_way_into_a_landing_that_is_given_up_never_stands_by(copied: bool) -> None:
    worker = serving()
    worker.lands(SECOND, NEW)
    assert worker.shadow.gives_up(copied=copied)
    worker.words()
    worker.computes()
    assert (worker.status.standby, worker.words()) == (None, [])


def test_a_landing_is_not_given_up_while_it_is_switched_from() -> None:
    worker, asked = serving(), []
    worker.lands(SECOND, NEW)
    worker.computes()
    worker.memory.during = lambda: asked.append(worker.shadow.gives_up(copied=True))
    worker.switches(SECOND, NEW)
    assert asked == [False]
    assert worker.memory.live == NEW
