"""Everything that is wrong, worst first: in words that say since when, why, and what to do about it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.membership import engines, rendezvous
from weightsync.orchestrator.core.round import phases
from weightsync.orchestrator.core.since import engine_word, since
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.surroundings import findings
from weightsync.orchestrator.daemon.admin.views import ProblemView
from weightsync.orchestrator.protocol.text import clean

MAX_PROBLEMS: Final = 50
"""Of one status; those of a kind are one already, so more of them say nothing new."""

MAX_WORDS: Final = 400
"""Characters of one; ``rounds`` and the log have the whole reason."""

SHOWN: Final = 8
"""Engines that one problem names."""

PUBLISH_FIRST: Final = "publish once, also before the first roll-out and after each resume of the trainer"

REACH_IT: Final = "start its server, or correct its url; weightsync-orchestrator doctor asks it what it is"
JOIN_IT: Final = "the logs of its workers say whom they try to reach, and what they are told"

SLOW_LINKS: Final = {
    "same_gpu": "python -m weightsync.agents doctor, on that host: expandable segments keep CUDA from sharing memory",
    "nvlink": "python -m weightsync.agents doctor, on both hosts: expandable segments, or no NVLink between the GPUs",
    "nic": "python -m weightsync.agents doctor, on both hosts: a port that is far from its GPU, shared, or down",
    "tcp": "python -m weightsync.agents doctor --peer HOST: where there is RDMA, UCX has not found it",
    "shm": "python -m weightsync.agents doctor, on that host: without CMA (ptrace_scope) UCX copies twice",
}
"""What to do about a slow edge, by its link."""


@dataclass(frozen=True, slots=True)
class _Found:
    """One thing wrong with one engine, or with the fleet; ``since`` on the core's clock, None where it is unknown."""

    severity: Literal["critical", "degraded"]
    what: str
    fix: str = ""
    engine: str = ""
    since: float | None = None


def problems(fleet: Fleet, markers: Iterable[str], now: float, unix_now: float) -> tuple[ProblemView, ...]:
    """What is wrong ``now`` (seconds of the core's clock), which is ``unix_now``. ``markers``: of the run directory."""
    found = [*_of_all(fleet, now)]
    for name in fleet.engines:
        found.extend(_of_engine(fleet, name, now))
    found.extend(_of_trainer(fleet, now))
    found.extend(_of_round(fleet, now))
    found.extend(_of_links(fleet))
    found.extend(_Found("degraded", text) for text in markers)
    found.extend(_of_surroundings(fleet))
    alike: dict[tuple[str, str, str], list[_Found]] = {}
    for each in found:
        alike.setdefault((each.severity, each.what, each.fix), []).append(each)
    views = [_view(same, now, unix_now) for same in alike.values()]
    views.sort(key=lambda view: view.severity)  # critical comes before degraded, and each keeps its order
    if len(views) > MAX_PROBLEMS:
        rest = len(views) - MAX_PROBLEMS + 1
        views[MAX_PROBLEMS - 1 :] = [ProblemView(severity=views[MAX_PROBLEMS - 1].severity, what=f"{rest} more")]
    return tuple(views)


def _view(same: list[_Found], now: float, unix_now: float) -> ProblemView:
    first, names = same[0], [each.engine for each in same if each.engine]
    times = [each.since for each in same if each.since is not None]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    who = f"{', '.join(names[:SHOWN])}{more}: " if names else ""
    return ProblemView(
        severity=first.severity,
        what=who + clean(first.what, MAX_WORDS),
        fix=clean(first.fix, MAX_WORDS),
        about=tuple(names[:SHOWN]),
        count=len(names),
        since=unix_now - (now - min(times)) if times else 0.0,
    )


# ------------------------------------------------------------------------------------------------------- the fleet's
def _of_all(fleet: Fleet, now: float) -> Iterator[_Found]:
    words = {name: engine_word(fleet, name) for name in fleet.engines}
    if not {"serving", "updating"} & set(words.values()):
        looked = now >= fleet.started + fleet.policy.probe  # a daemon that has just started has not seen them yet
        last = max((since(fleet, name, word, now) for name, word in words.items()), default=fleet.started)
        committed = fleet.memory.committed
        what = f"no engine serves {committed}" if committed else "no engine serves: nothing is committed yet"
        yield _Found("critical" if looked else "degraded", what, "" if committed else PUBLISH_FIRST, since=last)
    if fleet.stopping:
        yield _Found("degraded", "the daemon is stopping: no round begins")
    if fleet.memory.maintenance is not None:
        yield _Found(
            "degraded", f"maintenance: no round begins ({fleet.memory.maintenance})",
            "weightsync-orchestrator maintenance off",
        )  # fmt: skip
    if obstacle := rendezvous.obstacle(fleet):
        yield _Found("degraded", f"no plan fits, so no version can be pushed: {obstacle}")
    for (writer, name), pending in fleet.unclosed.items():
        if not pending.outlived:
            continue
        where = f" on {pending.host}" if pending.host else ""
        reach = sorted({target.engine for target in pending.targets})
        yield _Found(
            "degraded",
            f"{writer} of round {name} may still write into {', '.join(reach[:SHOWN])}: no round takes place there",
            f"end that process{where}; once it is dead: weightsync-orchestrator declare-dead {writer}",
        )


def _of_round(fleet: Fleet, now: float) -> Iterator[_Found]:
    """A phase that has taken half of the time that it may: whoever it waits for may be stopped, and not be lost yet."""
    current = fleet.round
    if current is None or now <= (current.phase_began + current.deadline) / 2 or not current.deadline:
        return
    whom = phases.waits_for(fleet, current) or "nobody"
    most = current.deadline - current.phase_began
    yield _Found(
        "degraded",
        f"round {current.name} is {current.phase}, for which it has {most:.0f} s at most, and waits for {whom}",
        "look at that process: its log, whether it is stopped, whether its host answers",
        since=current.phase_began,
    )


def _of_links(fleet: Fleet) -> Iterator[_Found]:
    for kind, use in fleet.links.items():
        if not use.slow:
            continue
        worst = use.slow[0]
        by = f" ({worst.by})" if worst.by else ""
        more = f", and {use.slow_edges - 1} more of {use.edges} edges are slow" if use.slow_edges > 1 else ""
        what = f"{worst.edge} moves {worst.gb_per_s:g} GB/s over {kind}{by}, which does {worst.link_gb_per_s:g}{more}"
        yield _Found("degraded", what, SLOW_LINKS.get(kind, ""))


def _of_surroundings(fleet: Fleet) -> Iterator[_Found]:
    for each in findings(fleet):
        if each.level in ("error", "warning"):
            more = f" and {each.count - len(each.members)} more" if each.count > len(each.members) else ""
            where = f"{each.check}: " if each.check else ""
            yield _Found("degraded", f"{', '.join(each.members)}{more}: {where}{each.what}", each.fix)


def _of_trainer(fleet: Fleet, now: float) -> Iterator[_Found]:
    here, world = len(fleet.trainer_ranks), fleet.trainer_world()
    if here and world and here < world:
        yield _Found(
            "degraded",
            f"{here} of {world} trainer ranks are connected: no version can be staged",
            "the logs of the others say why they are away; all of them start again together",
        )
    version = conditions.staged(fleet)
    if version is not None and version in fleet.memory.failed:
        yield _Found(
            "degraded", f"{version} FAILED: {fleet.memory.failed[version]}", "publish it again, or another step"
        )
    for waiting, began in fleet.waiting_since.items():
        if fleet.round is None and now > began + fleet.policy.patience:
            what = f"the publish of {waiting} waits for {conditions.waits_for(fleet, waiting, now) or 'its round'}"
            yield _Found("degraded", what, since=began)


# ------------------------------------------------------------------------------------------------------- one engine's
def _of_engine(fleet: Fleet, name: str, now: float) -> Iterator[_Found]:
    engine, word = fleet.engines[name], engine_word(fleet, name)
    began = since(fleet, name, word, now)
    is_held = name in fleet.memory.holds
    if word == "torn":
        by = f" by {engine.torn_by}" if engine.torn_by else ""
        what = f"torn{by}, paused until a round has written all of it; waits for {_next(fleet, now)}"
        yield _Found("critical", what, _mend_torn(fleet), name, began)
    if is_held:
        what = f"held by the operator ({fleet.memory.holds[name]})"
        yield _Found("degraded", what, f"weightsync-orchestrator release {name}", name)
    if name in fleet.memory.drains:
        what = f"drained by the operator ({fleet.memory.drains[name]})"
        yield _Found("degraded", what, f"weightsync-orchestrator release {name}", name)
    if word == "held" and not is_held:
        yield _Found("degraded", *_holds_nothing(fleet, now), name, began)
    elif word == "unreachable":
        error = engine.error.removeprefix(f"engine {name}: ")
        yield _Found("degraded", f"unreachable: {error}", "" if "Fix: " in error else REACH_IT, name, began)
    elif word == "joining":
        ranks = fleet.ranks_of(name)
        world = ranks[0].hello.world if ranks else "?"
        error = f": {engine.error}" if engine.error else ""
        fix = "" if "Fix: " in error else JOIN_IT
        yield _Found("degraded", f"joining, {len(ranks)} of {world} ranks are here{error}", fix, name, began)
    elif word == "paused" and not is_held:
        want, why = engines.wish(fleet, name)
        then = "to be resumed" if want is engines.Wish.SERVE else why
        error = f"; its last call failed: {engine.error}" if engine.error else ""
        yield _Found("degraded", f"paused: {then}{error}", "", name, began)
    elif word == "serving" and engine.error:
        yield _Found("degraded", f"serves, but its last call failed: {engine.error}", "", name)
    if engine.misfit:
        yield _Found("degraded", f"in no plan, its layout does not fit: {engine.misfit}", "", name)
    elif dead := fleet.dead_edge(name):
        yield _Found("degraded", f"in no round: {dead}", "", name)
    if engine.failures and word not in ("unreachable", "joining"):  # of those it is known already what keeps them away
        left = max(0.0, engine.retry_at - now)
        times = f"{engine.failures} times in a row" if engine.failures > 1 else "once"
        again = f"tried again in {left:.0f} s" if left else "tried again with the next round"
        why = engine.blame.reason.removeprefix(f"{name}: ")
        what = f"left out of rounds, {times}, {again}: {why}"
        yield _Found("degraded", what, "weightsync-orchestrator retry (tries at once)", name, engine.blamed_at)


def _holds_nothing(fleet: Fleet, now: float) -> tuple[str, str]:
    """Why an engine holds no whole version, and what it takes."""
    committed = fleet.memory.committed
    if committed is not None and conditions.staged(fleet) == committed:
        return f"answers nobody: it has not got {committed} yet, and waits for {_next(fleet, now)}", ""
    if committed is None:
        return "answers nobody: nothing is committed yet", PUBLISH_FIRST
    return f"answers nobody: it holds nothing, and no trainer holds {committed} any more", PUBLISH_FIRST


def _mend_torn(fleet: Fleet) -> str:
    waits = bool(fleet.waiting_since) or fleet.round is not None or conditions.converted(fleet) is not None
    return "" if waits else "publish: no trainer holds a version that could repair it"


def _next(fleet: Fleet, now: float) -> str:
    """What the version that the trainer holds waits for."""
    if fleet.round is not None:
        return f"the end of round {fleet.round.name}"
    version = conditions.staged(fleet)
    if version is None:
        return "the next version"
    return conditions.waits_for(fleet, version, now) or f"its round for {version}"
