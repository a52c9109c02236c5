"""``config check`` and ``config schema``: what is wrong before the daemon starts rather than after."""

import asyncio
import contextlib
import importlib.resources
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from weightsync.orchestrator.cli.common import Exit, json_text
from weightsync.orchestrator.daemon.access.descriptors import reachable, too_few
from weightsync.orchestrator.daemon.access.tls import CHEAP_SECONDS, ServerTls
from weightsync.orchestrator.daemon.engines.errors import EngineError, UnknownEngineKind
from weightsync.orchestrator.daemon.engines.interface import EngineClient
from weightsync.orchestrator.daemon.engines.kinds import CLIENTS, check_kinds, client_of, keys_now
from weightsync.orchestrator.daemon.run_directory.mounts import file_system_of, forgets, is_network
from weightsync.orchestrator.files.ownership import NotOurs, require_ours
from weightsync.orchestrator.protocol.findings import Finding, Findings, Level
from weightsync.orchestrator.settings.credentials import read_credentials
from weightsync.orchestrator.settings.places import is_loopback
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.secrets import read_secret
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings, load
from weightsync.orchestrator.settings.tls import client_context

EXAMPLE: Final = importlib.resources.files("weightsync.orchestrator.settings") / "example.yaml"

SHORT_TOKEN_CHARS: Final = 16
"""Shorter tokens can be guessed: 16 hexadecimal digits are 64 bits."""


def check(path: Path, *, probe: bool = False, as_json: bool = False, environ: Mapping[str, str] | None = None) -> int:
    """Prints what is found and returns the exit code: 0, or 78 if the daemon could not work with this.

    Raises:
        ConfigError: the file itself is wrong.
    """
    settings = load(path, environ)
    findings = [Finding("ok", f"{path}: run {settings.run.id}, {_engines(settings)}, {_ways(settings)}")]
    findings += findings_of(settings)
    if probe:
        findings += asyncio.run(_probe(settings))
    if as_json:
        told = Findings(place=socket.gethostname(), findings=tuple(findings))
        print(json_text(told))
    for finding in () if as_json else findings:
        print(f"{finding.level:<8}{finding.text}")
    return Exit.CONFIG if any(finding.level == "error" for finding in findings) else Exit.OK


def print_schema() -> int:
    """Prints the JSON schema of the configuration."""
    print(json_text(Settings.model_json_schema()))
    return Exit.OK


def print_example() -> int:
    """Prints the configuration that explains every key."""
    print(EXAMPLE.read_text(encoding="utf-8"), end="")
    return Exit.OK


def findings_of(settings: Settings) -> list[Finding]:
    """Everything that the configuration points to on this machine, without asking another one."""
    return [
        *_credentials(settings.credentials),
        *(
            finding
            for engine in settings.engines
            if engine.api_key_file is not None
            for finding in _secret(f"api_key_file of engine {engine.name}", engine.api_key_file)
        ),
        *_keys_of_admitted(settings),
        *_kinds(settings),
        *_state_directory(settings.state_directory),
        *_run_directory(settings.run.directory),
        *_address(settings),
        *_descriptors(settings),
    ]


def _keys_of_admitted(settings: Settings) -> Iterator[Finding]:
    admit = settings.engines_admit
    if admit is not None and admit.api_key_file is not None:
        yield from _secret("engines_admit.api_key_file", admit.api_key_file)


def _engines(settings: Settings) -> str:
    names = [engine.name for engine in settings.engines]
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    listed = f"{len(names)} engine{'s' * (len(names) != 1)}{f' ({shown})' if names else ''}"
    admit = settings.engines_admit
    return listed if admit is None else f"{listed} and at most {admit.at_most} that come by themselves"


def _ways(settings: Settings) -> str:
    return f"transport {settings.transport.type}, rendezvous {settings.rendezvous.type}"


def _credentials(directory: Path) -> Iterator[Finding]:
    try:
        credentials = read_credentials(directory)
    except ConfigError as error:
        yield Finding("error", str(error), check="credentials")
        return
    names = sorted({str(credential) for credential in credentials.values()})
    yield Finding("ok", f"{directory} ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})", check="credentials")


def _secret(key: str, path: Path) -> Iterator[Finding]:
    try:
        secret = read_secret(path)
    except ConfigError as error:
        yield Finding("error", str(error), check=key)
        return
    if len(secret) < SHORT_TOKEN_CHARS:
        what = f"{path} holds only {len(secret)} characters and can be guessed"
        yield Finding("warning", what, f"openssl rand -hex 32 > {path}", key)
    else:
        yield Finding("ok", str(path), check=key)


def _kinds(settings: Settings) -> Iterator[Finding]:
    for engine in settings.engines:
        try:
            check_kinds([engine])
        except UnknownEngineKind as error:
            yield Finding("error", str(error), check="engines[].kind")


def _state_directory(path: Path) -> Iterator[Finding]:
    kind = _file_system("state_directory", path)
    if isinstance(kind, Finding):
        yield kind
        return
    if is_network(kind):
        fix = "put it on a local or block device; on a network file system an fsync proves nothing"
        yield Finding("error", f"{path} is on {kind}, a network file system", fix, "state_directory")
        return
    yield from _writable("state_directory", path, "error")
    yield from _ours(path)
    if forgets(kind):
        what = f"{path} is on {kind} and is lost when the machine restarts"
        yield Finding("warning", what, "put it on a disk", "state_directory")


def _ours(path: Path) -> Iterator[Finding]:
    """What the daemon would believe, and somebody else could have written: the journal decides what is committed."""
    try:
        for place in (path, *sorted(path.iterdir())) if path.is_dir() else ():
            require_ours(place)
    except NotOurs as error:
        yield Finding("error", f"{error.place}: {error.what}", error.fix, "state_directory")
    except OSError as error:
        what = f"{path} cannot be looked at: {error.strerror}"
        yield Finding("error", what, f"chmod u+rwx {path}", "state_directory")


def _file_system(key: str, path: Path) -> str | Finding:
    """What holds ``path``, or what is wrong with it: links in a circle, a name that no file system takes."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)
        return file_system_of(path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Finding("error", f"{path} cannot be looked at: {reason}", "give the path of a directory", key)


def _run_directory(path: Path) -> Iterator[Finding]:
    kind = _file_system("run.directory", path)
    if isinstance(kind, Finding):
        yield kind
        return
    yield from _writable("run.directory", path, "error")
    if path.is_dir() and is_network(kind):
        what = f"{kind} sends no events, so STABLE is seen at the next rescan"
        yield Finding("note", what, check="run.directory")


def _writable(key: str, path: Path, level: Level) -> Iterator[Finding]:
    """Whether the directory can be written, or made; without making it."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        yield Finding(level, f"{existing} is no directory", "give the path of a directory", key)
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(level, f"{existing} cannot be written", "change its owner or its mode", key)
    elif existing != path:
        yield Finding("ok", f"{path} does not exist yet and can be made", check=key)
    else:
        yield Finding("ok", f"{path} can be written ({file_system_of(path)})", check=key)


def _address(settings: Settings) -> Iterator[Finding]:
    host, port = settings.listen.host, settings.listen.port
    yield _port("listen.port", host, port)
    yield from _tls(settings)
    yield Finding("ok", f"agents are told to come to {settings.agents_url}", check="advertise_url")
    if settings.listen.insecure and settings.listen.tls is None and not is_loopback(host):
        what = f"without TLS on {host}, viewers' and operators' tokens can be read there"
        yield Finding("warning", what, "set listen.tls, or keep others off that network", "listen.insecure")
    if settings.rendezvous.group_address() is not None:
        what = "tcpstore unpickles what its peers send"
        yield Finding("warning", what, "use it on a trusted network only, or rendezvous: {type: hub}", "rendezvous")


def _descriptors(settings: Settings) -> Iterator[Finding]:
    # Under systemd another limit may hold than in this shell.
    problem = too_few(reachable(), settings)
    if problem is not None:
        yield Finding("error", problem.problem, problem.fix, "open files")


def _tls(settings: Settings) -> Iterator[Finding]:
    tls = settings.listen.tls
    engines = settings.engines_tls
    try:
        if tls is not None:
            yield _handshake(tls.certificate_file, ServerTls(tls).handshake_seconds)
        client_context(engines.ca_file, engines.certificate_file, engines.key_file)
    except ConfigError as error:
        yield Finding("error", str(error), check="tls")


def _handshake(certificate: Path, seconds: float) -> Finding:
    """What each stranger's handshake costs the daemon."""
    if seconds <= CHEAP_SECONDS:
        return Finding("ok", str(certificate), check="listen.tls")
    what = f"a handshake with {certificate} takes {seconds * 1e3:.1f} ms, in which the daemon hears nobody"
    return Finding("warning", f"{what}: so it serves fewer strangers", "take a key of the curve P-256", "listen.tls")


def _port(key: str, host: str, port: int) -> Finding:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Finding("note", f"{host}:{port} cannot be bound now ({reason}); is a daemon running?", check=key)
    return Finding("ok", f"{host}:{port} is free", check=key)


async def _probe(settings: Settings) -> list[Finding]:
    known = [engine for engine in settings.engines if engine.kind in CLIENTS]  # of the others it is said already
    found = await asyncio.gather(*(_probe_one(engine, settings) for engine in known))
    return [finding for findings in found for finding in findings]


async def _probe_one(engine: EngineSection, settings: Settings) -> list[Finding]:
    check, seconds = f"engine {engine.name}", settings.deadlines.probe_seconds
    keys = keys_now(settings, engine.name)
    client = client_of(engine, settings.pause, settings.engines_tls, lambda: keys)
    try:
        facts = await client.probe(seconds)
        notes = "".join(f", {note}" for note in facts.notes)
        return [
            Finding("ok", f"{facts.server}, {facts.ranks} ranks{notes}", check=check),
            *await _lands(client, check, seconds),
        ]
    except EngineError as error:
        return [Finding("error" if error.fault == "config" else "warning", str(error))]
    finally:
        await client.close()


async def _lands(client: EngineClient, check: str, seconds: float) -> list[Finding]:
    """How versions land in the engine's ranks, and why."""
    try:
        told = await client.landing(seconds)
    except EngineError as error:
        return [Finding("note", f"does not tell how versions land in it: {error}", check=check)]
    return [Finding("ok", line, check=check) for line in told]
