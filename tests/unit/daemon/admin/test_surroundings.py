"""What agents say of their surroundings, put together."""

import msgspec
from fleets import ANNOUNCE, policy_for, rank, trainer
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.daemon.admin.problems import problems
from weightsync.orchestrator.daemon.admin.surroundings import MAX_SHOWN, findings
from weightsync.orchestrator.daemon.admin.views import FindingView
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import Hello
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.release import release

SHM = Finding("warning", "64 MB of 64 MB are free in /dev/shm", "docker run --shm-size=16g", "shared memory")
PRESET = Finding("note", "UCX_NET_DEVICES=eth0 is preset", "unset it", "UCX_NET_DEVICES")
BRIDGE = Finding("warning", "docker0 may be offered", "UCX_NET_DEVICES=eth0", "network", several_hosts=True)


def fleet_of(found: dict[Member, tuple[Finding, ...]], hosts: int = 1) -> Fleet:
    fleet, _ = start(policy_for([]), "j", [], 0.0)
    for number, (member, each) in enumerate(found.items()):
        hello = Hello(
            schema=SCHEMA_VERSION, run_id="unit", member=member, world=64, incarnation=1, host=f"h{number % hosts}"
        )
        fleet.agents[member] = ConnectedAgent(member, 1, hello, ANNOUNCE, findings=each)
    return fleet


def test_those_alike_are_one_with_its_members_worst_first() -> None:
    fleet = fleet_of({trainer(): (PRESET,), **{rank("e0", number): (SHM, PRESET) for number in range(10)}})
    assert findings(fleet) == (
        FindingView(
            level="warning", check="shared memory", what=SHM.what, fix=SHM.fix, count=10,
            members=tuple(f"e0/{number}" for number in range(8)),
        ),
        FindingView(
            level="note", check="UCX_NET_DEVICES", what=PRESET.what, fix="unset it", count=11,
            members=("trainer/0", *(f"e0/{number}" for number in range(7))),
        ),
    )  # fmt: skip
    shm = [problem for problem in problems(fleet, (), 0.0, 0.0) if "/dev/shm" in problem.what]
    named = ", ".join(f"e0/{number}" for number in range(8))
    assert [(problem.severity, problem.what, problem.fix) for problem in shm] == [
        ("degraded", f"{named} and 2 more: shared memory: {SHM.what}", SHM.fix)
    ]
    assert not [problem for problem in problems(fleet, (), 0.0, 0.0) if "UCX_NET_DEVICES" in problem.what]


def test_what_matters_between_hosts_is_left_out_on_one() -> None:
    two = {trainer(): (BRIDGE,), rank("e0"): (BRIDGE,)}
    assert findings(fleet_of(two)) == ()
    [found] = findings(fleet_of(two, hosts=2))
    assert found.members == ("trainer/0", "e0/0")


def test_a_mixed_fleet_is_visible() -> None:
    fleet = fleet_of({trainer(): (), rank("e0"): (), rank("e0", 1): ()})
    assert findings(fleet) == ()
    for member, said in ((trainer(), release()), (rank("e0"), "0.0.7"), (rank("e0", 1), "0.0.7")):
        agent = fleet.agents[member]
        agent.hello = msgspec.structs.replace(agent.hello, release=said)
    [found] = findings(fleet)
    assert (found.level, found.members) == ("note", ("e0/0", "e0/1"))
    assert found.what == f"runs release 0.0.7, and the daemon {release()}"


def test_however_much_a_fleet_has_so_much_is_shown() -> None:
    many = {
        rank("e0", number): tuple(Finding("warning", f"{number} {each}") for each in range(24)) for number in range(10)
    }
    shown = findings(fleet_of(many))
    assert len(shown) == MAX_SHOWN
    assert (shown[-1].what, shown[-1].count) == (f"{240 - MAX_SHOWN + 1} more findings", 6)
