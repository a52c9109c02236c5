"""What is wrong with a report that came in time: the phase that waits for it believes it only if nothing is."""

from dataclasses import dataclass, field, replace
from typing import Final

from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.standby import hex_digest
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import Member, add_digests


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
        return Verdict(_between(current, current.failed[writer]))
    done = current.closed.get(writer, {})
    strangers = done.keys() - set(current.writers[writer])
    if strangers:
        names = sorted(map(str, strangers))[:8]
        return Verdict(Trouble(f"{writer} reports writes to {names}, which it was not granted", side(writer)))
    wrong: dict[str, Trouble] = {}
    for target in current.writers[writer]:
        if not current.has(target.engine) or target.engine in wrong:
            continue
        fault = _unwritten(current, writer, target, done.get(target)) or _unlike(current, target)
        if fault is not None:
            wrong[target.engine] = fault
    if wrong and current.wave:
        return Verdict(_between(current, next(iter(wrong.values()))))
    if wrong and len(wrong) == len(current.remaining()) > 1:
        # One writer that reaches no engine: what they have in common is the writer.
        first = next(iter(wrong.values()))
        return Verdict(Trouble(f"{writer} reaches none of {len(wrong)} engines: {first.reason}", "network"))
    return Verdict(engines=wrong)


def _between(current: Round, trouble: Trouble) -> Trouble:
    """What goes wrong between engines of a round is nobody's failure yet: in the next attempt the trainer writes."""
    return replace(trouble, retry=True) if current.wave else trouble


def _unwritten(current: Round, writer: Member, target: Member, sent: PeerTransfer | None) -> Trouble | None:
    if sent is None:
        final = writer in current.final
        return Trouble(f"{writer} says CLOSED and has not written to {target}", side(writer)) if final else None
    if sent.error:
        return Trouble(f"{writer} could not write to {target}: {sent.error}", "network")
    owed = current.plan_of(writer).flows.get((writer, target))
    if sent.bytes != owed:
        return Trouble(f"{writer} wrote {sent.bytes} bytes to {target}, the plan has {owed}", side(writer))
    return None


def whole(current: Round, engine: str) -> bool:
    """All that is owed to the engine was written, by writers that are done with it, and what it has written on was
    that."""
    ends = (
        _unwritten(current, writer, target, sent) if (sent := current.closed.get(writer, {}).get(target)) else "open"
        for writer, targets in current.writers.items()
        for target in targets
        if target.engine == engine
    )
    told = (member for member in current.ranks if engine in (member.engine, current.lenders.get(member.engine)))
    return not any(ends) and not any(_unlike(current, member) for member in told)


def _unlike(current: Round, target: Member) -> Trouble | None:
    """What was lent, once all of it is told, is what was decided: else the lender serves something else."""
    owed = current.lent.get(target)
    said = [current.closed.get(writer, {}).get(target) for writer, to in current.writers.items() if target in to]
    there = [sent for sent in said if sent is not None and not sent.error]
    if owed is None or len(there) < len(said):
        return None
    digest = add_digests(*(sent.digest for sent in there))
    lender = current.lenders[target.engine]
    was = "was decided" if current.catch_up else "it has verified"
    what = f"{lender} has lent {target} bytes of digest {hex_digest(digest)}, and {hex_digest(owed)} {was}"
    return Trouble(f"{what}: end {lender}, whose memory is not what it was", "engine") if digest != owed else None


def side(writer: Member) -> Fault:
    """Whose fault it is where a writer does wrong."""
    return "trainer" if writer.role == "trainer" else "engine"


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
        whose = "what was lent" if member in current.lent else "the slots'"
        return _of(member, Trouble(f"{member}: {what} differs from {whose} {slots}", "network"))
    return FINE


def left(fleet: Fleet, current: Round, member: Member) -> Verdict:
    """A worker that was let out with the version must hold it."""
    status = current.left.get(member)
    if status is None or status.whole == current.version:
        return FINE
    inside = ", inside of a round" if status.window is not None else ""
    held = f"holding {status.applied or 'no version'}{', torn' if status.torn else ''}{inside}"
    return _of(member, Trouble(f"{member} left the round {held}, not {current.version}", "engine"))


def _of(member: Member, trouble: Trouble) -> Verdict:
    return Verdict(engines={member.engine: trouble})
