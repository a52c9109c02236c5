"""The line that history keeps of a round: who, how it ended, how much, and where the time went."""

from collections.abc import Iterable, Iterator
from typing import get_args

from weightsync.orchestrator.core.records import RoundEnded, Taint
from weightsync.orchestrator.core.round.links import used
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.core.round.waits import SHOWN
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.names import Member, Role


def summary(turn: Turn, current: Round, outcome: str) -> RoundEnded:
    """Of the round as it stands now. ``outcome``: committed or failed."""
    peers = [peer for _, peer in _moved(current)]
    links = used(current, turn.fleet.link_rates)
    turn.fleet.links = links or turn.fleet.links
    open_grants = {w: p for (w, name), p in turn.fleet.unclosed.items() if name == current.name}
    return RoundEnded(
        round=current.name,
        version=current.version,
        attempt=current.attempt,
        engines=tuple(current.engines),
        left_out=tuple(name for name, progress in current.engines.items() if progress.left_out),
        outcome=outcome,
        reason=current.reason or _left_out_because(current),
        fault=current.trouble.fault,
        bytes=sum(peer.bytes for peer in peers),
        descriptors=sum(peer.descriptors for peer in peers),
        times={name: round(seconds, 6) for name, seconds in _times(turn, current).items()},
        unclosed={str(writer): taint_of(writer, pending) for writer, pending in open_grants.items()},
        kind="rollback" if current.rollback else "catch-up" if current.catch_up else "publish",
        modes={name: progress.lands for name, progress in current.engines.items()},
        stall_seconds={n: round(_stall(p), 6) for n, p in current.engines.items() if p.resumed},
        lenders=current.lenders,
        trainer_bytes=sum(peer.bytes for writer, peer in _moved(current) if writer.role == "trainer"),
        links=links,
        trace=current.publish,
    )


def _left_out_because(current: Round) -> str:
    """Why engines were left out of a round that went on without them; empty where none was."""
    because: dict[str, list[str]] = {}
    for name, progress in current.engines.items():
        if why := progress.left_out.removeprefix(f"{name}: "):
            because.setdefault(why, []).append(name)
    told = []
    for why, names in because.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        told.append(f"{', '.join(names[:SHOWN])}{more}: {why}")
    return "; ".join(told)


def _moved(current: Round) -> Iterator[tuple[Member, PeerTransfer]]:
    """What each writer says that it has moved."""
    return ((writer, peer) for writer, closed in current.closed.items() for peer in closed.values())


def taint_of(writer: Member, pending: Unclosed) -> Taint:
    """An open grant as the journal keeps it."""
    targets = {str(target): incarnation for target, incarnation in pending.targets.items()}
    return Taint(pending.incarnation, pending.host, pending.boot, targets, writer.engine)


def _times(turn: Turn, current: Round) -> dict[str, float]:
    """Seconds by phase, ``applying`` until the last worker was out; ``stall``, ``http``, ``total`` of the whole.

    And of each step the slowest rank's own figure. ``switch``, ``audit``: the longest of an engine; ``skew``: from the
    first engine that served the version to the last one.
    """
    times = dict(current.times)
    times[current.phase.value] = times.get(current.phase.value, 0.0) + turn.now - current.phase_began
    engines, verified = current.engines.values(), current.verified.values()
    served = [engine for engine in engines if engine.resumed]
    if served:
        times["stall"] = max(_stall(engine) for engine in served)
        times["skew"] = max(engine.served_at for engine in served) - min(engine.served_at for engine in served)
    times["switch"] = _longest(engine.switch_seconds for engine in engines)
    times["audit"] = _longest(engine.audit_seconds for engine in engines)
    times["applying"] = _longest(engine.applied_at - current.switched_at for engine in engines if engine.finishing)
    # Entering and leaving the update call is one HTTP call, too, but its answer waits for the round in between.
    live = [engine for engine in engines if engine.finishing and not engine.shadow]
    leaving = _longest(engine.applied_at - current.switched_at for engine in live)
    times["http"] = _longest(engine.http_seconds for engine in engines) + times.get("quiescing", 0.0) + leaving
    times["total"] = turn.now - current.began
    times["wire"] = sum(  # what engines write to engines comes after what the trainer writes
        _longest(peer.seconds for writer, peer in _moved(current) if writer.role == role) for role in get_args(Role)
    )
    times["apply"] = _longest(report.apply_seconds for report in verified)
    times["digest"] = _longest(report.digest_seconds for report in verified)
    staged = [agent.staged for agent in turn.fleet.trainers() if agent.staged is not None]
    times["convert"] = _longest(report.convert_seconds for report in staged)
    times["slot_digest"] = _longest(report.digest_seconds for report in staged)
    return times


def _stall(engine: Progress) -> float:
    """How long it took no step: from its pause on, or for the switch alone."""
    return engine.resumed_at - engine.paused_at if engine.pausing else engine.switch_seconds


def _longest(seconds: Iterable[float]) -> float:
    return max(seconds, default=0.0)
