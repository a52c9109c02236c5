"""Which version is wanted, when a round for it begins, and when it has waited too long.

Where every engine serves on while its bytes arrive, a round *runs ahead*: it begins while the trainer converts the
version, so that what is converted travels meanwhile. Nothing is decided before the version is published, by STAGED of
every trainer rank and STABLE. A version that is given up instead, because a rank could not convert it or found no
numbers in it, ends its round as one that the trainer failed, and no engine has noticed.
"""

from typing import Final

from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.commands import LookForStable
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import NO_PLAN
from weightsync.orchestrator.core.membership import rendezvous
from weightsync.orchestrator.core.memory import REMEMBERED_VERSIONS, keep_newest
from weightsync.orchestrator.core.records import StagedAgain
from weightsync.orchestrator.core.round import blame, endings, entry, lending, phases, relays, reports
from weightsync.orchestrator.core.round.begin import begin
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Staged
from weightsync.orchestrator.protocol.names import Version

STABLE_LOOK_DELAYS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Seconds before each look for a STABLE that every rank's STAGED announces. The marker follows within milliseconds,
while the file system's own notice takes 50 ms and more; after the last look, the notice or the rescan finds it."""


def evaluate(turn: Turn) -> None:
    """Begin a round if one is due; fail versions that waited too long."""
    endings.mark_again(turn)
    _note_stale_markers(turn)
    _note_waiting(turn)
    staged = conditions.staged(turn.fleet)
    _look_for_stable(turn, staged)
    if turn.fleet.round is not None and turn.fleet.round.catch_up:
        turn.fleet.round.keeps_another = _keeps_another(turn, turn.fleet.round, staged)
    tend_ahead(turn)
    version = staged or conditions.converted(turn.fleet)
    if version is not None and turn.fleet.round is None and version not in turn.fleet.memory.failed:
        _begin_if_due(turn, version)
    _fail_overdue(turn)


def _keeps_another(turn: Turn, current: Round, staged: Version | None) -> bool:
    """Whether somebody could write to one that waits. Its edges are no condition: plans are made between rounds."""
    fleet, version, fan_out = turn.fleet, current.version, turn.fleet.policy.fan_out
    return any(
        (fan_out != "peers" and staged == version)
        or (fan_out != "trainer" and lending.lender_of(fleet, name, turn.now) is not None)
        for name in conditions.behind(fleet, version, turn.now)
        if name not in current.engines and not fleet.engines[name].failures
    )


def tend_ahead(turn: Turn) -> None:
    """Let a round go on whose version is published now; end one whose version will not be."""
    fleet, current = turn.fleet, turn.fleet.round
    if current is None or not current.ahead:
        return
    if conditions.is_published(fleet, current.version):
        if current.awaits_trainer:  # the engines have had nothing to be late with
            current.deadline = turn.now + phases.ROWS[current.phase].deadline(fleet.policy)
        current.ahead = False
        if current.granted:
            entry.mark_granted(turn, current)
        phases.advance(turn, current)
    elif why := _given_up(turn, current):
        reports.give_up(turn, current, Trouble(why, "trainer"))


def _given_up(turn: Turn, current: Round) -> str:
    fleet, version = turn.fleet, current.version
    if fleet.generation != version.generation:
        return "its trainer ended before it was published"
    for agent in fleet.trainers():
        if conditions.held_by(fleet, agent) != version:
            return f"{agent.member} has given it up"
    limit = fleet.policy.staged
    return f"it was not published within {limit:.0f} s" if turn.now >= current.began + limit else ""


def _note_stale_markers(turn: Turn) -> None:
    fleet = turn.fleet
    if fleet.generation is None:
        return
    for seen in fleet.stable:
        if seen.generation not in (None, fleet.generation) and seen not in fleet.stale_said:
            keep_newest(fleet.stale_said, seen, None, REMEMBERED_VERSIONS)
            turn.say(
                f"STABLE of step {seen.step} is of an earlier trainer ({seen.generation}); ignored",
                "warning",
                event="marker stale",
            )


def _note_waiting(turn: Turn) -> None:
    fleet = turn.fleet
    for agent in fleet.trainers():
        if agent.staged is None or fleet.memory.settled(agent.staged.version):
            continue
        if fleet.memory.forgot(agent.staged.version):
            _refuse(turn, agent.staged)
        else:
            fleet.waiting_since.setdefault(agent.staged.version, turn.now)


def _refuse(turn: Turn, staged: Staged) -> None:
    """FAILED: nobody knows any more whether this version was committed, and none is committed twice."""
    if staged.restaged > turn.fleet.memory.restaged.get(staged.version, 0):
        # The trainer hears only what is said of the staging that it waits for.
        turn.append(StagedAgain(version=staged.version, restaged=staged.restaged))
    furthest = turn.fleet.memory.forgotten[staged.version.generation]
    endings.fail_version(
        turn,
        staged.version,
        f"this trainer's steps up to {furthest} are too long ago to know whether step {staged.version.step} was "
        "committed before; publish it under a higher number, or start the trainer anew",
    )


def _look_for_stable(turn: Turn, version: Version | None) -> None:
    """All ranks have staged: the marker is a moment away, so look instead of waiting to be told."""
    fleet = turn.fleet
    settled = version is None or version in fleet.memory.done or version in fleet.memory.failed
    if version is None or settled or conditions.is_stable(fleet, version):
        fleet.stable_looks = 0
    elif not fleet.looking and fleet.stable_looks < len(STABLE_LOOK_DELAYS):
        turn.do(LookForStable(STABLE_LOOK_DELAYS[fleet.stable_looks], version.step))
        fleet.stable_looks += 1
        fleet.looking = True


def _begin_if_due(turn: Turn, version: Version) -> None:
    fleet = turn.fleet
    if conditions.is_catch_up(fleet, version) and not conditions.targets(fleet, version, turn.now):
        return  # as nearly always, all have it
    if not conditions.waits_for(fleet, version, turn.now):
        ready = conditions.ready(fleet, version, turn.now)
        for name in conditions.targets(fleet, version, turn.now):
            why = conditions.unready(fleet, name)
            if why and name not in ready:  # the others have waited for it
                blame.put(turn, name, Trouble(why, "engine"))
                turn.say(f"{name} does not take part: {why}", "warning", event="engine late", engine=name)
        assert fleet.plan is not None
        catch_up = conditions.is_catch_up(fleet, version)
        taking = {} if catch_up else relays.ready(fleet, ready, turn.now)
        relay = fleet.feed.plan if taking and fleet.feed is not None else None
        early = not catch_up and not conditions.is_published(fleet, version)
        begin(turn, version, ready, catch_up, fleet.plan, taking, relay or NO_PLAN, ahead=early)


def _join(fleet: Fleet) -> float:
    """How long a published version waits for engines: where there are enough, those wait for the others, too."""
    return fleet.policy.join + (fleet.policy.patience if fleet.quorum_since is not None else 0.0)


def _fail_overdue(turn: Turn) -> None:
    fleet = turn.fleet
    obstacle = rendezvous.obstacle(fleet) if fleet.waiting_since else ""
    for version, since in list(fleet.waiting_since.items()):
        if (fleet.round is not None and fleet.round.version == version) or fleet.torn_by(version):
            continue
        published = conditions.is_published(fleet, version)
        if fleet.generation not in (None, version.generation):
            endings.fail_version(turn, version, "its trainer ended before the version was committed")
        elif published and obstacle:
            endings.fail_version(turn, version, obstacle)
        elif turn.now >= since + (_join(fleet) if published else fleet.policy.staged):
            clause = conditions.waits_for(fleet, version, turn.now)
            endings.fail_version(turn, version, f"after {turn.now - since:.0f} s: {clause}")
