"""Where engines are said to be: what is wrong with a URL before anybody is asked there."""

import asyncio
import ipaddress
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urlsplit

from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings

Address = tuple[str, int]
"""An IP address and a port."""

HTTP_PORTS: Final = {"http": 80, "https": 443}


def urls_of(settings: Settings) -> dict[str, EngineSection]:
    """Each server's URL, without a slash at its end, and whose it is."""
    return {url.rstrip("/"): engine for engine in settings.engines for url in engine.servers}


def written(url: str, engine: EngineSection, settings: Settings) -> Iterator[Finding]:
    """What a URL shows by itself."""
    parts = urlsplit(url)
    check = f"engine {engine.name}"
    if "v1" in parts.path.split("/"):
        what = f"{url} ends in the path of the OpenAI API; the admin routes are beside it, not below"
        yield Finding("error", what, f"url: {parts.scheme}://{parts.netloc}", check)
    elif parts.path.strip("/"):
        what = f"the admin routes are asked for below {parts.path}, as only a proxy has them"
        yield Finding("note", what, f"give the server's own url, such as {parts.scheme}://{parts.netloc}", check)


async def resolved(urls: Mapping[str, EngineSection], seconds: float) -> tuple[dict[str, set[Address]], list[Finding]]:
    """The addresses of each URL, and what is wrong with those that have none."""
    loop = asyncio.get_running_loop()

    async def one(url: str) -> set[Address] | str:
        parts = urlsplit(url)
        port = parts.port or HTTP_PORTS[parts.scheme]
        try:
            async with asyncio.timeout(seconds):
                found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except TimeoutError:
            return f"no answer from the resolver within {seconds:g} s"
        except (OSError, UnicodeError) as error:
            return getattr(error, "strerror", None) or str(error)
        return {(str(address[0]), int(address[1])) for *_, address in found}

    addresses, findings = {}, []
    for url, answer in zip(urls, await asyncio.gather(*map(one, urls)), strict=True):
        if isinstance(answer, str):
            what = f"the name in {url} has no address: {answer}"
            findings.append(Finding("error", what, "mend the name, or the resolver", f"engine {urls[url].name}"))
        else:
            addresses[url] = answer
    return addresses, findings


def same_place(addresses: Mapping[str, set[Address]], urls: Mapping[str, EngineSection]) -> Iterator[Finding]:
    """URLs that lead to one port of one host under different names."""
    at: dict[Address, list[str]] = defaultdict(list)
    for url, found in addresses.items():
        for host, port in found:
            at[_canonical(host), port].append(url)
    told: set[tuple[str, ...]] = set()
    for (host, port), there in at.items():
        different = tuple(sorted(set(there)))
        if len(different) > 1 and different not in told:
            told.add(different)
            names = sorted({urls[url].name for url in different})
            what = f"{' and '.join(different)} are both {host}:{port}: one server, which two would pause and write"
            yield Finding("error", what, "give each entry the port of its own server", f"engine {', '.join(names)}")


def exposed(addresses: Mapping[str, set[Address]], urls: Mapping[str, EngineSection]) -> Iterator[Finding]:
    """Servers at addresses of the public internet, where anybody may try their admin routes."""
    for url, found in addresses.items():
        public = sorted({host for host, _ in found if ipaddress.ip_address(host.partition("%")[0]).is_global})
        if public:
            what = f"{url} is {public[0]}, a public address: anybody may try its admin routes, and guess at their key"
            fix = "let only its inference routes through from outside (a proxy, a firewall)"
            yield Finding("warning", what, fix, f"engine {urls[url].name}")


def reachable_from_there(settings: Settings, addresses: Mapping[str, set[Address]]) -> Iterator[Finding]:
    """Whether agents on other hosts are sent to themselves, or an engine's URL is the daemon's own."""
    ours = urlsplit(settings.agents_url)
    if _is_loopback(ours.hostname or ""):
        far = sorted(url for url, found in addresses.items() if not any(_is_here(host) for host, _ in found))
        if far:
            what = f"agents are told {settings.agents_url}, which on the host of {far[0]} is that host itself"
            yield Finding("error", what, "listen.host: an address that they reach, or advertise_url", "advertise_url")
    own = settings.listen.host, settings.listen.port
    for url, found in addresses.items():
        if any((_canonical(host), port) == (_canonical(own[0]), own[1]) for host, port in found):
            what = f"{url} is where this daemon itself listens"
            yield Finding("error", what, "give the port of vLLM (--port, by default 8000)", "engines[].url")


def _canonical(host: str) -> str:
    return "this host" if _is_here(host) else host


def _is_here(host: str) -> bool:
    """Whether the address is one of this host's: only those can be bound."""
    if _is_loopback(host):
        return True
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((host.partition("%")[0], 0))
    except OSError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
