"""``weightsync-orchestrator doctor``: everything that can be looked at from the daemon's host, in one table."""

import argparse
import asyncio
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from weightsync.orchestrator.cli.common import json_text
from weightsync.orchestrator.cli.config import findings_of
from weightsync.orchestrator.cli.doctor import directories, places, running, servers
from weightsync.orchestrator.cli.doctor.weak import weak
from weightsync.orchestrator.core.errors import JournalUnreadable
from weightsync.orchestrator.daemon.admin import from_journal
from weightsync.orchestrator.daemon.journal import JournalError, JournalLost
from weightsync.orchestrator.protocol.findings import Finding, Findings, broke, examined, exit_code, findings_text
from weightsync.orchestrator.settings.settings import Settings, load

RANKS_GUESSED: Final = 8
"""Agents of an engine, and of a trainer without ``trainer.world``, until somebody is connected."""


def diagnose(options: argparse.Namespace) -> int:
    """Prints what is found; 0: nothing is wrong, 1: warnings, 2: errors.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    settings = load(options.config)
    findings = [*here(options.config, settings), *asyncio.run(elsewhere(settings, options.timeout))]
    if options.json:
        told = Findings(place=socket.gethostname(), findings=tuple(findings))
        print(json_text(told))
    else:
        print(findings_text(findings))
    return exit_code(findings)


def here(config: Path, settings: Settings) -> list[Finding]:
    """What this host shows, nobody asked."""
    run, state = settings.run.directory, settings.state_directory
    found = examined("configuration", lambda: weak(config, settings))
    pid = running.daemon_pid(settings)
    found += examined("configuration", lambda: _but_what_the_daemon_has(findings_of(settings), pid))
    found += examined("run.directory", lambda: directories.run_directory(run))
    found += examined("state_directory", lambda: directories.state_directory(state))
    if settings.transport.type == "filesystem":
        found += examined("transport", lambda: directories.room_for_checkpoints(run, _version_bytes(settings)))
    if pid is not None:
        root = running.PROC / str(pid) / "root"
        found += examined("sandbox", lambda: running.sandbox(root, {"run.directory": run, "state_directory": state}))
    engines = len(settings.engines) + (0 if settings.engines_admit is None else settings.engines_admit.at_most)
    ranks = RANKS_GUESSED * engines + (settings.trainer.world or RANKS_GUESSED)
    found += examined("open files", lambda: running.open_files(running.file_limit(pid), ranks, engines))
    return found


async def elsewhere(settings: Settings, seconds: float) -> list[Finding]:
    """What the engines' servers and a running daemon answer, each within ``seconds``."""
    urls = places.urls_of(settings)
    found = [finding for url, engine in urls.items() for finding in places.written(url, engine, settings)]
    addresses, unknown = await places.resolved(urls, seconds)
    found += unknown
    found += examined("engines", lambda: places.same_place(addresses, urls))
    found += examined("engines", lambda: places.exposed(addresses, urls))
    found += examined("advertise_url", lambda: places.reachable_from_there(settings, addresses))
    try:
        found += await running.daemon(settings, seconds)
        there = {url: engine for url, engine in urls.items() if url in addresses}
        seen = await servers.ask_all(settings, seconds, there)
    except Exception as error:  # as ``examined``
        return [*found, broke("engines", error)]
    found += [finding for each in seen for finding in each.findings]
    return found + examined("engines", lambda: servers.together(seen))


def _but_what_the_daemon_has(found: Iterable[Finding], pid: int | None) -> Iterator[Finding]:
    """Without the note that its port cannot be bound, where the daemon is who has it."""
    for finding in found:
        if pid is None or (finding.check, finding.level) != ("listen.port", "note"):
            yield finding


def _version_bytes(settings: Settings) -> int:
    """Bytes of the newest round that moved any; 0 where none is known."""
    try:
        rows = from_journal.rounds_from(settings, last=20).rounds
    except (JournalError, JournalLost, JournalUnreadable):
        return 0
    return next((row.bytes for row in reversed(rows) if row.bytes), 0)
