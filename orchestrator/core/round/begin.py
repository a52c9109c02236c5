"""How a round begins: its members are frozen."""

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.events import NO_PLAN, PlanFacts
from weightsync.orchestrator.core.records import RoundBegan
from weightsync.orchestrator.core.round import lending, phases
from weightsync.orchestrator.core.round.progress import KeptStandby, Progress, Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.protocol.traces.context import is_context, of_version


def begin(
    turn: Turn,
    version: Version,
    engines: list[str],
    catch_up: bool,
    plan: PlanFacts,
    lenders: dict[str, str] | None = None,
    relay: PlanFacts = NO_PLAN,
    ahead: bool = False,
) -> None:
    """Begin a round that brings ``engines`` to ``version``.

    ``catch_up``: it is committed already, on others. ``lenders``: who writes to each engine, if it is no trainer; by
    ``plan`` in a catch-up, else by ``relay``. ``ahead``: the trainer still converts it.
    """
    fleet, lenders = turn.fleet, lenders or {}
    kept = {} if ahead else _kept(fleet, version, engines, plan, lenders)
    lenders = {name: lender for name, lender in lenders.items() if name not in kept}
    ranks = {a.member: a.hello.incarnation for name in engines for a in fleet.ranks_of(name)}
    name = RoundName(fleet.epoch, fleet.memory.round_number + 1)
    attempt = fleet.attempts.get(version, 0) + 1
    taking = frozenset(member for member in ranks if member.engine in lenders) if relay.connects else frozenset()
    written = frozenset(member for member in ranks if member.engine not in kept)
    writers = plan.writers_of(written - taking) | relay.writers_of(taking)
    fleet.round = current = Round(
        name=name,
        version=version,
        attempt=attempt,
        catch_up=catch_up,
        engines={engine: progress(fleet, engine) for engine in engines},
        ranks=ranks,
        writers=writers,
        sources={writer: fleet.agents[writer].hello.incarnation for writer in writers},
        publish=publish_of(fleet, version),
        ahead=ahead,
        restaged=fleet.memory.restaged.get(version, 0),
        plan=plan,
        relay=relay,
        lenders=lenders,
        lent=(
            {member: lending.decided(fleet, lenders[member.engine], member.rank) for member in written}
            if catch_up and lenders
            else {}
        ),
        quorum=1 if catch_up else fleet.quorum(),
        phase_began=turn.now,
        began=turn.now,
    )
    for engine, known in kept.items():
        current.engines[engine].kept = True
        for member, (digest, size) in known.owed.items():
            current.stands_by(member, digest, size)
    for writer in writers:
        if writer.role == "inference" and catch_up:
            fleet.engines[writer.engine].kept = None  # what it lends is packed where that may lie
    fleet.first_attempt.setdefault(version, turn.now)
    # Journaled before anything is paused: whoever finds it knows which engines may be inside an update call.
    turn.append(RoundBegan(round=name, version=version, attempt=attempt, engines=tuple(engines)))
    kind = "catch-up round" if catch_up else "round"
    lent = f", from {', '.join(dict.fromkeys(lenders.values()))}" if lenders else ""
    lent = f" ({', '.join(lenders)}{lent[1:]})" if relay.connects else lent
    early = ", while the trainer converts it" if ahead else ""
    there = f"; {', '.join(kept)} has all of it since an earlier one" if kept else ""
    what = f"{version} to {', '.join(engines)}{lent}, attempt {attempt}{early}{there}"
    turn.say(f"{kind} {name} begins: {what}", event="round begins")
    phases.enter(turn, current, Phase.PAUSING)
    current.times.clear()  # entering the first phase booked a phase before it, which there was none
    phases.advance(turn, current)  # nobody has to be paused where all serve on


def _kept(
    fleet: Fleet, version: Version, engines: list[str], plan: PlanFacts, lenders: dict[str, str]
) -> dict[str, KeptStandby]:
    """Engines to which nothing has to be written. One that is to write on what stands by reads it as the present plan
    says, so it must have landed by that."""
    found = {name: known for name in engines if (known := standby.kept(fleet, name, version)) is not None}
    seeds = set(lenders.values())
    return {
        name: known
        for name, known in found.items()
        if name not in seeds or all(plan.connects[m].fingerprint == landed for m, landed in known.landed.items())
    }


def publish_of(fleet: Fleet, version: Version) -> str:
    """Trace context of the publish of ``version``, as its first rank said it; as it would have where nobody has."""
    staged = [agent.staged for agent in fleet.trainers() if agent.staged is not None]
    told = next((word.trace for word in staged if word.version == version and is_context(word.trace)), "")
    return told or of_version(fleet.policy.run_id, version)


def progress(fleet: Fleet, engine: str) -> Progress:
    """An engine at the beginning of a round."""
    return Progress(standby.lands(fleet, engine), standby.boundary(fleet, engine), standby.serves_on(fleet, engine))
