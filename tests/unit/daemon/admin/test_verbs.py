"""What an operator asks for is checked by name, audited, and answered with what happens now."""

import json
from pathlib import Path
from typing import Any

import pytest
from fleets import ANNOUNCE, policy_for, rank, trainer
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
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.round import rollback
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Unclosed
from weightsync.orchestrator.daemon.admin.audit import Audit
from weightsync.orchestrator.daemon.admin.verbs import VERBS, Asker, Order, VerbRefused, Verbs
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import EngineStatus, Hello
from weightsync.orchestrator.protocol.names import RoundName, Version

NAME, VERSION, NEWER = RoundName(1, 4), Version(7, 1), Version(7, 2)


class Desk:
    """Verbs of a fleet of two engines, what they asked the core for, and the audit log."""

    def __init__(self, directory: Path) -> None:
        self.fleet, _ = start(policy_for(["e0", "e1"]), "j", [], 0.0)
        self.events: list[Asked] = []
        self.directory = directory
        self.verbs = Verbs(self.fleet, Audit(directory), self.post, lambda: 9)

    async def post(self, event: Asked) -> None:
        self.events.append(event)

    async def says(self, verb: str, target: str = "", **more: str) -> str:
        return (await self.verbs.perform(verb, Order(target=target, **more), Asker("192.0.2.7", "operator ann"))).says

    def audit(self) -> list[dict[str, Any]]:
        file = self.directory / "audit.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def begin(self, **more: Any) -> Round:
        self.fleet.round = Round(NAME, VERSION, 1, False, {"e0": Progress()}, {rank("e0"): 1}, {})
        for name, value in more.items():
            setattr(self.fleet.round, name, value)
        return self.fleet.round


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize(
    ("verb", "target", "event", "says"),
    [
        ("hold", "e0", HoldAsked, "e0 is paused now, and takes part in no round until it is released"),
        ("release", "e0", HoldAsked, "e0 is neither held nor drained by anybody"),
        (
            "drain",
            "e0",
            DrainAsked,
            "e0 takes part in no round until it is released, and its readiness is 503",
        ),
        ("forget", "e1", ForgetAsked, "e1 is no member any more, until release makes it one again"),
        ("abort", "", AbortAsked, "there is no round to abort"),
        ("retry", "", RetryAsked, "nothing waits for another attempt"),
        ("maintenance", "on", MaintenanceAsked, "no round begins; engines go on with what they have"),
        ("maintenance", "off", MaintenanceAsked, "maintenance is off already"),
    ],
)
async def test_each_verb(desk: Desk, verb: str, target: str, event: type[Asked], says: str) -> None:
    assert await desk.says(verb, target, reason="why", by="ann@desk") == says
    (asked,) = desk.events
    assert type(asked) is event
    assert asked.by.startswith("ann@desk at 20")
    assert (asked.id, asked.reason) == (9, "why")
    (line,) = desk.audit()
    assert line.pop("time").endswith("Z")
    assert (line.pop("number"), line.pop("before")) == (1, "0" * 64)
    assert line == {
        "who": "ann@desk", "address": "192.0.2.7", "credential": "operator ann", "verb": verb, "target": target,
        "reason": "why", "result": says,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "target", "status", "reason"),
    [
        ("hold", "e7", 404, "there is no engine 'e7'; engines are: e0, e1"),
        ("release", "", 404, "there is no engine ''; engines are: e0, e1"),
        ("abort", "e0", 404, "this verb has no target, got 'e0'"),
        ("maintenance", "maybe", 404, "maintenance is on or off, not 'maybe'"),
        ("declare-dead", "trainer/9", 404, "no grant of 'trainer/9' is open; writers with one are: none"),
        ("rollback", "last", 404, "a rollback is to a step's number, or to the version before; got 'last'"),
        ("rollback", "9" * 30, 404, f"a rollback is to a step's number, or to the version before; got '{'9' * 30}'"),
        ("rollback", "4", 409, "no rollback: nothing is committed yet"),
        ("explode", "", 404, f"there is no verb 'explode'; verbs are: {', '.join(VERBS)}"),
    ],
)
async def test_what_does_not_exist_is_refused_by_name_and_in_the_audit_log(
    desk: Desk, verb: str, target: str, status: int, reason: str
) -> None:
    with pytest.raises(VerbRefused) as refused:
        await desk.says(verb, target)
    assert (refused.value.status, str(refused.value)) == (status, reason)
    assert desk.events == []
    (line,) = desk.audit()
    assert (line["who"], line["result"]) == ("192.0.2.7", f"refused: {reason}")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "is given up before anything was written"),
        ({"granted": True}, "e0 may be torn and stay paused until another repairs them"),
        ({"granted": True, "live": ("e0",)}, "is decided and goes on"),
    ],
)
async def test_what_an_abort_does_depends_on_how_far_the_round_is(desk: Desk, state: Any, says: str) -> None:
    desk.begin(**state)
    assert says in await desk.says("abort")


async def test_an_abort_tears_no_engine_that_lands_elsewhere(desk: Desk) -> None:
    desk.begin(granted=True, engines={"e0": Progress("copy")})
    assert "given up; its engines go on with what they have" in await desk.says("abort")


async def test_an_engine_that_serves_in_a_round_is_held_at_once(desk: Desk) -> None:
    desk.begin(engines={"e0": Progress("flip", serves_on=True)})
    assert await desk.says("hold", "e0") == "e0 is paused now, and takes part in no round until it is released"


@pytest.mark.parametrize(("target", "step"), [("", None), ("42", 42)])
async def test_a_rollback_says_who_goes_where(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, target: str, step: int | None
) -> None:
    asked: list[int | None] = []

    def found(fleet: Fleet, wanted: int | None) -> rollback.Rollback:
        asked.append(wanted)
        return rollback.Rollback(VERSION, ["e0"])

    monkeypatch.setattr(rollback, "found", found)
    desk.fleet.memory.committed = NEWER
    others = "e1 serve nothing until they have it or another version is published"
    says = f"e0 switch back from {NEWER} to {VERSION}; {others}"
    assert await desk.says("rollback", target, reason="riddles", by="ann") == says
    (event,) = desk.events
    assert isinstance(event, RollbackAsked)
    assert (event.step, event.reason) == (step, "riddles")
    assert set(asked) == {step}
    (line,) = desk.audit()
    assert (line["verb"], line["target"], line["result"]) == ("rollback", target, says)


async def test_a_hold_says_when_it_takes_effect_and_for_whom(desk: Desk) -> None:
    desk.begin()
    assert await desk.says("hold", "e0") == (
        "e0 is paused when round 1.4 is over, and takes part in no other until it is released"
    )
    desk.fleet.memory.holds["e1"] = "ann"
    assert await desk.says("hold", "e1") == "e1 is held already (ann)"
    for engine in desk.fleet.engines.values():
        engine.pair = "p"
    assert (await desk.says("hold", "e1")).endswith("so is its pair: e0")


async def test_a_release_says_whether_it_serves_at_once(desk: Desk) -> None:
    desk.fleet.memory.holds["e0"] = "ann"
    assert await desk.says("release", "e0") == "e0 catches up by the next round, and serves then"
    hello = Hello(schema=SCHEMA_VERSION, run_id="unit", member=rank("e0"), world=1, incarnation=1)
    desk.fleet.enter(ConnectedAgent(rank("e0"), 1, hello, ANNOUNCE, status=EngineStatus(applied=VERSION)))
    desk.fleet.memory.committed = VERSION
    assert await desk.says("release", "e0") == f"e0 holds {VERSION} and is resumed now"


async def test_retry_names_what_waited(desk: Desk) -> None:
    desk.fleet.engines["e1"].failures = 2
    desk.fleet.retry_at[VERSION] = 99.0
    assert await desk.says("retry") == f"tried again at once: e1, {VERSION}"


async def test_a_writer_that_is_here_is_not_dead(desk: Desk) -> None:
    desk.fleet.unclosed[trainer(1), NAME] = Unclosed(5, "node3", "boot", {rank("e0"): 1})
    hello = Hello(schema=SCHEMA_VERSION, run_id="unit", member=trainer(1), world=2, incarnation=5, host="node3", pid=77)
    desk.fleet.enter(ConnectedAgent(trainer(1), 1, hello))
    with pytest.raises(VerbRefused, match="trainer/1 is alive: it is connected from node3, process 77") as refused:
        await desk.says("declare-dead", "trainer/1")
    assert refused.value.status == 409
    desk.fleet.leave(trainer(1))
    with pytest.raises(VerbRefused, match="writers with one are: trainer/1"):
        await desk.says("declare-dead", "trainer/0")
    assert await desk.says("declare-dead", "trainer/1") == (
        "1 grants of trainer/1 are over; rounds may write to e0 again"
    )
    (event,) = desk.events
    assert isinstance(event, DeadDeclared)
    assert event.writer == trainer(1)


async def test_what_the_audit_log_does_not_hold_is_not_done(desk: Desk) -> None:
    (desk.directory / "audit.jsonl").mkdir()
    with pytest.raises(VerbRefused, match="nothing is done, the audit log cannot be written") as refused:
        await desk.says("hold", "e0")
    assert refused.value.status == 503
    assert desk.events == []


async def test_a_slow_journal_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(event: Asked) -> None:
        raise TimeoutError

    monkeypatch.setattr(desk.verbs, "_post", late)
    with pytest.raises(VerbRefused, match="not in the journal after 10 s") as refused:
        await desk.says("hold", "e0")
    assert refused.value.status == 503


async def test_texts_are_made_fit_for_logs(desk: Desk) -> None:
    await desk.says("hold", "e0", reason="a\nb\x1b[31m", by="an\udcffn")
    (event,) = desk.events
    assert event.reason == "a b\\x1b[31m"
    assert event.by.startswith("an\\xffn at ")
