"""Disasters: each happens to a world every few seconds, for as long as it is disturbed, and is mended afterwards."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from faults import CHANCES
from weightsync.orchestrator.core.events import AbortAsked, Call, RetryAsked, RollbackAsked
from world import World

PATH_SECONDS: Final = 15.0
"""After which an engine whose path is gone for good has another endpoint, and a round of its own behind it."""


def _connections(world: World) -> None:
    """A connection ends, and both sides know."""
    agent = world.rng.choice(world.agents())
    if agent.link is not None and agent.alive and not agent.stopped:
        world.faults.hurt(world.hurt_by(agent))
        agent.link.closed_by_agent("connection reset")


def _half_open(world: World) -> None:
    """An agent says Hello anew before the daemon has noticed the end of its connection."""
    agent = world.rng.choice(world.agents())
    if agent.link is not None and agent.alive and not agent.stopped:
        world.faults.hurt(world.hurt_by(agent))
        world.note(f"{agent.member} resets its connection and only it knows")
        agent.link.reset_half()


def _partitions(world: World) -> None:
    """Nothing passes between an agent and the daemon for a while."""
    agent = world.rng.choice(world.agents())
    seconds = world.rng.uniform(1.0, 10.0)
    if agent.link is not None and agent.alive:
        world.later(seconds, world.faults.begin(world.hurt_by(agent)))
        world.note(f"{agent.member} is cut off for {seconds:.1f} s")
        agent.unreachable_until = world.now + seconds
        agent.link.go_silent()


def _daemons(world: World) -> None:
    world.kill_daemon()


def _engines(world: World) -> None:
    name, seconds = world.rng.choice(list(world.servers)), world.rng.choice((0.0, 3.0))
    world.kill_engine(name, seconds, silently=world.rng.random() < 0.3)


def _trainers(world: World) -> None:
    world.kill_trainer(silently=world.rng.random() < 0.3)


def _sizes(world: World) -> None:
    """The trainer returns with another number of ranks."""
    world.kill_trainer(size=world.rng.choice((1, 2, 3)), silently=world.rng.random() < 0.3)


def _zombies(world: World) -> None:
    """The trainer is stopped, a second one starts on another host, and then the first one goes on for a while."""
    first = world.job
    if not first.whole or world.two_trainers:
        return
    world.two_trainers = True
    world.note("the trainer is stopped and will wake up beside another one")
    end = world.faults.begin(world.servers)
    for rank in first.ranks:
        rank.stop()
    wakes, dies = world.rng.uniform(1.0, 12.0), world.rng.uniform(0.1, 4.0)

    def wake() -> None:
        world.note("the first trainer goes on")
        for rank in first.ranks:
            rank.thaw()

    def die() -> None:
        world.two_trainers = False
        first.die()
        world.declare_dead(rank.member for rank in first.ranks)
        end()

    world.later(world.rng.uniform(0.5, 5.0), lambda: world.start_trainer(host=f"host {world.next_id()}"))
    world.later(max(wakes, 5.0), wake)
    world.later(max(wakes, 5.0) + dies, die)


def _operators(world: World) -> None:
    """Somebody asks for something, by name of an engine or for all."""
    daemon, name = world.daemon, world.rng.choice(world.members())
    if daemon is None or not daemon.alive or world.held & {*world.unit(name)}:
        return
    asked = world.rng.choice(("hold", "drain", "forget", "maintenance", "abort", "retry"))
    world.note(f"an operator asks for {asked} ({name})")
    if asked in ("hold", "drain", "forget"):
        {"hold": world.hold, "drain": world.drain, "forget": world.forget}[asked](name, world.rng.uniform(1.0, 10.0))
    elif asked == "maintenance":
        world.later(world.rng.uniform(1.0, 8.0), world.maintain())
    else:
        world.faults.hurt(world.servers)
        kind = AbortAsked if asked == "abort" else RetryAsked
        daemon.post(kind(daemon.next_id(), "operator", ""))


def _rollbacks(world: World) -> None:
    """An operator asks for the version before, whether or not it can be had."""
    daemon = world.daemon
    if daemon is not None and daemon.alive:
        world.note("an operator asks for a rollback")
        world.faults.hurt(world.servers)
        daemon.post(RollbackAsked(daemon.next_id(), "operator", "", None))


def _frozen_engines(world: World) -> None:
    """SIGSTOP of a whole engine or of one of its workers."""
    server = world.servers[world.rng.choice(list(world.servers))]
    victims = server.processes() if world.rng.random() < 0.6 else [world.rng.choice(server.workers)]
    victims = [victim for victim in victims if not victim.stopped]
    seconds = world.rng.uniform(0.3, 12.0)
    if server.alive and victims:
        world.note(f"{server.name} is stopped for {seconds:.1f} s")
        end = world.faults.begin([server.name])
        for victim in victims:
            victim.stop()

        def thaw() -> None:
            end()
            world.note(f"{server.name} is thawed")
            for victim in victims:
                victim.thaw()
            world.judge.look(server.name)

        world.later(seconds, thaw)


def _frozen_trainers(world: World) -> None:
    """SIGSTOP of a trainer rank."""
    rank = world.rng.choice(world.job.ranks)
    seconds = world.rng.uniform(0.3, 8.0)
    if rank.alive and not rank.stopped:
        world.note(f"{rank.member} is stopped for {seconds:.1f} s")
        end = world.faults.begin(world.servers)
        rank.stop()

        def thaw() -> None:
            end()
            world.note(f"{rank.member} is thawed")
            rank.thaw()

        world.later(seconds, thaw)


def _cuts(world: World) -> None:
    """An engine's admin routes cannot be reached for a while; its agents stay connected."""
    name, seconds = world.rng.choice(list(world.servers)), world.rng.uniform(0.5, 10.0)
    if name not in world.faults.cut:
        world.note(f"the routes of {name} are cut off for {seconds:.1f} s")
        end = world.faults.begin([name])
        world.faults.cut.add(name)

        def mend() -> None:
            end()
            world.faults.cut.discard(name)

        world.later(seconds, mend)


def _edges(world: World) -> None:
    """Nothing can be written into an engine for a while."""
    name, seconds = world.rng.choice(list(world.servers)), world.rng.uniform(0.5, 10.0)
    if name not in world.faults.broken_edges:
        world.note(f"edges to {name} are broken for {seconds:.1f} s")
        end = world.faults.begin([name])
        world.faults.broken_edges.add(name)

        def mend() -> None:
            end()
            world.faults.broken_edges.discard(name)

        world.later(seconds, mend)


def _paths(world: World) -> None:
    """What is written to a worker hangs, for a while or for as long as it has the endpoint that it has."""
    name, seconds = world.rng.choice(list(world.servers)), world.rng.uniform(0.5, 10.0)
    hit = [worker for worker in world.servers[name].workers if world.rng.random() < 0.7]
    ends = {worker.endpoint for worker in hit if worker.alive} - world.faults.gone_paths
    if ends:
        world.note(f"the paths to {sorted(ends)} are gone")
        end = world.faults.begin([name])
        world.faults.gone_paths |= ends

        def mend() -> None:
            end()
            world.faults.gone_paths -= ends

        if world.rng.random() < 0.5:
            world.later(seconds, mend)
        else:
            world.later(PATH_SECONDS, end)


def _slow_disk(world: World) -> None:
    """The journal's commits take long for a while."""
    if world.disk.seconds < 0.01:
        end = world.faults.begin(world.servers)
        world.disk.seconds = world.rng.choice((0.05, 0.3, 1.5))

        def mend() -> None:
            end()
            world.disk.seconds = 0.002

        world.later(world.rng.uniform(1.0, 6.0), mend)


def _ill(world: World) -> None:
    """One engine has something that does not pass by itself, until its processes are replaced or it is healed."""
    server = world.servers[world.rng.choice(list(world.servers))]
    what = world.rng.choice(ILLNESSES)
    if server.alive and not server.ill and not any(worker.ill for worker in server.workers):
        world.note(f"{server.name} falls ill: {what}")
        make_ill(world, server.name, what)


WORKERS_ILLNESSES: Final = ("digest", "silent", "switch", "audit", "audit hangs", "late audit")

ILLNESSES: Final = (
    "digest", "silent", "pause 500", "pause hangs", "update 500", "update hangs", "finish 500", "finish hangs",
    "resume 500", "resume hangs", "switch 500", "switch hangs", "switch", "audit", "audit hangs", "late audit",
)  # fmt: skip


def make_ill(world: World, name: str, what: str) -> Callable[[], None]:
    """``what``: one of ILLNESSES. What is returned heals it."""
    server = world.servers[name]
    end = world.faults.begin([name])
    if what in WORKERS_ILLNESSES:
        server.workers[-1].ill = what
    else:
        call, how = what.split()
        server.ill[Call(call)] = how

    def heal() -> None:
        end()
        if what == "audit hangs" and server.alive:
            world.kill_engine(name)  # a thread that hangs goes with its process
        server.ill = {}
        for worker in server.workers:
            worker.ill = ""

    world.healing.append(heal)
    return heal


def _configurations(world: World) -> None:
    """The daemon is restarted with one engine more, or one less, whose processes end."""
    _one_more_or_less(world)
    world.kill_daemon(for_seconds=0.5)


def _one_more_or_less(world: World) -> None:
    if set(world.servers) - set(world.configured[-1:]) and world.configured and world.rng.random() < 0.5:
        world.remove_engine(world.configured[-1])
    elif len(world.configured) < 4:
        name = f"e{len(world.configured)}"
        world.add_engine(name)
        world.faults.hurt([name])


def _lists(world: World) -> None:
    """The daemon reads its configuration again: one engine more, or one less, whose processes end."""
    _one_more_or_less(world)
    world.configure_anew()


def _joins(world: World) -> None:
    """An engine, or a pair, comes by itself; or one of them ends for good, or is another process elsewhere."""
    free = [name for name in ("a0", "a1", "a2", "a3") if name not in world.applicants]
    what = world.rng.choice(("one", "pair", "end", "move"))
    if what in ("one", "pair") and len(free) >= (2 if what == "pair" else 1):
        world.note(f"{what} of {free} comes by itself")
        world.bring_applicants(*free[: 2 if what == "pair" else 1])
    elif world.applicants and len(world.servers) > 1:
        name = world.rng.choice(sorted(world.applicants))
        alone = world.unit(name) == [name]
        world.note(f"{name} ends, {what}")
        world.end_applicant(name, silently=world.rng.random() < 0.3)
        if what == "move" and alone:
            world.bring_applicants(name)


DISTURBANCES: Final[Mapping[str, tuple[Callable[[World], None], float]]] = {
    "connections": (_connections, 4.0),
    "half-open": (_half_open, 5.0),
    "partitions": (_partitions, 9.0),
    "daemons": (_daemons, 12.0),
    "engines": (_engines, 12.0),
    "trainers": (_trainers, 15.0),
    "sizes": (_sizes, 20.0),
    "frozen engines": (_frozen_engines, 10.0),
    "frozen trainers": (_frozen_trainers, 12.0),
    "cuts": (_cuts, 10.0),
    "edges": (_edges, 10.0),
    "paths": (_paths, 8.0),
    "slow disk": (_slow_disk, 10.0),
    "ill": (_ill, 30.0),
    "zombies": (_zombies, 30.0),
    "operators": (_operators, 8.0),
    "rollbacks": (_rollbacks, 6.0),
    "configurations": (_configurations, 30.0),
    "lists": (_lists, 12.0),
    "joins": (_joins, 6.0),
}
"""What happens, and after how many seconds on average it happens again."""

KINDS: Final = (*DISTURBANCES, *CHANCES, "waiting wires")


def disturb(world: World, kinds: Iterable[str], until: float) -> None:
    """Have these kinds of KINDS happen until then; afterwards everything is mended."""
    wanted = set(kinds)
    world.faults.kinds = frozenset(wanted & CHANCES.keys())
    world.faults.waiting_wires = "waiting wires" in wanted

    def again(happen: Callable[[World], None], mean: float) -> None:
        if world.now < until:
            happen(world)
            world.later(world.rng.expovariate(1 / mean), lambda: again(happen, mean))

    for kind in sorted(wanted & DISTURBANCES.keys()):
        happen, mean = DISTURBANCES[kind]
        world.later(world.rng.expovariate(1 / mean), lambda h=happen, m=mean: again(h, m))
    world.at(until, lambda: _mend(world))


def _mend(world: World) -> None:
    """What chance does ends at once; what was to last a while ends by itself; illnesses are healed."""
    world.note("all that is wrong is mended from now on")
    world.faults.kinds = frozenset()
    for heal in world.healing:
        heal()
    world.healing = []
