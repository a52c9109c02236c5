"""Engines that lend: each serves the committed version, whole, and writes it to engines that catch up to it.

Who borrows holds the same boxes of the same tensors, rank by rank. So the journal knows, by what it has decided for the
lender, which digest the borrower must have, and nobody is believed for what he says that he sent.
"""

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.messages import Hello
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName


def why_not(fleet: Fleet, name: str) -> str:
    """Why the engine cannot lend the committed version; empty when it can."""
    memory, ranks = fleet.memory, fleet.ranks_of(name)
    if not fleet.attached(name):
        return f"{name} is not all there"
    if memory.committed is None or not all(standby.serves(fleet, agent, memory.committed) for agent in ranks):
        return f"{name} does not serve {memory.committed}"
    if name in memory.holds or name in memory.drains or name in memory.forgotten_engines:
        return f"the operator has {name} held or drained"
    if fleet.tainted(name):
        return f"a writer may still reach {name}"
    return "" if all(a.announce is not None and a.announce.lends_name for a in ranks) else f"{name} cannot write"


def decided(fleet: Fleet, engine: str, rank: int) -> Digest:
    """What the journal has decided that this rank holds of the committed version; NO_BYTES where it does not know."""
    known = dict(fleet.memory.held.get(str(Member("inference", engine, rank)), ()))
    committed = fleet.memory.committed
    return standby.from_hex(known[committed]) if committed in known else NO_BYTES


def lender_of(fleet: Fleet, engine: str, now: float) -> str | None:
    """Who lends to the engine: the first that can, and of which something may come."""
    wanted = [agent.contents for agent in fleet.ranks_of(engine)]
    if not all(wanted):
        return None
    for name in fleet.engines:
        until, _ = fleet.passed_over.get((engine, name), (now, ""))
        alike = name != engine and now >= until and [agent.contents for agent in fleet.ranks_of(name)] == wanted
        if alike and not why_not(fleet, name):
            return name
    return None


def open_rounds(hello: Hello) -> tuple[RoundName, ...]:
    """Of the grants that this process says it has not closed."""
    if hello.trainer is not None:
        return hello.trainer.open_rounds
    return hello.engine.lending if hello.engine is not None else ()
