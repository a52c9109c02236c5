"""Engines that make themselves members: who may, who is refused and why, and when they leave."""

from dataclasses import replace
from ipaddress import ip_network
from typing import Any, Final

import pytest
from fleets import rank
from weightsync.orchestrator.core.commands import Drop
from weightsync.orchestrator.core.events import Call, DrainAsked, EngineApplied, ForgetAsked, HoldAsked, PolicyChanged
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.membership import admission
from weightsync.orchestrator.core.memory import replay, saved
from weightsync.orchestrator.core.policy import Admission, EngineConfig
from weightsync.orchestrator.core.records import (
    EngineAdmitted,
    EngineDrained,
    EngineForgotten,
    EngineHeld,
    EngineLeft,
    MemorySaved,
)
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.application import Applicant, Application

LEAVE: Final = 60.0
ADMISSION: Final = Admission(
    names=("a*", "decode-?"),
    host_names=("*.gpu.example", "node1"),
    networks=(ip_network("10.1.0.0/16"), ip_network("2001:db8::/64")),
    at_most=2,
    leave=LEAVE,
)


def applicant(name: str, url: str = "", **more: Any) -> Applicant:
    number = sum(name.encode())
    return Applicant(name=name, urls=(url or f"http://10.1.0.{number % 256}:8000",), **more)


def application(engine: Applicant | str, run_id: str = "unit") -> Application:
    engine = applicant(engine) if isinstance(engine, str) else engine
    return Application(run_id=run_id, engine=engine)


def apply(fleet: Any, engine: Applicant | str, **more: Any) -> str:
    """What the engine hears: an objection or nothing. The event comes in any case, as it may when two come at once."""
    said = application(engine, **more)
    objection = admission.objection(fleet.fleet, said, fleet.now)
    fleet.happens(EngineApplied(fleet.id(), said))
    return objection


@pytest.fixture
def fleet(drive: Any) -> Any:
    """A daemon whose configuration lists one engine and admits others."""
    made = drive(options={"admission": ADMISSION})
    made.policy = replace(made.policy, engines=(EngineConfig("e0", "", ("http://10.1.9.9:8000",)),))
    made.happens(PolicyChanged(made.id(), made.policy))
    return made


def members(fleet: Any) -> list[str]:
    return list(fleet.fleet.engines)


# ---------------------------------------------------------------------------------------------------------- who may
def test_an_engine_that_may_is_a_member_as_any_and_is_known_to_the_next_daemon(fleet: Any, drive: Any) -> None:
    assert apply(fleet, "a0") == ""
    assert members(fleet) == ["e0", "a0"]
    assert fleet.called("a0", Call.PROBE) == 1
    fleet.answers("a0", Call.PROBE, True)
    assert fleet.called("a0", Call.ATTACH) == 1
    again = drive(options={"admission": ADMISSION}, records=fleet.written())
    assert members(again) == ["e0", "a0"]


def test_the_same_again_changes_nothing_and_is_not_journaled(fleet: Any) -> None:
    for _ in range(3):
        assert apply(fleet, "a0") == ""
    assert [record for record in fleet.written() if isinstance(record, EngineAdmitted)] == [
        EngineAdmitted(engine=applicant("a0"))
    ]


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("10.1.255.1", True),
        ("10.2.0.1", False),
        ("[2001:db8::1]", True),
        ("[2001:db9::1]", False),
        ("[::ffff:10.1.0.1]", True),
        ("[::ffff:127.0.0.1]", False),
        ("node1", True),
        ("NODE1", True),
        ("node2", False),
        ("x.gpu.example", True),
        ("gpu.example", False),
        ("x.gpu.example.evil", False),
        ("127.0.0.1", False),
        ("localhost", False),
        ("169.254.169.254", False),
        ("10.1", False),  # 10.0.0.1 to some resolvers
        ("0x0a010001", False),
        ("167837697", False),
        ("10.1.0.1.", False),
    ],
)
def test_only_hosts_that_are_named_may_be_called(fleet: Any, host: str, may: bool) -> None:
    objection = apply(fleet, applicant("a0", f"http://{host}:8000"))
    assert (objection == "", "a0" in members(fleet)) == (may, may)
    if not may:
        assert f"url 'http://{host}:8000': its host is in none of engines_admit.hosts (10.1.0.0/16" in objection


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (application("a0", run_id="other"), "run_id 'other': this daemon serves run 'unit'. Fix: "),
        (application("b0"), "name 'b0' fits none of engines_admit.names (a*, decode-?). Fix: "),
        (application("decode-10"), "name 'decode-10' fits none of"),
        (application("A0"), "name 'A0' fits none of"),
        (application(applicant("a0", pair="p")), "role 'both' in pair 'p'. Fix: "),
        (
            application(applicant("a0", "http://10.1.9.9:8000/")),
            "url 'http://10.1.9.9:8000/': the configuration lists e0 there. Fix: ",
        ),
        (
            application(Applicant(name="a0", urls=("http://10.1.0.1:80", "http://10.1.0.1/"))),
            "urls http://10.1.0.1:80, http://10.1.0.1/: one server is named twice. Fix: ",
        ),
        (
            application(Applicant(name="a0", urls=("http://10.1.0.1:80", "http://127.0.0.1:6379"))),
            "url 'http://127.0.0.1:6379': its host is in none of",
        ),
    ],
)
def test_a_refusal_names_field_value_and_fix(fleet: Any, said: Application, words: str) -> None:
    objection = admission.objection(fleet.fleet, said, fleet.now)
    fleet.happens(EngineApplied(fleet.id(), said))
    assert objection.startswith(words)
    assert members(fleet) == ["e0"]


def test_the_configuration_has_the_first_right_to_a_name(fleet: Any) -> None:
    fleet.happens(PolicyChanged(fleet.id(), replace(fleet.policy, engines=(EngineConfig("a0"),))))
    assert apply(fleet, "a0").startswith("name 'a0': the configuration lists that engine. Fix: ")


def test_a_daemon_that_admits_nobody_says_so(drive: Any) -> None:
    fleet = drive()
    assert apply(fleet, "a0").startswith("name 'a0': this daemon takes in only the engines that its configuration")
    assert members(fleet) == ["e0"]


def test_there_are_at_most_so_many(fleet: Any) -> None:
    assert [apply(fleet, name) for name in ("a0", "a1")] == ["", ""]
    full = "name 'a2': there are 2 such engines already, and engines_admit.at_most is 2. Fix: "
    assert apply(fleet, "a2").startswith(full)
    assert apply(fleet, "a1") == "", "it is one of them"
    fleet.happens(ForgetAsked(fleet.id(), "ann", "gone", "a0"))
    assert apply(fleet, "a2") == "", "who is forgotten does not count"
    assert members(fleet) == ["e0", "a1", "a2"]
    fewer = replace(fleet.policy, admission=replace(ADMISSION, at_most=1))
    fleet.happens(PolicyChanged(fleet.id(), fewer))
    assert members(fleet) == ["e0", "a1", "a2"], "who is there stays"
    assert "at_most is 1" in apply(fleet, "a3")


# -------------------------------------------------------------------------------------------------------- clashes
def test_a_name_is_its_first_engines_while_that_lives(fleet: Any) -> None:
    apply(fleet, "a0")
    moved = applicant("a0", "http://10.1.7.7:8000")
    assert apply(fleet, moved).startswith(f"name 'a0': {applicant('a0').urls[0]} has it, and lives. Fix: ")
    fleet.answers("a0", Call.PROBE, True)
    fleet.bring("a0")
    fleet.passes(2 * LEAVE)
    assert "and lives" in apply(fleet, moved), "its agents are connected"
    fleet.loses_engine("a0")
    fleet.passes(LEAVE - 1)
    assert "and lives" in apply(fleet, moved)
    fleet.now += 1  # a moment before the sweep lets it go
    assert apply(fleet, moved) == ""
    assert fleet.fleet.memory.admitted["a0"] == moved
    assert (fleet.fleet.engines["a0"].reachable, fleet.fleet.engines["a0"].heard) == (False, fleet.now)
    assert fleet.called("a0", Call.PROBE) == 2, "what was known of the other server says nothing of this one"


def test_a_server_is_its_first_engines_while_that_lives(fleet: Any) -> None:
    apply(fleet, "a0")
    there = applicant("a1", applicant("a0").urls[0] + "/")
    assert apply(fleet, there).startswith(f"url '{there.urls[0]}': a0 is there, and lives. Fix: ")
    assert apply(fleet, "a2") == ""
    fleet.now += LEAVE
    assert apply(fleet, there) == "", "it takes the place of the one that is gone, also where there are enough"
    assert members(fleet) == ["e0", "a1"], "and nobody has heard of a2, either"
    assert EngineLeft(engine="a0", reason="a1 is in its place") in fleet.written()


def test_the_same_server_may_say_something_else_of_itself(fleet: Any) -> None:
    apply(fleet, "a0")
    other = applicant("a0", role="decode", pair="p")
    assert apply(fleet, other) == ""
    assert (fleet.fleet.engines["a0"].pair, fleet.fleet.memory.admitted["a0"]) == ("p", other)


# -------------------------------------------------------------------------------------------------- leaving, forgetting
def test_one_that_is_neither_heard_nor_connected_leaves_and_comes_back(fleet: Any) -> None:
    apply(fleet, "a0")
    fleet.passes(LEAVE - 1)
    apply(fleet, "a0")
    fleet.passes(LEAVE - 1)
    assert members(fleet) == ["e0", "a0"]
    fleet.passes(1)
    assert members(fleet) == ["e0"]
    assert EngineLeft(engine="a0", reason="it was neither heard nor connected for 60 s") in fleet.written()
    assert apply(fleet, "a0") == ""
    assert members(fleet) == ["e0", "a0"]


def test_one_whose_agents_are_connected_stays(fleet: Any) -> None:
    apply(fleet, "a0")
    fleet.answers("a0", Call.PROBE, True)
    fleet.bring("a0")
    for _ in range(5):
        fleet.passes(LEAVE)
    assert members(fleet) == ["e0", "a0"]


def test_who_is_known_has_time_to_be_heard_after_a_restart(fleet: Any, drive: Any) -> None:
    apply(fleet, "a0")
    again = drive(options={"admission": ADMISSION}, records=fleet.written(), now=1000.0)
    again.passes(LEAVE - 1)
    assert members(again) == ["e0", "a0"]
    again.passes(1)
    assert members(again) == ["e0"]


def test_one_whose_processes_are_plainly_gone_leaves_soon(fleet: Any) -> None:
    heartbeat = fleet.policy.heartbeat
    apply(fleet, "a0")
    fleet.fails("a0", Call.PROBE, "connection refused")
    fleet.passes(heartbeat)
    assert members(fleet) == ["e0", "a0"], "it is still starting"
    fleet.answers("a0", Call.PROBE, True)
    fleet.bring("a0")
    fleet.loses_engine("a0")
    fleet.passes(heartbeat)
    assert members(fleet) == ["e0", "a0"], "its server was not asked since"
    fleet.fails("a0", Call.ATTACH, "connection refused")
    assert members(fleet) == ["e0"]
    assert fleet.fleet.quorum() == 1


def test_one_that_is_heard_after_its_agents_are_gone_stays(fleet: Any) -> None:
    apply(fleet, "a0")
    fleet.answers("a0", Call.PROBE, True)
    fleet.bring("a0")
    fleet.loses_engine("a0")
    apply(fleet, "a0")
    fleet.fails("a0", Call.ATTACH, "connection refused")
    fleet.passes(LEAVE - 1)
    assert members(fleet) == ["e0", "a0"], "another process is starting there"


def test_one_that_is_forgotten_is_not_admitted_until_it_is_released(fleet: Any, drive: Any) -> None:
    apply(fleet, "a0")
    fleet.happens(ForgetAsked(fleet.id(), "ann", "broken", "a0"))
    assert members(fleet) == ["e0"]
    forgotten = "name 'a0' was forgotten (ann: broken). Fix: release a0 makes it a member again"
    assert apply(fleet, "a0") == forgotten
    assert apply(fleet, applicant("a0", "http://10.1.7.7:1")) == forgotten, "wherever it comes from"
    again = drive(options={"admission": ADMISSION}, records=fleet.written())
    again.passes(10 * LEAVE)
    assert apply(again, "a0") == forgotten
    again.happens(HoldAsked(again.id(), "ann", "", "a0", False))
    assert members(again) == ["e0", "a0"]
    assert apply(again, "a0") == ""


def test_a_drain_waits_for_one_that_leaves_and_comes_back(fleet: Any) -> None:
    apply(fleet, "a0")
    fleet.happens(DrainAsked(fleet.id(), "ann", "new image", "a0"))
    fleet.passes(LEAVE)
    assert members(fleet) == ["e0"]
    apply(fleet, "a0")
    assert fleet.fleet.expected() == ["e0"]
    fleet.happens(HoldAsked(fleet.id(), "ann", "", "a0", False))
    assert fleet.fleet.expected() == ["e0", "a0"]


def test_a_pair_is_one_unit_as_soon_as_both_are_there(fleet: Any) -> None:
    apply(fleet, applicant("a0", role="prefill", pair="p"))
    assert fleet.fleet.unit("a0") == ["a0"]
    apply(fleet, applicant("a1", role="decode", pair="p"))
    assert fleet.fleet.unit("a0") == ["a0", "a1"]
    fleet.happens(ForgetAsked(fleet.id(), "ann", "", "a1"))
    assert members(fleet) == ["e0"]
    fleet.happens(HoldAsked(fleet.id(), "ann", "", "a0", False))
    assert members(fleet) == ["e0", "a0", "a1"]


@pytest.mark.parametrize(
    "policy",
    [
        {"admission": None},
        {"admission": replace(ADMISSION, names=("x*",))},
        {"admission": replace(ADMISSION, networks=())},
        {"engines": (EngineConfig("a0"),)},
        {"engines": (EngineConfig("e1", "", applicant("a0").urls),)},
    ],
)
def test_whom_a_new_configuration_would_refuse_leaves(fleet: Any, policy: dict[str, Any]) -> None:
    apply(fleet, "a0")
    records = fleet.written()
    new = replace(fleet.policy, **policy)
    fleet.happens(PolicyChanged(fleet.id(), new))
    assert "a0" not in fleet.fleet.memory.admitted
    assert members(fleet) == [config.name for config in new.engines]
    # A daemon that is started with it finds the same.
    again, _ = start(new, "journal", records, 0.0)
    step(again, [], 0.0)
    assert list(again.engines) == [config.name for config in new.engines]


def test_one_that_leaves_within_a_round_is_left_out_and_may_come_back_after_it(drive: Any) -> None:
    fleet = drive(engines=("e0",), options={"admission": ADMISSION})
    apply(fleet, "a0")
    fleet.engines = ("e0", "a0")
    going = fleet.to(Phase.QUIESCING)
    assert list(going.engines) == ["e0", "a0"]
    narrow, wide = replace(ADMISSION, names=("x",)), fleet.policy
    fleet.happens(PolicyChanged(fleet.id(), replace(wide, admission=narrow)))
    assert not going.has("a0")
    fleet.happens(PolicyChanged(fleet.id(), wide))
    assert "has left within a round that is not over" in apply(fleet, "a0")
    fleet.engines = ("e0",)
    while fleet.fleet.round is not None:
        fleet._forward(going)
    fleet.passes(0.0)
    assert members(fleet) == ["e0"]
    assert rank("a0") in {command.member for command in fleet.commands if isinstance(command, Drop)}
    assert apply(fleet, "a0") == ""
    assert fleet.called("a0", Call.PROBE) == 2
    assert fleet.fleet.memory.committed == going.version


def test_what_is_remembered_of_operators_wishes_is_bounded(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsync.orchestrator.core.memory.REMEMBERED_WISHES", 2)
    for name in ("a0", "a1", "a2"):
        assert apply(fleet, name) == ""
        fleet.happens(ForgetAsked(fleet.id(), "ann", "", name))
    memory = fleet.fleet.memory
    assert list(memory.forgotten_engines) == list(memory.admitted) == ["a1", "a2"]
    assert sum(isinstance(record, EngineForgotten) for record in fleet.written()) == 3
    for number in range(3):
        replay(memory, EngineDrained(engine=f"d{number}", drained=True, reason=""))
        replay(memory, EngineHeld(engine=f"h{number}", held=True, reason=""))
    assert (list(memory.drains), list(memory.holds)) == (["d1", "d2"], ["h1", "h2"])


def test_a_snapshot_knows_who_was_admitted(fleet: Any, drive: Any) -> None:
    apply(fleet, applicant("a0", role="decode", pair="p"))
    snapshot = saved(fleet.fleet.memory)
    assert isinstance(snapshot, MemorySaved)
    again = drive(options={"admission": ADMISSION}, records=[snapshot])
    assert (members(again), again.fleet.engines["a0"].pair) == (["e0", "a0"], "p")
