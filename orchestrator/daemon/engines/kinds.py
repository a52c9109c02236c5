"""The kinds of engine that ``engines[].kind`` of the settings may name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from weightsync.orchestrator.daemon.engines.errors import UnknownEngineKind
from weightsync.orchestrator.daemon.engines.interface import EngineClient, EngineFactory, EngineSetup
from weightsync.orchestrator.daemon.engines.several import SeveralServers
from weightsync.orchestrator.daemon.engines.vllm import VllmClient
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.proof import admin_key
from weightsync.orchestrator.settings.credentials import Credential, read_credentials, tokens_of_engines
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.secrets import read_secret
from weightsync.orchestrator.settings.sections import EngineSection, EnginesTls, PauseSection
from weightsync.orchestrator.settings.settings import Settings
from weightsync.orchestrator.settings.tls import client_context

CLIENTS: Final[dict[str, EngineFactory]] = {"vllm": VllmClient}
"""Kind to client. A new kind of engine is one more line."""


def check_kinds(engines: Iterable[EngineSection]) -> None:
    """Refuse what nobody here can talk to.

    Raises:
        UnknownEngineKind: of the first such engine.
    """
    for engine in engines:
        if engine.kind not in CLIENTS:
            raise UnknownEngineKind(engine.name, engine.kind, tuple(CLIENTS))


def client_of(
    engine: EngineSection, pause: PauseSection, tls: EnginesTls, admin_keys: Callable[[], Sequence[str]]
) -> EngineClient:
    """The client of one configured engine. Call it inside a running loop.

    Args:
        admin_keys: see ``EngineSetup``.

    Raises:
        UnknownEngineKind: as ``check_kinds``.
        ConfigError: its key file, or one of ``tls``, cannot be read.
    """
    check_kinds([engine])
    api_key = None if engine.api_key_file is None else read_secret(engine.api_key_file)
    is_tls = any(url.startswith("https") for url in engine.servers)
    context = client_context(tls.ca_file, tls.certificate_file, tls.key_file) if is_tls else None
    clients = [
        CLIENTS[engine.kind](EngineSetup(engine.name, url, api_key, pause.mode, pause.cache, context, admin_keys))
        for url in engine.servers
    ]
    return clients[0] if len(clients) == 1 else SeveralServers(clients)


def admin_keys(known: Mapping[str, Credential], run_id: str, engine: str) -> tuple[str, ...]:
    """Of each token that ``engine`` may hold."""
    tokens = tokens_of_engines(known)
    return tuple(admin_key(each, run_id, engine) for each in (*tokens.get(engine, ()), *tokens.get("", ())))


def keys_now(settings: Settings, engine: str) -> tuple[str, ...]:
    """The admin keys of ``engine`` by the credentials as they are on disk; none where these cannot be read, which
    whoever looks at the settings says.
    """
    try:
        return admin_keys(read_credentials(settings.credentials), settings.run.id, engine)
    except ConfigError:
        return ()


def section_of(engine: Applicant, settings: Settings) -> EngineSection:
    """An engine that was admitted as if the configuration listed it."""
    admit = settings.engines_admit
    return EngineSection(
        name=engine.name,
        kind=engine.kind,
        url=engine.urls[0],
        more_urls=engine.urls[1:],
        role=engine.role,
        pair=engine.pair or None,
        api_key_file=None if admit is None else admit.api_key_file,
    )
