"""Engines that make themselves members: what the daemon looks at before it calls where they say."""

import asyncio
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Any

import pytest
from fleets import policy_for
from structlog.testing import capture_logs
from weightsync.orchestrator.core.events import EngineApplied, Event
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.policy import Admission
from weightsync.orchestrator.daemon.admin import applications
from weightsync.orchestrator.daemon.admin.applications import ApplicationRefused, Applications, addresses_of
from weightsync.orchestrator.protocol.application import Admitted, Applicant, Application

ADMISSION = Admission(
    ("a*",),
    ("node*",),
    (ip_network("10.1.0.0/16"), ip_network("2001:db8::/64")),
    1,
    40.0,
    (ip_network("192.0.2.0/30"),),
)


class Desk:
    """A daemon's door, with a resolver that knows a few hosts."""

    def __init__(self, admission: Admission | None = ADMISSION) -> None:
        self.fleet, _ = start(policy_for([], admission=admission), "j", [], 0.0)
        self.events: list[Event] = []
        self.looked_up: list[str] = []
        self.hosts: Mapping[str, frozenset[str]] = {"node1": frozenset({"10.9.0.1", "fe80::1%eth0"})}
        self.door = Applications(self.fleet, self.post, lambda: 7, self.resolve)

    async def post(self, event: Event) -> None:
        self.events.append(event)
        step(self.fleet, [event], asyncio.get_running_loop().time())

    async def resolve(self, host: str) -> frozenset[str]:
        self.looked_up.append(host)
        if host not in self.hosts:
            raise OSError("nobody knows it")
        return self.hosts[host]

    async def says(self, *urls: str, address: str = "10.1.0.1", name: str = "a0", **more: Any) -> Admitted:
        engine = Applicant(name=name, urls=urls or ("http://10.1.0.1:8000",), **more)
        return await self.door.receive(Application(run_id="unit", engine=engine), address)

    async def refusal(self, *urls: str, **more: Any) -> tuple[int, str]:
        with pytest.raises(ApplicationRefused) as caught:
            await self.says(*urls, **more)
        return caught.value.status, str(caught.value)


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_an_engine_is_taken_in_and_told_when_to_come_again(desk: Desk) -> None:
    assert await desk.says() == Admitted(again_seconds=10.0)
    (event,) = desk.events
    assert isinstance(event, EngineApplied)
    assert (event.id, event.application.engine.name, list(desk.fleet.engines)) == (7, "a0", ["a0"])


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://10.1.0.1:8000", "10.1.0.1"),
        ("http://10.1.0.1:8000", "::ffff:10.1.0.1"),
        ("http://10.1.0.1:8000", "10.1.200.1"),  # another interface of it, where engines may be
        ("http://[2001:db8::7]:8000", "2001:db8::7"),
        ("http://node1:8000", "10.9.0.1"),
        ("http://node1:8000", "fe80::1%eth1"),
        ("http://node1:8000", "192.0.2.1"),  # the proxy before the daemon
    ],
)
async def test_it_comes_from_where_it_says_that_it_is(desk: Desk, url: str, address: str) -> None:
    await desk.says(url, address=address)
    assert list(desk.fleet.engines) == ["a0"]


@pytest.mark.parametrize("address", ["10.9.0.2", "127.0.0.1", "192.0.2.4", "unknown", ""])
async def test_nobody_speaks_of_another_host(desk: Desk, address: str) -> None:
    status, reason = await desk.refusal("http://node1:8000", address=address)
    assert (status, desk.events) == (403, [])
    assert reason.startswith(
        f"url 'http://node1:8000': this comes from {address}, which is not the address of its host"
    )
    assert "Fix: " in reason


async def test_hosts_that_engines_may_not_be_on_are_not_even_looked_up(desk: Desk) -> None:
    for url in ("http://evil.example", "http://127.0.0.1:6379", "http://169.254.169.254", "http://0x7f.1"):
        status, reason = await desk.refusal(url)
        assert (status, f"url '{url}': its host is in none of" in reason) == (409, True)
    assert desk.looked_up == []


@pytest.mark.parametrize(
    "url", ["10.1.0.1:8000", "ftp://10.1.0.1", "http://u:p@10.1.0.1", "http://10.1.0.1/?x", "http://10.1.0.1:0", "",
            "http://10.1.0.1/\u202ex"],
)  # fmt: skip
async def test_what_is_no_url_is_refused(desk: Desk, url: str) -> None:
    status, reason = await desk.refusal(url)
    assert (status, reason.startswith("url: "), "Fix: " in reason) == (403, True, True)


async def test_a_kind_that_nobody_can_call_is_refused(desk: Desk) -> None:
    assert await desk.refusal(kind="abacus") == (403, "kind 'abacus': there is no such client. Fix: one of vllm")


async def test_a_refusal_is_logged_once_and_again_when_it_is_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applications, "MAX_REMEMBERED", 2)
    with capture_logs() as logs:
        for _ in range(3):
            await desk.refusal(name="b0")
        await desk.refusal("http://8.8.8.8", name="a0")
        await desk.refusal("http://9.9.9.9", name="a0")
    assert [entry["engine"] for entry in logs] == ["b0", "a0", "a0"]
    assert {entry["log_level"] for entry in logs} == {"warning"}
    for number in range(5):
        await desk.refusal(name=f"b{number}")
    assert list(desk.door._refused) == ["b3", "b4"]


async def test_a_full_house_and_a_run_of_others_are_said(desk: Desk) -> None:
    await desk.says()
    status, reason = await desk.refusal("http://10.1.0.2:1", name="a1")
    assert (status, "engines_admit.at_most is 1" in reason) == (409, True)
    closed = Desk(admission=None)
    status, reason = await closed.refusal()
    assert (status, "set engines_admit" in reason) == (409, True)


async def test_a_host_that_cannot_be_looked_up_is_asked_for_again(desk: Desk) -> None:
    status, reason = await desk.refusal("http://node2:1", address="10.9.0.1")
    assert (status, reason) == (503, "url: host 'node2' cannot be looked up here: nobody knows it")
    assert desk.door._lookups == 0


async def test_only_so_many_are_looked_up_at_once_and_none_for_ever(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    async def hangs(host: str) -> frozenset[str]:
        await waiting.wait()
        return frozenset({"10.9.0.1"})

    desk.door._resolver = hangs
    held = [
        asyncio.ensure_future(desk.says(f"http://node{number}:1", address="10.9.0.9", name=f"a{number}"))
        for number in range(applications.MAX_LOOKUPS)
    ]
    await asyncio.sleep(0)
    assert (await desk.refusal("http://node9:1", address="10.9.0.9", name="a9"))[0] == 503
    waiting.set()
    outcomes = await asyncio.gather(*held, return_exceptions=True)
    assert [getattr(outcome, "status", 0) for outcome in outcomes] == [403] * applications.MAX_LOOKUPS
    monkeypatch.setattr(applications, "LOOKUP_SECONDS", 0.0)
    waiting.clear()
    assert (await desk.refusal("http://node9:1", address="10.9.0.9", name="a9"))[0] == 503
    assert desk.door._lookups == 0


async def test_a_slow_disk_is_said(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(event: Event) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(applications, "DURABLE_SECONDS", 0.0)
    desk.door._post = never
    status, reason = await desk.refusal()
    assert (status, "not in the journal" in reason) == (503, True)


async def test_of_two_that_come_at_once_one_is_told_no(desk: Desk) -> None:
    """Both were checked before either was decided."""

    async def lost(event: Event) -> None:
        other = Application(run_id="unit", engine=Applicant(name="a1", urls=("http://10.1.0.2:1",)))
        await desk.post(EngineApplied(1, other))
        await desk.post(event)

    desk.door._post = lost
    status, reason = await desk.refusal()
    assert (status, "at_most is 1" in reason, list(desk.fleet.engines)) == (409, True, ["a1"])


async def test_the_daemons_resolver_tells_addresses() -> None:
    assert await addresses_of("127.0.0.1") == {"127.0.0.1"}
