"""What is wrong with a report that came in time: the phase that waits for it believes it only if nothing is."""

from dataclasses import dataclass, field
from typing import Final

from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.standby import hex_digest
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.names import Member


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is to blame: for everybody's failure (``whole``), or each engine for its own."""

    whole: Trouble | None = None
    engines: dict[str, Trouble] = field(default_factory=dict)


FINE: Final = Verdict()


def nothing(fleet: Fleet, current: Round, member: Member) -> Verdict:
    """For phases that have nothing to compare a report with."""
    return FINE


def closed(fleet: Fleet, current: Round, writer: Member) -> Verdict:
    """A writer must have written all that it owes to each peer that it is done with, and nothing to anybody else."""
    if writer in current.failed:
        return Verdict(current.failed[writer])
    done = current.closed.get(writer, {})
    strangers = done.keys() - set(current.writers[writer])
    if strangers:
        names = sorted(map(str, strangers))[:8]
        return Verdict(Trouble(f"{writer} reports writes to {names}, which it was not granted", "trainer"))
    wrong: dict[str, Trouble] = {}
    for target in current.writers[writer]:
        if not current.has(target.engine) or target.engine in wrong:
            continue
        fault = _unwritten(fleet, writer, target, done.get(target), writer in current.final)
        if fault is not None:
            wrong[target.engine] = fault
    if wrong and len(wrong) == len(current.remaining()) > 1:
        # One writer that reaches no engine: what they have in common is the writer.
        first = next(iter(wrong.values()))
        return Verdict(Trouble(f"{writer} reaches none of {len(wrong)} engines: {first.reason}", "network"))
    return Verdict(engines=wrong)


def _unwritten(fleet: Fleet, writer: Member, target: Member, sent: PeerTransfer | None, final: bool) -> Trouble | None:
    if sent is None:
        return Trouble(f"{writer} says CLOSED and has not written to {target}", "trainer") if final else None
    if sent.error:
        return Trouble(f"{writer} could not write to {target}: {sent.error}", "network")
    owed = fleet.plan.flows.get((writer, target)) if fleet.plan is not None else None
    if sent.bytes != owed:
        return Trouble(f"{writer} wrote {sent.bytes} bytes to {target}, the plan has {owed}", "trainer")
    return None


def verified(fleet: Fleet, current: Round, member: Member) -> Verdict:
    """A worker must hold exactly what all its writers say they sent."""
    report = current.verified.get(member)
    if report is None:
        return FINE
    if report.error:
        return _of(
            member, Trouble(f"{member} could not verify: {report.error}", report.fault or "engine", report.retry)
        )
    digest, size = current.expected[member]
    if report.digest != digest or report.bytes != size:
        # Slots and memory are each digested where they lie: what differs came from between them.
        where = "what has landed" if current.engines[member.engine].shadow else "live memory"
        what = f"digest of {where} {hex_digest(report.digest)} over {report.bytes} bytes"
        slots = f"{hex_digest(digest)} over {size}"
        return _of(member, Trouble(f"{member}: {what} differs from the slots' {slots}", "network"))
    return FINE


def left(fleet: Fleet, current: Round, member: Member) -> Verdict:
    """A worker that was let out with the version must hold it."""
    status = current.left.get(member)
    if status is None or (status.applied == current.version and not status.torn):
        return FINE
    held = f"holding {status.applied or 'no version'}{', torn' if status.torn else ''}"
    return _of(member, Trouble(f"{member} left the round {held}, not {current.version}", "engine"))


def _of(member: Member, trouble: Trouble) -> Verdict:
    return Verdict(engines={member.engine: trouble})
