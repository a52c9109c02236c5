"""Engines that make themselves members: which may, and when they are members no longer.

One that is admitted is a member as any other, by name; it says again and again that it is there. It leaves when it is
neither heard nor connected for a while, sooner where its processes are plainly gone, and comes back as it came: leaving
costs it nothing but a catch-up.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import urlsplit

from weightsync.orchestrator.core.events import EngineApplied
from weightsync.orchestrator.core.membership import roster
from weightsync.orchestrator.core.policy import Admission, Policy
from weightsync.orchestrator.core.records import EngineAdmitted, EngineLeft
from weightsync.orchestrator.core.state import EngineState, Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.application import Applicant, Application, is_host_name

SHOWN: Final = 8
"""Patterns or names that a refusal names."""

_PORTS: Final = {"http": 80, "https": 443}


def host_of(url: str) -> str:
    """The host that ``url`` names, in lower case; an address without brackets."""
    return urlsplit(url).hostname or ""


def place_of(url: str) -> tuple[str, int | None, str]:
    """Host, port and path of ``url``: what two URLs of one server have in common."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")


def may_be_at(admission: Admission, host: str) -> bool:
    """Whether engines may be on ``host``: a name by the patterns of names, an address by the networks."""
    if is_host_name(host):
        return any(fnmatchcase(host, pattern) for pattern in admission.host_names)
    return _within(host, admission.networks)


def may_speak_for_others(admission: Admission, address: str) -> bool:
    """Whether who comes from ``address`` may say where an engine is that is not there: it has several addresses, or a
    proxy hides it."""
    return _within(address, (*admission.networks, *admission.proxies))


def plain(address: str) -> str:
    """The address without what sockets add: an IPv4 one within an IPv6 one, a zone. What is none stays as it is."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str((isinstance(found, IPv6Address) and found.ipv4_mapped) or found)


def _within(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    try:
        found = ip_address(plain(address))
    except ValueError:
        return False  # also a number in a notation that only some resolvers read
    return any(found in network for network in networks)


# -------------------------------------------------------------------------------------------------------- who may come
def objection(fleet: Fleet, application: Application, now: float) -> str:
    """Why the application is refused: field, value and fix; empty where it is not."""
    engine, memory = application.engine, fleet.memory
    if application.run_id != fleet.policy.run_id:
        return (
            f"run_id {application.run_id!r}: this daemon serves run {fleet.policy.run_id!r}. Fix: name that run, or "
            "the daemon of the other one"
        )
    if unfit := _unfit(fleet.policy, engine):
        return unfit
    if (over := memory.forgotten_engines.get(engine.name)) is not None:
        return f"name {engine.name!r} was forgotten ({over}). Fix: release {engine.name} makes it a member again"
    if engine.pair and engine.role == "both":
        return f"role 'both' in pair {engine.pair!r}. Fix: say whether it is the pair's prefill or decode engine"
    return _taken(fleet, engine, now) or _full(fleet, engine)


def _unfit(policy: Policy, engine: Applicant) -> str:
    """Why the configuration does not let this engine be a member by itself."""
    admission = policy.admission
    if admission is None:
        return (
            f"name {engine.name!r}: this daemon takes in only the engines that its configuration names. Fix: set "
            "engines_admit, or list the engine in engines"
        )
    if not any(fnmatchcase(engine.name, pattern) for pattern in admission.names):
        return (
            f"name {engine.name!r} fits none of engines_admit.names ({_listed(admission.names)}). Fix: name the engine "
            "otherwise, or add a pattern"
        )
    for url in engine.urls:
        if not may_be_at(admission, host_of(url)):
            hosts = [*map(str, admission.networks), *admission.host_names]
            return (
                f"url {url!r}: its host is in none of engines_admit.hosts ({_listed(hosts)}). Fix: give the URL by an "
                "address or a name that is, or add the host"
            )
    places = {place_of(url) for url in engine.urls}
    if len(places) < len(engine.urls):
        return f"urls {_listed(engine.urls)}: one server is named twice. Fix: name each once"
    for other in policy.engines:
        if other.name == engine.name:
            return f"name {engine.name!r}: the configuration lists that engine. Fix: name this one otherwise"
        if places & set(map(place_of, other.servers)):
            return (
                f"url {engine.urls[0]!r}: the configuration lists {other.name} there. Fix: give this engine's own URL, "
                "or do not let a listed engine apply"
            )
    return ""


def _taken(fleet: Fleet, engine: Applicant, now: float) -> str:
    """Another engine that lives has the name or a server of this one."""
    known = fleet.memory.admitted.get(engine.name)
    if known is None and engine.name in fleet.engines:
        return f"name {engine.name!r}: it has left within a round that is not over. Fix: apply again"
    if known is not None and _places(known) != _places(engine) and _lives(fleet, engine.name, now):
        return (
            f"name {engine.name!r}: {_listed(known.urls)} has it, and lives. Fix: give each engine a name of its own; "
            "one that took the other's place is taken in when that is gone"
        )
    for other in _neighbours(fleet, engine):
        if _lives(fleet, other, now):
            return f"url {engine.urls[0]!r}: {other} is there, and lives. Fix: give this engine's own URL"
    return ""


def _full(fleet: Fleet, engine: Applicant) -> str:
    admission, memory = fleet.policy.admission, fleet.memory
    assert admission is not None
    others = memory.admitted.keys() - memory.forgotten_engines.keys() - {engine.name, *_neighbours(fleet, engine)}
    if engine.name in memory.admitted or len(others) < admission.at_most:
        return ""
    return (
        f"name {engine.name!r}: there are {len(others)} such engines already, and engines_admit.at_most is "
        f"{admission.at_most}. Fix: raise it, or forget one that is gone"
    )


def _neighbours(fleet: Fleet, engine: Applicant) -> list[str]:
    """Engines of other names that were admitted with one of these servers, and are not forgotten."""
    places, memory = _places(engine), fleet.memory
    return [
        name
        for name, other in memory.admitted.items()
        if name != engine.name and name not in memory.forgotten_engines and places & _places(other)
    ]


def _places(engine: Applicant) -> set[tuple[str, int | None, str]]:
    return set(map(place_of, engine.urls))


def _lives(fleet: Fleet, name: str, now: float) -> bool:
    engine, admission = fleet.engines.get(name), fleet.policy.admission
    if engine is None or admission is None:
        return False
    in_round = fleet.round is not None and fleet.round.concerns(name)
    return in_round or bool(engine.ranks) or now < engine.heard + admission.leave


def _listed(texts: Iterable[str]) -> str:
    found = list(texts)
    return ", ".join(found[:SHOWN]) + (" …" if len(found) > SHOWN else "")


# ------------------------------------------------------------------------------------------------------- who is there
def applied(turn: Turn, event: EngineApplied) -> None:
    """Take the engine in, or hear that it is there. Whoever posts this has told it of an objection."""
    fleet, engine = turn.fleet, event.application.engine
    if objection(fleet, event.application, turn.now):
        return
    known = fleet.memory.admitted.get(engine.name)
    if known != engine:
        for other in _neighbours(fleet, engine):
            _leaves(turn, other, f"{engine.name} is in its place")
        if known is not None and _places(known) != _places(engine) and engine.name in fleet.engines:
            roster.let_go(turn, engine.name)  # what is known of the server before says nothing of this one
        turn.append(EngineAdmitted(engine=engine))
        turn.say(
            f"{engine.name} at {_listed(engine.urls)} has made itself a member",
            event="engine joins",
            engine=engine.name,
        )
    member = fleet.engines.get(engine.name)
    if member is not None:
        member.heard, member.connected = turn.now, False


def evaluate(turn: Turn) -> None:
    """Let those go that nobody has heard of for too long."""
    fleet, admission = turn.fleet, turn.fleet.policy.admission
    if admission is None:
        return
    silent: dict[str, float] = {}
    for name in fleet.memory.admitted:
        engine = fleet.engines.get(name)
        if engine is None:
            continue  # forgotten, or about to be taken in
        if engine.ranks:
            engine.heard, engine.connected = turn.now, True
        limit = fleet.policy.heartbeat if _is_gone(engine) else admission.leave
        if turn.now >= engine.heard + limit:
            silent[name] = limit
    for name, limit in silent.items():
        _leaves(turn, name, f"it was neither heard nor connected for {limit:g} s")


def _is_gone(engine: EngineState) -> bool:
    """Its agents' connections have ended, and its server does not answer, either: nobody is to wait for it."""
    return engine.connected and not engine.ranks and not engine.reachable and bool(engine.error)


def configured_anew(turn: Turn) -> None:
    """Let those go that the present configuration would not take in; how many there may be counts for who comes."""
    for name, engine in list(turn.fleet.memory.admitted.items()):
        if unfit := _unfit(turn.fleet.policy, engine):
            _leaves(turn, name, unfit)


def _leaves(turn: Turn, name: str, reason: str) -> None:
    turn.append(EngineLeft(engine=name, reason=reason))
    turn.say(f"{name} leaves: {reason}", "warning", event="engine leaves", engine=name)
