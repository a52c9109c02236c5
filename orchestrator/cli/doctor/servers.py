"""The engines' servers, asked: is each the one that is meant, with our routes and our backend, and only one?"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from weightsync.orchestrator.cli.doctor.looking import Heard, Opening, Silent, look
from weightsync.orchestrator.cli.doctor.vllm_server import BACKEND, INFO, ServerInfo, server_info
from weightsync.orchestrator.daemon.engines.errors import EngineError, EngineRefused, EngineUnreachable
from weightsync.orchestrator.daemon.engines.interface import EngineFacts
from weightsync.orchestrator.daemon.engines.kinds import CLIENTS, client_of, keys_now
from weightsync.orchestrator.daemon.engines.vllm import TRANSFER_CONFIG
from weightsync.orchestrator.protocol.findings import Finding, Level, broke
from weightsync.orchestrator.settings.secrets import read_secret
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings
from weightsync.orchestrator.settings.tls import client_context

LOOKS: Final = 4
"""At one URL, each over a connection of its own: a balancer over two servers shows the same one by chance in one of
eight times."""

SKEW_SECONDS: Final = 3.0
"""A date tells whole seconds, and an answer takes a while."""

AT_ONCE: Final = 32
"""Engines that are asked at a time."""

ADMIN_ROUTE: Final = "/is_paused"
"""Asked without a key: our plugin refuses that."""

GUARDED: Final = "weightsync: this route asks"
"""How its refusal begins."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One server: whose it is, what it says of itself, and what its probe found; the findings about it alone."""

    engine: str
    url: str
    info: ServerInfo | None
    facts: EngineFacts | None
    findings: tuple[Finding, ...]


async def ask_all(settings: Settings, seconds: float, urls: Mapping[str, EngineSection]) -> list[Seen]:
    """Asks the servers at ``urls``, of engines of a known kind."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(engine: EngineSection, url: str) -> Seen:
        async with gate:
            try:
                return await _ask(engine, url, settings, seconds)
            except Exception as error:  # of one server, and the others are wanted all the more
                return Seen(engine.name, url, None, None, (broke(f"engine {engine.name}", error),))

    asked = [one(engine, url) for url, engine in urls.items() if engine.kind in CLIENTS]
    return list(await asyncio.gather(*asked))


async def _ask(engine: EngineSection, url: str, settings: Settings, seconds: float) -> Seen:
    check = f"engine {engine.name}"
    keys = keys_now(settings, engine.name)
    alone = engine.model_copy(update={"url": url, "more_urls": ()})
    client = client_of(alone, settings.pause, settings.engines_tls, lambda: keys)
    files = settings.engines_tls
    tls = client_context(files.ca_file, files.certificate_file, files.key_file) if url.startswith("https:") else None
    stranger = Opening(tls=tls)
    try:
        facts = await client.probe(seconds)
    except EngineUnreachable as error:
        return Seen(engine.name, url, None, None, (await _silent(error, url, check, seconds, stranger),))
    except EngineError as error:
        return Seen(engine.name, url, None, None, (await _unfit(error, url, check, seconds, stranger),))
    finally:
        await client.close()
    opening = Opening(None if engine.api_key_file is None else read_secret(engine.api_key_file), keys, tls)
    # One by one: the first costs the server seconds, which looks up what it remembers for the others.
    looks = [await _look(url + INFO, seconds, opening) for _ in range(LOOKS)]
    infos = [info for info in (server_info(each.body) for each in looks if each is not None) if info is not None]
    info = infos[0] if infos else None
    # Of a light answer: a server that is busy tells the date at which it began to be.
    dates = [await _look(f"{url}/health", seconds, opening) for _ in range(LOOKS)]
    findings = [*_backend(info, check), *_balancer(infos, url, check), *clocks(dates, check)]
    findings += _closed(await _look(url + ADMIN_ROUTE, seconds, stranger), url, check)
    if not any(finding.level in ("error", "warning") for finding in findings):
        told = f", {BACKEND} backend" if info is not None else ""
        findings.append(Finding("ok", f"{url}: {facts.server}, {facts.ranks} ranks{told}", check=check))
    return Seen(engine.name, url, info, facts, tuple(findings))


async def _look(url: str, seconds: float, opening: Opening) -> Heard | None:
    try:
        return await look(url, seconds, opening)
    except Silent:
        return None


def _closed(heard: Heard | None, url: str, check: str) -> Iterator[Finding]:
    """Whether the server answers a stranger on an admin route."""
    if heard is not None and heard.status == 200:
        what = f"{url} answers {ADMIN_ROUTE} to whoever asks: nothing stands before its admin routes"
        fix = "unset WEIGHTSYNC_LOOPBACK_DEMO there, and use the plugin of this release"
        yield Finding("warning", what, fix, check)


async def _silent(error: EngineError, url: str, check: str, seconds: float, stranger: Opening) -> Finding:
    """What is there in the place of a server that does not answer as one."""
    try:
        await look(f"{url}/health", seconds, stranger)
    except Silent as silent:
        fix = "start the server, or give the port of vLLM (--port) in url; is a firewall between?"
        return Finding("warning", f"{url}: {silent}", fix, check)
    return Finding("warning", str(error), "look what stands between the daemon and the server", check)


async def _unfit(error: EngineError, url: str, check: str, seconds: float, stranger: Opening) -> Finding:
    """Something answers, and it is no vLLM that can take part."""
    try:
        health, ours = [await look(url + path, seconds, stranger) for path in ("/health", "/healthz")]
    except Silent as silent:
        return Finding("warning", f"{url}: {silent}", "is it busy, or still starting? Look at its log", check)
    if 300 <= health.status < 400:
        what = f"{url} sends on to {health.location}: a proxy or a load balancer"
        return Finding("error", what, "give the server's own url", check)
    if isinstance(error, EngineRefused) and error.excerpt.startswith(GUARDED):
        what = f"{url} does not know the admin key of {check}"
        fix = "its WEIGHTSYNC_TOKEN_FILE, _RUN_ID and _ENGINE must be those of our credentials, run.id and this name"
        return Finding("error", what, fix, check)
    if isinstance(error, EngineRefused) and error.status in (401, 403):
        what = f"{url} asks for a key"
        return Finding("error", what, "name a file with it in api_key_file of this engine", check)
    if health.status == 404:
        who = f" ({health.server})" if health.server else ""
        what = f"{url} is no vLLM: an HTTP server{who} without /health"
        if ours.status == 200:
            what += ", but with /healthz, as this project's daemon"
        return Finding("error", what, "give the port of vLLM (--port, by default 8000) in url", check)
    what, _, fix = str(error).partition(". Fix: ")
    level: Level = "error" if error.fault == "config" else "warning"
    return Finding(level, f"{url}: {what}", fix, check)


def _backend(info: ServerInfo | None, check: str) -> Iterator[Finding]:
    if info is None:
        yield Finding("note", "does not tell its configuration (/server_info): its backend is not known", check=check)
    elif info.backend != BACKEND:
        found = f"its weight transfer is of the backend {info.backend!r}" if info.backend else "has no weight transfer"
        yield Finding("error", found, f"start vLLM with {TRANSFER_CONFIG}", check)
    elif info.plugins is not None and BACKEND not in info.plugins:
        what = f"VLLM_PLUGINS={','.join(info.plugins)} keeps the plugin from being loaded"
        yield Finding("error", what, f"unset VLLM_PLUGINS, or add {BACKEND} to it", check)


def _balancer(infos: Iterable[ServerInfo], url: str, check: str) -> Iterator[Finding]:
    starts = {info.identity for info in infos if info.identity}
    if len(starts) > 1:
        what = (
            f"{url} leads to {len(starts)} servers in turn: a load balancer, behind which a pause reaches one of them"
        )
        yield Finding("error", what, "one entry with its own url for each server", check)


def clocks(answers: Iterable[Heard | None], check: str) -> Iterator[Finding]:
    """Whether the server's clock is ours."""
    skews = [answer.skew for answer in answers if answer is not None and answer.skew is not None]
    least = min(skews, key=abs, default=0.0)
    if abs(least) > SKEW_SECONDS:
        what = f"its clock is {abs(least):.0f} s {'ahead of' if least > 0 else 'behind'} this host's"
        yield Finding("warning", what, "synchronise both hosts' clocks (chrony, NTP): logs cannot be compared", check)


def together(seen: Iterable[Seen]) -> Iterator[Finding]:
    """What only several servers show: one that is listed twice, and different releases."""
    at: dict[str, list[Seen]] = defaultdict(list)
    releases: dict[str, list[str]] = defaultdict(list)
    for each in seen:
        if each.info is not None and each.info.identity:
            at[each.info.identity].append(each)
        if each.facts is not None:
            releases[each.facts.server].append(each.engine)
    for same in at.values():
        engines = sorted({each.engine for each in same})
        if len(engines) > 1:
            urls = " and ".join(sorted({each.url for each in same}))
            what = f"{urls} are one server, which {len(engines)} engines would pause and write"
            yield Finding("error", what, "remove one entry, or give it its own server's url", f"engine {engines[0]}")
    if len(releases) > 1:
        told = "; ".join(f"{server}: {', '.join(sorted(set(names))[:4])}" for server, names in sorted(releases.items()))
        yield Finding("note", f"the engines differ: {told}", check="engines")
