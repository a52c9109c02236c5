"""Relays: in a round, engines take the version from another one of it that has verified it (``fan_out: peers``).

Of engines that hold the same boxes, rank by rank, one is the *seed*: the trainer writes to it alone. Once its standby
is verified it writes that to the others; nobody serves it before the decision, as ever. Engines that land ``live``
stand still while they are written to, and must not wait for that: with one of them in the round the trainer writes to
all.
"""

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.round.feed import Feed
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Member, RoundName


def wanted(fleet: Fleet, now: float) -> dict[str, str]:
    """Engine → its seed, for rounds to come; nothing without a plan of the trainer's, by which seeds are written to.

    A seed stays one for as long as it can, and nobody has another one than the others of its kind.
    """
    present = fleet.feed.lenders if fleet.feed is not None and fleet.feed.version is None else {}
    if fleet.policy.fan_out != "peers" or fleet.plan is None or any(_is_open(fleet, key) for key in fleet.unclosed):
        return {}
    if fleet.planning:  # nobody knows yet whose edges will be others
        known = [name for name in fleet.engines if all(a.member in fleet.plan.connects for a in fleet.ranks_of(name))]
        return {name: seed for name, seed in present.items() if name in known and seed in known}
    kinds: dict[tuple[bytes, ...], list[str]] = {}
    for name in fleet.usable():
        if _takes_part(fleet, name):
            kinds.setdefault(tuple(agent.contents for agent in fleet.ranks_of(name)), []).append(name)
    found: dict[str, str] = {}
    for alike in kinds.values():
        able = [name for name in alike if all(a.announce and a.announce.lends_name for a in fleet.ranks_of(name))]
        seed = next((name for name in able if name in present.values()), able[0] if able else "")
        for name in alike if seed else ():
            until, _ = fleet.passed_over.get((name, seed), (now, ""))
            if name != seed and now >= until:
                found[name] = seed
    return found


def _is_open(fleet: Fleet, grant: tuple[Member, RoundName]) -> bool:
    """A rank that is here has not closed what it lent in a round before: it is told how its peers are reached now, and
    in no relay it would hear of."""
    member, _ = grant
    writer = fleet.agents.get(member) if member.role == "inference" else None
    return writer is not None and writer.hello.incarnation == fleet.unclosed[grant].incarnation


def _takes_part(fleet: Fleet, name: str) -> bool:
    memory, ranks = fleet.memory, fleet.ranks_of(name)
    kept_out = name in memory.holds or name in memory.drains or name in memory.forgotten_engines
    usable = not kept_out and not fleet.engines[name].failures and standby.lands(fleet, name) != "live"
    alike = usable and all(agent.contents and fleet.is_confirmed(agent.member) for agent in ranks)
    return alike and not fleet.tainted(name)


def landed_by(fleet: Fleet, lenders: dict[str, str]) -> dict[Member, Connect]:
    """By which Connect each rank of a seed is written to."""
    assert fleet.plan is not None
    seeds = [agent.member for name in dict.fromkeys(lenders.values()) for agent in fleet.ranks_of(name)]
    return {member: fleet.plan.connects[member] for member in seeds}


def ready(fleet: Fleet, engines: list[str], now: float) -> dict[str, str]:
    """Which of the engines of a round take from which other one of them; none where its edges are not ready."""
    feed = fleet.feed
    if feed is None or feed.version is not None or any(standby.lands(fleet, name) == "live" for name in engines):
        return {}
    return {
        name: seed
        for name, seed in wanted(fleet, now).items()
        if name in engines and seed in engines and not _late(fleet, feed, name, seed) and not _dead(fleet, name, seed)
    }


def awaited(fleet: Fleet, now: float) -> str:
    """Whose edges of the relay are not known to be ready or dead; empty when all are, or there is none."""
    feed = fleet.feed
    if feed is None or feed.version is not None:
        return ""
    return next((name for name, seed in wanted(fleet, now).items() if _late(fleet, feed, name, seed)), "")


def _late(fleet: Fleet, feed: Feed, name: str, seed: str) -> bool:
    ranks = [agent.member for each in (name, seed) for agent in fleet.ranks_of(each)]
    plan = feed.plan if feed.lenders.get(name) == seed else None
    return plan is None or not all(fleet.is_confirmed(member, plan) for member in ranks)


def _dead(fleet: Fleet, name: str, seed: str) -> bool:
    unlent = (peer.engine == name for agent in fleet.ranks_of(seed) for peer in agent.unlent)
    return any(unlent) or any(agent.unrelayed for agent in fleet.ranks_of(name))
