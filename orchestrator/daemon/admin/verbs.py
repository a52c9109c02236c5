"""The operator's verbs: what is asked for is checked, written into the audit log, decided by the core, and durable."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import structlog
from weightsync.orchestrator.core.events import (
    AbortAsked,
    Asked,
    DeadDeclared,
    DrainAsked,
    ForgetAsked,
    HoldAsked,
    MaintenanceAsked,
    RetryAsked,
    RollbackAsked,
)
from weightsync.orchestrator.core.membership import roster
from weightsync.orchestrator.core.round import rollback
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.audit import Audit, AuditLine
from weightsync.orchestrator.daemon.admin.views import VerbView
from weightsync.orchestrator.protocol.limits import MAX_STEP
from weightsync.orchestrator.protocol.text import clean

log = structlog.get_logger(__name__)

MAX_REASON: Final = 300
MAX_WHO: Final = 120
MAX_TARGET: Final = 200

SHOWN: Final = 20
"""Names that a refusal lists."""

DURABLE_SECONDS: Final = 10.0
"""Until what was asked for is in the journal; then the asker hears that it may come yet."""


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request. ``target``: an engine, a writer, a step, or on and off; empty for verbs that need none."""

    target: Annotated[str, msgspec.Meta(max_length=MAX_TARGET)] = ""
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)] = ""
    by: Annotated[str, msgspec.Meta(max_length=MAX_WHO)] = ""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks: its address, and the credential that it came with (``operator``, or ``operator NAME``)."""

    address: str
    credential: str


class VerbRefused(Exception):
    """What was asked for cannot be. ``status``: of the HTTP answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


_GO_ON: Final = "its engines go on with what they have"

_Answer = tuple[Asked, str]
_Verb = Callable[["Verbs", Order, int, str], _Answer]


class Verbs:
    """One per daemon; belongs to its loop.

    Args:
        post: hands an event to the core, and returns when all that follows from it is durable.
        next_id: the number of the next event.
    """

    def __init__(
        self, fleet: Fleet, audit: Audit, post: Callable[[Asked], Awaitable[None]], next_id: Callable[[], int]
    ) -> None:
        self.fleet = fleet
        self._audit, self._post, self._next_id = audit, post, next_id

    async def perform(self, verb: str, order: Order, asker: Asker) -> VerbView:
        """Do it, and say what happens now.

        Raises:
            VerbRefused: unknown verb or target (404), not now (409), not written (503).
        """
        order = Order(
            target=clean(order.target, MAX_TARGET), reason=clean(order.reason, MAX_REASON),
            by=clean(order.by, MAX_WHO) or asker.address,
        )  # fmt: skip
        try:
            _, says = self._check(verb, order)
        except VerbRefused as refused:
            await self._write(verb, order, asker, f"refused: {refused}")
            raise
        # First the audit log: what it does not hold is not done.
        await self._write(verb, order, asker, says)
        event, says = self._check(verb, order)  # anew: the disk may have taken its time
        try:
            async with asyncio.timeout(DURABLE_SECONDS):
                await self._post(event)
        except TimeoutError:
            late = f"it is not in the journal after {DURABLE_SECONDS:g} s: its disk is slow; look at status"
            raise VerbRefused(503, late) from None
        return VerbView(verb=verb, target=order.target, says=says)

    def _check(self, verb: str, order: Order) -> _Answer:
        if verb not in VERBS:
            raise VerbRefused(404, f"there is no verb {clean(verb, 40)!r}; verbs are: {', '.join(VERBS)}")
        # With its time, since it is shown for as long as the wish stands, also by later daemons.
        by = f"{order.by} at {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
        return VERBS[verb](self, order, self._next_id(), by)

    async def _write(self, verb: str, order: Order, asker: Asker, result: str) -> None:
        now, verb = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), clean(verb, 40)
        line = AuditLine(
            time=now, who=order.by, address=asker.address, credential=asker.credential, verb=verb,
            target=order.target, reason=order.reason, result=result,
        )  # fmt: skip
        try:
            head = await asyncio.to_thread(self._audit.append, line)
        except OSError as error:
            raise VerbRefused(503, f"nothing is done, the audit log cannot be written: {error}") from error
        log.info("an operator asks", verb=verb, target=order.target, credential=asker.credential, audit_hash=head)


# --------------------------------------------------------------------------------------------------------- each verb
def _engine(fleet: Fleet, order: Order) -> str:
    if order.target not in fleet.engines:
        raise VerbRefused(404, f"there is no engine {order.target!r}; engines are: {_listed(fleet.engines)}")
    return order.target


def _no_target(order: Order) -> None:
    if order.target:
        raise VerbRefused(404, f"this verb has no target, got {order.target!r}")


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "") or "none"


def _hold(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    fleet, name = verbs.fleet, _engine(verbs.fleet, order)
    if name in fleet.memory.holds:
        says = f"{name} is held already ({fleet.memory.holds[name]})"
    elif fleet.round is not None and fleet.round.has(name) and not _serves_on(fleet, name):
        says = (
            f"{name} is paused when round {fleet.round.name} is over, and takes part in no other until it is released"
        )
    else:
        says = f"{name} is paused now, and takes part in no round until it is released"
    pair = [other for other in fleet.unit(name) if other != name]
    if pair:
        says += f"; so is its pair: {_listed(pair)}"
    return HoldAsked(number, by, order.reason, name, True), says


def _serves_on(fleet: Fleet, name: str) -> bool:
    """It serves in the round under way, and is looked after like one that is in none."""
    current = fleet.round
    return current is not None and current.engines[name].serves_on and not current.decided


def _release(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    fleet = verbs.fleet
    if order.target in fleet.memory.forgotten_engines:
        return HoldAsked(number, by, order.reason, order.target, False), f"{order.target} is a member again"
    name = _engine(fleet, order)
    version, committed = fleet.version_of(name), fleet.memory.committed
    if name not in fleet.memory.holds and name not in fleet.memory.drains:
        says = f"{name} is neither held nor drained by anybody"
    elif version is not None and version == committed:
        says = f"{name} holds {version} and is resumed now"
    else:
        says = f"{name} catches up by the next round, and serves then"
    return HoldAsked(number, by, order.reason, name, False), says


def _drain(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    fleet, name = verbs.fleet, _engine(verbs.fleet, order)
    unit = [other for other in fleet.unit(name) if other not in fleet.memory.drains]
    current, serves = fleet.round, fleet.version_of(name)
    if not unit:
        says = f"{name} is drained already ({fleet.memory.drains[name]})"
    else:
        when = f" after round {current.name}" if current is not None and current.has(name) else ""
        says = f"{_listed(unit)} takes part in no round{when} until it is released, and its readiness is 503"
        says += f"; it serves {serves} until another version is decided, then it is paused" if serves else ""
    return DrainAsked(number, by, order.reason, name), says


def _forget(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    fleet, name = verbs.fleet, _engine(verbs.fleet, order)
    unit = fleet.unit(name)
    says = f"{_listed(unit)} is no member any more, until release makes it one again"
    for other in unit:
        says += "".join(f"; {other}: {danger}" for danger in roster.dangers(fleet, other))
    return ForgetAsked(number, by, order.reason, name), says


def _abort(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    _no_target(order)
    current = verbs.fleet.round
    if current is None:
        says = "there is no round to abort"
    elif current.decided:
        says = f"round {current.name} is decided and goes on: every byte was verified"
    elif current.granted:
        torn = [name for name in current.remaining() if not current.engines[name].shadow]
        says = f"round {current.name} is given up; "
        says += f"{_listed(torn)} may be torn and stay paused until another repairs them" if torn else _GO_ON
    else:
        says = f"round {current.name} is given up before anything was written; {_GO_ON}"
    if current is not None and not current.decided:
        says += ". It is tried again after a while, unless maintenance is on"
    return AbortAsked(number, by, order.reason), says


def _rollback(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    step = None
    if order.target:
        # As many digits as a step has; int() would take signs, spaces and underscores, too.
        if not (order.target.isascii() and order.target.isdigit() and int(order.target) <= MAX_STEP):
            raise VerbRefused(404, f"a rollback is to a step's number, or to the version before; got {order.target!r}")
        step = int(order.target)
    found = rollback.found(verbs.fleet, step)
    if found.version is None:
        raise VerbRefused(409, f"no rollback: {found.objection}")
    says = f"{_listed(found.engines)} switch back from {verbs.fleet.memory.committed} to {found.version}"
    others = [name for name in verbs.fleet.expected() if name not in found.engines]
    says += f"; {_listed(others)} serve nothing until they have it or another version is published" if others else ""
    return RollbackAsked(number, by, order.reason, step), says


def _retry(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    _no_target(order)
    fleet = verbs.fleet
    waiting = [name for name, engine in fleet.engines.items() if engine.failures]
    waiting += [str(version) for version in fleet.retry_at if version not in fleet.memory.done]
    says = f"tried again at once: {_listed(waiting)}" if waiting else "nothing waits for another attempt"
    return RetryAsked(number, by, order.reason), says


def _declare_dead(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    fleet = verbs.fleet
    grants = {(str(writer), name): pending for (writer, name), pending in fleet.unclosed.items()}
    mine = {name: pending for (writer, name), pending in grants.items() if writer == order.target}
    if not mine:
        open_to = sorted({writer for writer, _ in grants})
        raise VerbRefused(404, f"no grant of {order.target!r} is open; writers with one are: {_listed(open_to)}")
    member = next(writer for writer, _ in fleet.unclosed if str(writer) == order.target)
    here = fleet.agents.get(member)
    if here is not None and any(pending.incarnation == here.hello.incarnation for pending in mine.values()):
        where = f"{here.hello.host or 'an unknown host'}, process {here.hello.pid}"
        raise VerbRefused(409, f"{order.target} is alive: it is connected from {where}. Fix: end that process first")
    engines = sorted({target.engine for pending in mine.values() for target in pending.targets})
    says = f"{len(mine)} grants of {order.target} are over; rounds may write to {_listed(engines)} again"
    return DeadDeclared(number, by, order.reason, member), says


def _maintenance(verbs: Verbs, order: Order, number: int, by: str) -> _Answer:
    if order.target not in ("on", "off"):
        raise VerbRefused(404, f"maintenance is on or off, not {order.target!r}")
    fleet, on = verbs.fleet, order.target == "on"
    if not on:
        says = "rounds may begin" if fleet.memory.maintenance is not None else "maintenance is off already"
    elif fleet.round is not None:
        says = f"no round begins after round {fleet.round.name}, which goes on"
    else:
        says = "no round begins; engines go on with what they have"
    return MaintenanceAsked(number, by, order.reason, on), says


VERBS: Final[dict[str, _Verb]] = {
    "hold": _hold,
    "release": _release,
    "drain": _drain,
    "forget": _forget,
    "abort": _abort,
    "rollback": _rollback,
    "retry": _retry,
    "declare-dead": _declare_dead,
    "maintenance": _maintenance,
}
"""Each checks what it is asked for and says what happens now."""
