"""Which version is wanted, what it waits for, and when a round for it begins."""

from weightsync.orchestrator.core import rendezvous
from weightsync.orchestrator.core.round import endings
from weightsync.orchestrator.core.round.begin import begin
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.names import Version


def is_stable(fleet: Fleet, version: Version) -> bool:
    """STABLE of this step is there, empty or of this generation."""
    return any(s.step == version.step and s.generation in (None, version.generation) for s in fleet.stable)


def staged(fleet: Fleet) -> Version | None:
    """The version that all trainer ranks have staged."""
    ranks = fleet.trainers()
    if not fleet.trainers_whole():
        return None
    versions = {agent.staged.version if agent.staged else None for agent in ranks}
    return versions.pop() if len(versions) == 1 else None


def evaluate(turn: Turn) -> None:
    """Begin a round if one is due; fail versions that waited too long."""
    endings.mark_again(turn)
    _note_stale_markers(turn)
    _note_waiting(turn)
    version = staged(turn.fleet)
    if version is not None and turn.fleet.round is None:
        _begin_if_due(turn, version)
    _fail_overdue(turn)


def _note_stale_markers(turn: Turn) -> None:
    fleet = turn.fleet
    if fleet.generation is None:
        return
    for seen in fleet.stable:
        if seen.generation not in (None, fleet.generation) and seen not in fleet.stale_said:
            fleet.stale_said.add(seen)
            turn.say(f"STABLE of step {seen.step} is of an earlier trainer ({seen.generation:x}); ignored", "warning")


def _note_waiting(turn: Turn) -> None:
    fleet = turn.fleet
    settled = fleet.memory.done | fleet.memory.failed.keys()
    for agent in fleet.trainers():
        if agent.staged is not None and agent.staged.version not in settled:
            fleet.waiting_since.setdefault(agent.staged.version, turn.now)


def _fail_overdue(turn: Turn) -> None:
    fleet = turn.fleet
    for version, since in list(fleet.waiting_since.items()):
        if fleet.round is not None and fleet.round.version == version:
            continue
        ready = staged(fleet) == version and is_stable(fleet, version)
        obstacle = rendezvous.obstacle(fleet)
        if ready and obstacle:
            endings.fail_version(turn, version, obstacle)
        elif turn.now >= since + (fleet.policy.join if ready else fleet.policy.staged):
            endings.fail_version(turn, version, f"after {turn.now - since:.0f} s: {waiting_for(fleet, version)}")


def waiting_for(fleet: Fleet, version: Version) -> str:
    """One clause: what a staged version waits for."""
    world = fleet.trainer_world() or 0
    here = {a.member.rank for a in fleet.trainers() if a.staged is not None and a.staged.version == version}
    lacking = [f"trainer/{rank}" for rank in range(world) if rank not in here]
    if lacking:
        return f"not STAGED by {', '.join(lacking[:8])}{' …' if len(lacking) > 8 else ''}"
    if not is_stable(fleet, version):
        return f"broadcasts/step_{version.step}/STABLE is missing"
    if fleet.unclosed:
        names = ", ".join(f"{writer} (round {pending.round})" for writer, pending in sorted(fleet.unclosed.items()))
        return f"writers that have not closed their grant and are not proved dead: {names}"
    if fleet.plan is None:
        misfits = [engine.misfit for engine in fleet.engines.values() if engine.misfit]
        if misfits:
            return f"an engine that fits: {misfits[0]}"
        late = [name for name in fleet.engines if not fleet.attached(name)]
        return f"engines that have not joined: {', '.join(late)}" if late else "the plan"
    late = [str(m) for m in fleet.plan.connects if not fleet.is_confirmed(m)]
    return f"agents that have not confirmed their edges: {', '.join(late[:8])}" if late else "the next attempt"


def _begin_if_due(turn: Turn, version: Version) -> None:
    fleet = turn.fleet
    if version in fleet.memory.failed or turn.now < fleet.retry_at.get(version, 0.0):
        return
    catch_up = version in fleet.memory.done
    # The STABLE of a committed version has COMMITTED beside it and is reported no more.
    wanted = version == fleet.memory.committed if catch_up else is_stable(fleet, version)
    if not wanted:
        return
    usable = list(fleet.usable())
    targets = [name for name in usable if not catch_up or fleet.version_of(name) != version]
    if not targets or fleet.plan is None or fleet.planning or fleet.unclosed:
        return
    ready = [n for n in targets if all(fleet.is_confirmed(a.member) for a in fleet.ranks_of(n))]
    if not all(fleet.is_confirmed(agent.member) for agent in fleet.trainers()) or not ready:
        return
    if len(ready) < len(targets) and turn.now < fleet.planned_at + fleet.policy.rendezvous:
        return
    if any(fleet.engines[name].calls for name in ready):
        return  # a probe is under way: its answer comes within its deadline
    if any(agent.status.window is not None for name in ready for agent in fleet.ranks_of(name)):
        return  # told to leave an earlier round; it will say Left, or leave at its own deadline
    begin(turn, version, ready, catch_up)
