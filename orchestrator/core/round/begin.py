"""How a round begins: its members are frozen."""

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.events import NO_PLAN, PlanFacts
from weightsync.orchestrator.core.records import RoundBegan
from weightsync.orchestrator.core.round import lending, phases
from weightsync.orchestrator.core.round.progress import Progress, Round
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
    ranks = {a.member: a.hello.incarnation for name in engines for a in fleet.ranks_of(name)}
    name = RoundName(fleet.epoch, fleet.memory.round_number + 1)
    attempt = fleet.attempts.get(version, 0) + 1
    taking = frozenset(member for member in ranks if member.engine in lenders) if relay.connects else frozenset()
    writers = plan.writers_of(frozenset(ranks) - taking) | relay.writers_of(taking)
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
        plan=plan,
        relay=relay,
        lenders=lenders,
        lent=(
            {member: lending.decided(fleet, lenders[member.engine], member.rank) for member in ranks}
            if catch_up and lenders
            else {}
        ),
        quorum=1 if catch_up else fleet.quorum(),
        phase_began=turn.now,
        began=turn.now,
    )
    fleet.first_attempt.setdefault(version, turn.now)
    # Journaled before anything is paused: whoever finds it knows which engines may be inside an update call.
    turn.append(RoundBegan(round=name, version=version, attempt=attempt, engines=tuple(engines)))
    kind = "catch-up round" if catch_up else "round"
    lent = f", from {', '.join(dict.fromkeys(lenders.values()))}" if lenders else ""
    lent = f" ({', '.join(lenders)}{lent[1:]})" if relay.connects else lent
    early = ", while the trainer converts it" if ahead else ""
    what = f"{version} to {', '.join(engines)}{lent}, attempt {attempt}{early}"
    turn.say(f"{kind} {name} begins: {what}", event="round begins")
    phases.enter(turn, current, Phase.PAUSING)
    current.times.clear()  # entering the first phase booked a phase before it, which there was none
    phases.advance(turn, current)  # nobody has to be paused where all serve on


def publish_of(fleet: Fleet, version: Version) -> str:
    """Trace context of the publish of ``version``, as its first rank said it; as it would have where nobody has."""
    staged = [agent.staged for agent in fleet.trainers() if agent.staged is not None]
    told = next((word.trace for word in staged if word.version == version and is_context(word.trace)), "")
    return told or of_version(fleet.policy.run_id, version)


def progress(fleet: Fleet, engine: str) -> Progress:
    """An engine at the beginning of a round."""
    return Progress(standby.lands(fleet, engine), standby.boundary(fleet, engine), standby.serves_on(fleet, engine))
