"""One sentence that says what the daemon is doing and why."""

from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.membership import needs, rendezvous
from weightsync.orchestrator.core.state import Fleet


def sentence(fleet: Fleet, now: float) -> str:
    """The state of the fleet for people, without figures that change by themselves."""
    if fleet.round is not None:
        current = fleet.round
        without = [f"{name} ({p.left_out})" for name, p in current.engines.items() if p.left_out]
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        return f"round {current.name}: {current.phase} for {current.version}" + (
            f" without {without[0]}{more}" if without else ""
        )
    torn = [name for name in fleet.engines if fleet.torn(name)]
    if torn:
        return f"{', '.join(torn)} torn and paused: waiting for {_next(fleet, now)}"
    if not fleet.trainers_whole():
        world = fleet.trainer_world()
        here = sum(agent.announce is not None for agent in fleet.trainers())
        if any(map(needs.asks, fleet.trainers())):
            return f"{_serving(fleet)}; waiting for {_slots(fleet, here)}"
        return f"{_serving(fleet)}; waiting for trainer ranks ({here} of {world if world else '?'} announced)"
    if fleet.plan is None and (late := [name for name in fleet.expected() if not fleet.attached(name)]):
        return f"{_serving(fleet)}; waiting for engines {', '.join(late)}"
    obstacle = rendezvous.obstacle(fleet)
    if obstacle:
        return f"{_serving(fleet)}; no plan fits: {obstacle}"
    return f"{_serving(fleet)}; waiting for {_next(fleet, now)}"


def standing(fleet: Fleet) -> str:
    """The sentence, and what is wrong with each engine: for the trainer, whose user may look nowhere else."""
    wrong = [f"{name}: {why}" for name, engine in fleet.engines.items() if (why := engine.complaint[0])]
    more = len(wrong) - conditions.SHOWN
    shown = [*wrong[: conditions.SHOWN], *([f"{more} more"] if more > 0 else [])]
    return "; ".join([fleet.sentence, *shown])


def _slots(fleet: Fleet, here: int) -> str:
    """What a trainer that makes its slots for the engines' needs waits for."""
    if fleet.needs is None:
        late = [name for name in fleet.expected() if not fleet.attached(name)]
        return f"engines that say what they need: {', '.join(late) or 'their layouts are being put together'}"
    world = fleet.trainer_world() or "?"
    return f"trainer ranks to make their slots, which they do at their next publish ({here} of {world} announced)"


def _serving(fleet: Fleet) -> str:
    committed = fleet.memory.committed
    return f"{committed} is committed" if committed is not None else "nothing is committed yet"


def _next(fleet: Fleet, now: float) -> str:
    # What the present trainer has staged: one that a dead trainer left waits for nothing that could come. Of these the
    # oldest: a later one replaces it in the trainer's slots, and then it fails.
    pending = min(fleet.waiting_since, key=lambda each: (each.generation != fleet.generation, each.step), default=None)
    return conditions.waits_for(fleet, pending, now) if pending is not None else "the next version"
