"""Treatments: a trainer without a table is told what the attached engines need, and makes its slots for that."""

from weightsync.orchestrator.core.commands import Announced, MakeNeeds
from weightsync.orchestrator.core.events import NeedsReady
from weightsync.orchestrator.core.membership import rendezvous
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.core.turn import Turn


def asks(agent: ConnectedAgent) -> bool:
    """Whether this trainer rank makes its slots for what engines need."""
    return agent.hello.trainer is not None and agent.hello.trainer.follows_needs


def evaluate(turn: Turn) -> None:
    """Ask for the needs when the attached engines are others, and tell them to whom they were not told.

    Only the first rank is told: it shares them with the others over the trainer's own network, so that all ranks have
    the same ones, and so that the daemon does not send a large model's names to hundreds of ranks.
    """
    fleet = turn.fleet
    first = fleet.trainer_ranks.get(0)
    if first is None or not asks(first):
        return
    _ask(turn)
    if fleet.needs is not None and first.told_needs != fleet.needs.fingerprint:
        first.told_needs = fleet.needs.fingerprint
        turn.send(first.member, fleet.needs)


def _ask(turn: Turn) -> None:
    fleet = turn.fleet
    # As for a plan: nobody is told half of it while engines are still expected.
    attached = [name for name in fleet.engines if fleet.attached(name) and _speaks(fleet, name)]
    if not attached or (fleet.needs is None and rendezvous.awaited(turn, attached)):
        return
    ranks = [agent for name in attached for agent in fleet.ranks_of(name)]
    everybody = frozenset((agent.member, agent.hello.incarnation) for agent in ranks)
    if everybody == fleet.needs_of:
        return
    fleet.needs_of = everybody
    fleet.needs_number += 1
    parties = tuple(Announced(a.member, a.hello.incarnation, a.announce) for a in ranks if a.announce is not None)
    turn.do(MakeNeeds(fleet.needs_number, parties))


def _speaks(fleet: Fleet, name: str) -> bool:
    """One that does not fit the trainer has no say; one that does not fit the other engines may be right next time."""
    return not fleet.engines[name].misfit or name in fleet.unlike


def ready(turn: Turn, event: NeedsReady) -> None:
    """The union is made. An engine that contradicts an earlier one is a misfit for as long as that is so."""
    fleet = turn.fleet
    if event.number != fleet.needs_number:
        return
    for name in fleet.unlike - event.misfits.keys():
        fleet.engines[name].misfit = ""
    for name, reason in event.misfits.items():
        fleet.engines[name].misfit, fleet.engines[name].misfit_fault = reason, "config"
        if name not in fleet.unlike:
            turn.say(f"{name} does not fit the other engines: {reason}", "error", event="engine misfit", engine=name)
    fleet.unlike = frozenset(event.misfits)
    if fleet.needs is None or fleet.needs.fingerprint != event.needs.fingerprint:
        codes = len(event.needs.quantized)
        turn.say(f"engines need {len(event.needs.tensors)} tensors, {codes} of them quantised", event="needs known")
    fleet.needs = event.needs
