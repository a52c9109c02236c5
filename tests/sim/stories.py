"""What happened in a simulated fleet, in lines that people read when a test fails."""

import msgspec
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, AgentSaid, CallDone, CallFailed, PlanReady
from weightsync.orchestrator.protocol.messages import Announce, Closed, Hello, Left, Ready, Staged, Verified


def brief(what: object) -> str:
    """One line of something that happened."""
    match what:
        case AgentSaid(member=member, message=message):
            return f"{member}: {_words(message)}"
        case AgentConnected(member=member, hello=hello):
            return f"{member}: {_words(hello)}"
        case AgentLost(member=member, reason=reason):
            return f"{member} is lost: {reason}"
        case CallDone(engine=engine, call=call, paused=paused):
            return f"{engine}: {call} done, paused {paused}"
        case PlanReady(number=number):
            return f"plan {number} is ready"
        case CallFailed(engine=engine, call=call, reason=reason):
            return f"{engine}: {call} FAILED: {reason}"
        case _:
            return str(what)


def _words(message: msgspec.Struct) -> str:
    kind = type(message).__name__
    match message:
        case Hello(incarnation=incarnation, trainer=trainer, engine=engine):
            return f"{kind} of {incarnation}: {_status(trainer or engine)}"
        case Left(round=name, status=status):
            return f"{kind} {name}: {_status(status)}"
        case Closed(round=name, peers=peers, final=final, error=error):
            ends = [f"{peer.peer} {peer.error or peer.bytes}" for peer in peers]
            return f"{kind} {name}{'' if final else ' so far'}: {', '.join(ends)} {error}"
        case Ready(failed=failed):
            return f"{kind}, but {failed}" if failed else kind
        case Staged(version=version, restaged=restaged):
            return f"{kind} {version} {restaged or ''}"
        case Announce():
            return kind
        case Verified(round=name):
            return f"{kind} {name}"
        case _:
            return str(message)


def _status(status: object) -> str:
    return str(status).partition("(")[2].rstrip(")").replace("Version(generation=", "v(").replace("RoundName", "")
