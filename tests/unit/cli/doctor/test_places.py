"""What URLs show by themselves, with real names and addresses."""

import socket
from pathlib import Path

import pytest
from weightsync.orchestrator.cli.doctor import places
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.settings.settings import Settings, load


@pytest.fixture
def settings(config: Path) -> Settings:
    return load(config, {})


def with_urls(config: Path, *urls: str, **environ: str) -> Settings:
    engines = ", ".join(f"{{name: e{n}, url: '{url}'}}" for n, url in enumerate(urls))
    return load(config, {"WEIGHTSYNC__ENGINES": f"[{engines}]", **environ})


@pytest.mark.parametrize(
    ("url", "level", "text"),
    [
        ("http://h:8000", None, ""),
        ("http://h:8000/", None, ""),
        ("http://h:8000/v1", "error", "url: http://h:8000"),
        ("http://h:8000/v1/", "error", "url: http://h:8000"),
        ("http://h:8000/v1/chat/completions", "error", "url: http://h:8000"),
        ("http://h/engines/a", "note", "http://h"),
    ],
)
def test_the_path_of_a_url(config: Path, url: str, level: str | None, text: str) -> None:
    settings = with_urls(config, url)
    found = [f for u, engine in places.urls_of(settings).items() for f in places.written(u, engine, settings)]
    assert [finding.level for finding in found] == ([] if level is None else [level])
    assert all(text in finding.fix for finding in found)


async def test_names_are_resolved_and_those_without_an_address_told(config: Path) -> None:
    urls = places.urls_of(with_urls(config, "http://localhost:8000", "http://nowhere.invalid:8000"))
    addresses, [found] = await places.resolved(urls, 10)
    assert ("127.0.0.1", 8000) in addresses["http://localhost:8000"]
    assert list(addresses) == ["http://localhost:8000"]
    assert (found.level, found.check) == ("error", "engine e1")


def test_two_names_of_one_port(config: Path) -> None:
    urls = places.urls_of(with_urls(config, "http://localhost:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8001"))
    addresses = {url: {("127.0.0.1", int(url.rpartition(":")[2]))} for url in urls}
    [found] = places.same_place(addresses, urls)
    assert (found.level, found.check) == ("error", "engine e0, e1")
    assert list(places.same_place({url: at for url, at in addresses.items() if "localhost" not in url}, urls)) == []


def test_a_name_and_the_loopback_of_this_host_are_one(config: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # sends nothing: it asks which address this host would use
        own = route.getsockname()[0]
    urls = places.urls_of(with_urls(config, f"http://{own}:8000", "http://127.0.0.1:8000"))
    found = list(places.same_place({url: {(url[7:].partition(":")[0], 8000)} for url in urls}, urls))
    assert [finding.level for finding in found] == ["error"]


def test_public_addresses(config: Path) -> None:
    urls = places.urls_of(with_urls(config, "http://a:8000", "http://b:8000"))
    addresses = {"http://a:8000": {("8.8.8.8", 8000)}, "http://b:8000": {("10.0.0.7", 8000), ("fe80::1%eth0", 8000)}}
    [found] = places.exposed(addresses, urls)
    assert (found.level, found.check) == ("warning", "engine e0")


def test_agents_elsewhere_cannot_come_to_a_loopback(config: Path) -> None:
    settings = with_urls(config, "http://a:8000")
    [found] = places.reachable_from_there(settings, {"http://a:8000": {("10.255.255.7", 8000)}})
    assert (found.level, found.check) == ("error", "advertise_url")
    assert list(places.reachable_from_there(settings, {"http://a:8000": {("127.0.0.1", 8000)}})) == []
    told = with_urls(config, "http://a:8000", WEIGHTSYNC__ADVERTISE_URL="http://head:7410")
    assert list(places.reachable_from_there(told, {"http://a:8000": {("10.255.255.7", 8000)}})) == []


def test_the_daemons_own_port_is_no_engine(settings: Settings) -> None:
    url = f"http://localhost:{settings.listen.port}"
    found: list[Finding] = list(places.reachable_from_there(settings, {url: {("127.0.0.1", settings.listen.port)}}))
    assert [finding.check for finding in found] == ["engines[].url"]
