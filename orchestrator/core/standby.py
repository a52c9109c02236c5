"""Shadow engines, whose next version lands beside what they serve: how they land, and what their standby is good for.

A standby is believed when the digest that its worker told of it is the one that the journal holds as decided for that
version and that worker: whatever else lies there was never decided, or is of another staging of the same step.
"""

import msgspec
from weightsync.orchestrator.core.round.progress import KeptStandby
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.protocol.layout import Lands
from weightsync.orchestrator.protocol.messages import Verified
from weightsync.orchestrator.protocol.names import Digest, Version


def hex_digest(digest: Digest) -> str:
    """As the journal keeps it."""
    return f"{digest[0]:016x}{digest[1]:016x}"


def from_hex(text: str) -> Digest:
    """What ``hex_digest`` has written."""
    return int(text[:16], 16), int(text[16:], 16)


def lands(fleet: Fleet, engine: str) -> Lands:
    """How the engine's ranks land; ``live`` while none has announced. They agree, or the engine is a misfit."""
    return next((a.announce.layout.lands for a in fleet.ranks_of(engine) if a.announce is not None), "live")


def lands_because(fleet: Fleet, engine: str) -> str:
    """Why it lands so, as its first rank says it."""
    return next((a.announce.layout.lands_because for a in fleet.ranks_of(engine) if a.announce is not None), "")


def boundary(fleet: Fleet, engine: str) -> bool:
    """It may switch between two of its steps."""
    return all(a.announce.layout.boundary for a in fleet.ranks_of(engine) if a.announce is not None)


def disagreement(fleet: Fleet, engine: str) -> str:
    """How the engine's ranks land where they do not agree; empty where they do."""
    said = {a.member.rank: a.announce.layout.lands for a in fleet.ranks_of(engine) if a.announce is not None}
    if len(set(said.values())) < 2:
        return ""
    first = {mode: next(rank for rank, other in said.items() if other == mode) for mode in sorted(set(said.values()))}
    ranks = ", ".join(f"rank {rank} in {mode}" for mode, rank in first.items())
    return f"its ranks land in different modes ({ranks}). Fix: start all of them with the same WEIGHTSYNC_MODE"


def believed(fleet: Fleet, agent: ConnectedAgent) -> Version | None:
    """The version in this worker's standby, if it was decided with the very bytes that are there."""
    status = agent.status
    decided = fleet.memory.held.get(str(agent.member), ())
    return status.standby if (status.standby, hex_digest(status.standby_digest)) in decided else None


def beside(fleet: Fleet, engine: str) -> Version | None:
    """The version that all ranks of the engine have in their standby, believed."""
    held = {believed(fleet, agent) for agent in fleet.ranks_of(engine)}
    return held.pop() if len(held) == 1 else None


def kept(fleet: Fleet, engine: str, version: Version) -> KeptStandby | None:
    """What an attempt at ``version`` that was given up has left in the standby of all ranks of the engine, if each of
    them has verified it since, and nothing can have touched it."""
    known, ranks = fleet.engines[engine].kept, fleet.ranks_of(engine)
    if known is None or (known.version, known.restaged) != (version, fleet.memory.restaged.get(version, 0)):
        return None
    held = {agent.member: (agent.status.standby, agent.status.standby_digest) for agent in ranks}
    owed = {member: (version, digest) for member, (digest, _) in known.owed.items()}
    return known if held == owed and not fleet.tainted(engine) else None


def kept_verified(fleet: Fleet, agent: ConnectedAgent, message: Verified) -> None:
    """A worker has looked at what a round that is over has written to it."""
    engine = fleet.engines.get(agent.member.engine)
    known = engine.kept if engine is not None else None
    if known is not None and message.round == known.round and not message.error:
        agent.status = msgspec.structs.replace(
            agent.status, standby=known.version, standby_digest=message.digest
        )  # fmt: skip


def serves_on(fleet: Fleet, engine: str) -> bool:
    """It may serve while the next version lands: it holds the committed one, and so does its pair."""
    committed = fleet.memory.committed
    return committed is not None and all(
        lands(fleet, name) != "live" and fleet.version_of(name) == committed for name in fleet.unit(engine)
    )


def owed(fleet: Fleet, engine: str) -> bool:
    """A switch brings the engine to the committed version: all its ranks have that, live or in their standby."""
    mode, committed, current = lands(fleet, engine), fleet.memory.committed, fleet.round
    if mode == "live" or committed is None or not fleet.attached(engine) or engine in fleet.memory.holds:
        return False
    if mode == "copy" and fleet.tainted(engine):
        return False  # what has landed may have been written over since
    if current is not None and current.decided and current.version != committed:
        return False  # another one is about to be it
    if fleet.torn(engine) or fleet.version_of(engine) == committed:
        return False  # what is torn was torn by a switch: it is written anew
    return all(has(fleet, agent, committed) for agent in fleet.ranks_of(engine))


def has(fleet: Fleet, agent: ConnectedAgent, version: Version) -> bool:
    """The worker holds this version whole, live or in its standby."""
    live = agent.status.applied == version and not agent.status.torn
    return live or believed(fleet, agent) == version


def serves(fleet: Fleet, agent: ConnectedAgent, version: Version) -> bool:
    """Its live memory is ``version``, whole and at rest, and the journal knows the digest of that."""
    whole = agent.status.whole == version
    return whole and any(known == version for known, _ in fleet.memory.held.get(str(agent.member), ()))


def by_itself(fleet: Fleet, engine: str) -> bool:
    """It may switch while it serves: no other engine has to change with it."""
    return boundary(fleet, engine) and len(fleet.unit(engine)) == 1


def may_lend(fleet: Fleet, agent: ConnectedAgent) -> bool:
    """Whether a rank that writes to others in the round holds what it is granted to write, whole and at rest: what it
    serves or, where that is not committed yet, the standby that it has verified in this round."""
    current = fleet.round
    if current is None or current.catch_up:
        return current is not None and serves(fleet, agent, current.version)
    verified, status = current.verified.get(agent.member), agent.status
    return verified is not None and (status.standby, status.standby_digest) == (current.version, verified.digest)
