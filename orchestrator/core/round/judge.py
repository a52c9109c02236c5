"""What is wrong with a report that came in time: the phase that waits for it believes it only if nothing is."""

from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.state import Round
from weightsync.orchestrator.protocol.names import Digest, Member


def nothing(current: Round, member: Member) -> Trouble | None:
    """For phases that have nothing to compare a report with."""
    return None


def closed(current: Round, member: Member) -> Trouble | None:
    """A writer must have written all that it was granted, to nobody else."""
    report = current.closed.get(member)
    if report is None:
        return None
    if report.error:
        return Trouble(f"{member} could not write: {report.error}", report.fault or "trainer", report.retry)
    strangers = {sent.peer for sent in report.peers} - set(current.writers[member])
    if strangers:
        names = sorted(map(str, strangers))
        return Trouble(f"{member} reports writes to {names}, which it was not granted", "trainer")
    return None


def verified(current: Round, member: Member) -> Trouble | None:
    """A worker's live memory must hold exactly what all its writers say they sent."""
    report = current.verified.get(member)
    if report is None:
        return None
    if report.error:
        return Trouble(f"{member} could not verify: {report.error}", report.fault or "engine", report.retry)
    digest, size = current.expected[member]
    if report.digest != digest or report.bytes != size:
        return Trouble(
            f"{member}: digest of live memory {_hex(report.digest)} over {report.bytes} bytes differs from "
            f"the slots' {_hex(digest)} over {size} bytes",
            "network",  # slots and memory are each digested where they lie: what differs came from between them
        )
    return None


def _hex(digest: Digest) -> str:
    return f"{digest[0]:016x}{digest[1]:016x}"
