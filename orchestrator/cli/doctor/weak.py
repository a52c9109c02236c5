"""Settings that work and let in more than they need to: what docs/security.md warns of, as far as files show it.

What is refused at the start (a token that others can read, a short one, no TLS beyond this machine) is told by
``config check`` already, and so are ``listen.insecure``, ``tcpstore`` and keys whose handshakes take long.
"""

import os
import stat
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from weightsync.orchestrator.files.ownership import NotOurs, followed
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.settings.credentials import SUFFIX, Credential, read_credentials
from weightsync.orchestrator.settings.engine_lists import files_of
from weightsync.orchestrator.settings.places import is_loopback
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.secrets import read_tokens
from weightsync.orchestrator.settings.settings import Settings

LEAST_PREFIX: Final = {4: 8, 6: 32}
"""Of a network that may still be one of engines, by version of IP: 10.0.0.0/8."""


def weak(config: Path, settings: Settings) -> Iterator[Finding]:
    """All of them, nobody asked."""
    yield from _told_by(config, "configuration", "what the daemon is told")
    for path in _lists(settings):
        yield from _told_by(path, "engines_from", "to which servers the daemon sends its keys")
    yield from _plain_engines(settings)
    yield from _admitted(settings)
    yield from _run_directory(settings)
    yield from _authority(settings)
    yield from _old_tokens(settings.credentials)
    if settings.fan_out != "trainer":
        what = f"{settings.fan_out}: who is on the agents' data network may reach the weights that engines serve"
        yield Finding("note", what, "close that network to everybody else, or fan_out: trainer", "fan_out")


def _told_by(path: Path, key: str, what: str) -> Iterator[Finding]:
    """Whether nobody but us and root could have written the file, or put it there."""
    try:
        followed(path)
    except NotOurs as error:
        yield Finding("warning", f"{error.place}: {error.what}: they decide {what}", error.fix, key)
    else:
        yield Finding("ok", str(path), check=key)


def _lists(settings: Settings) -> list[Path]:
    return [] if settings.engines_from is None else files_of(settings.engines_from)


def _plain_engines(settings: Settings) -> Iterator[Finding]:
    for engine in settings.engines:
        for url in engine.servers:
            parts = urlsplit(url)
            if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
                also = " and its api_key_file" if engine.api_key_file is not None else ""
                what = f"{url} is not TLS: whoever reads that network reads the key of its admin routes{also}"
                fix = "--ssl-certfile and --ssl-keyfile of vLLM, and https in its url"
                yield Finding("warning", what, fix, f"engine {engine.name}")


def _admitted(settings: Settings) -> Iterator[Finding]:
    """Who holds ``engine.token`` has the daemon send requests to these hosts, from any of which an engine may come."""
    admit = settings.engines_admit
    if admit is None:
        return
    for key, places in (("hosts", admit.hosts), ("proxies", admit.proxies)):
        for place in filter(_is_wide, places):
            what = f"{place} is nearly everywhere: whoever holds an engine's token has the daemon call any host there"
            if key == "proxies":
                what = f"{place} is nearly everywhere: an engine's token serves to speak for engines on other hosts"
            fix = f"name the networks and hosts of your {'engines' if key == 'hosts' else 'proxies'} only"
            yield Finding("warning", what, fix, f"engines_admit.{key}")


def _is_wide(place: str) -> bool:
    try:
        network = ip_network(place)
    except ValueError:  # a pattern of names
        return not place.strip("*?.")
    return network.prefixlen < LEAST_PREFIX[network.version]


def _run_directory(settings: Settings) -> Iterator[Finding]:
    path = settings.run.directory
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return
    if mode & 0o002:
        what = f"{path} has mode {mode:04o}: everybody on its hosts can leave markers there"
        if settings.transport.type == "filesystem":
            what += ", and replace weights before engines load them, so that rounds fail"
        fix = f"chmod o-w {path}, and a group that daemon and trainer share"
        yield Finding("warning", what, fix, "run.directory")


def _authority(settings: Settings) -> Iterator[Finding]:
    """The authority's key is not needed here, and whoever has it is everybody."""
    tls = settings.listen.tls
    if tls is None:
        return
    for key in dict.fromkeys(path.with_suffix(".key") for path in (tls.ca_file, tls.ca_file.resolve())):
        if key.exists() and key != tls.key_file:
            what = f"{key} is the key of listen.tls.ca_file: whoever has it makes certificates for every role"
            yield Finding("warning", what, "keep it off the daemon's host", "listen.tls.ca_file")


def _old_tokens(directory: Path) -> Iterator[Finding]:
    """Files with two tokens: one of them is on its way out, and still opens."""
    try:
        credentials = read_credentials(directory)
    except ConfigError:
        return  # ``config check`` tells it
    for credential in sorted(set(credentials.values()), key=str):
        path = directory / f"{_stem(credential)}{SUFFIX}"
        if len(read_tokens(path)) > 1:
            what = f"{path} holds two tokens, and the old one opens as well as the new one"
            fix = "remove its second line once everybody has the first"
            yield Finding("note", what, fix, "credentials")


def _stem(credential: Credential) -> str:
    return credential.role + (f".{credential.name}" if credential.name else "")
