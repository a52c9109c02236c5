"""``status`` and ``rounds``: from the daemon, or from the journal when the daemon is down."""

import argparse
import asyncio
import sys
import time
from typing import Literal, TypeVar

import msgspec
from weightsync.orchestrator.cli.asking import daemon_of
from weightsync.orchestrator.cli.client import Denied, Unreachable, fetch, tls_for
from weightsync.orchestrator.cli.common import Exit
from weightsync.orchestrator.cli.tables import check_line, rounds_text, status_text
from weightsync.orchestrator.core.errors import JournalUnreadable
from weightsync.orchestrator.daemon.admin import from_journal as admin_journal
from weightsync.orchestrator.daemon.admin.views import RoundsView, StatusView
from weightsync.orchestrator.daemon.journal import JournalError, JournalLost
from weightsync.orchestrator.settings.settings import Settings

View = TypeVar("View", StatusView, RoundsView)


def show(what: Literal["status", "rounds"], options: argparse.Namespace) -> int:
    """Prints the view and returns the exit code.

    Raises:
        ConfigError: the configuration or the token file cannot be used.
    """
    found = daemon_of(options)
    if found is None:
        return Exit.USAGE
    url, token, settings = found
    route = "/status" if what == "status" else f"/rounds?last={options.last}"
    code: int = Exit.OK
    view: StatusView | RoundsView
    try:
        data = asyncio.run(fetch(url + route, token, options.timeout, tls=tls_for(url, settings)))
        view = _decode(data, StatusView) if what == "status" else _decode(data, RoundsView)
    except Denied as error:
        print(error, file=sys.stderr)
        return Exit.DENIED
    except Unreachable as error:
        print(error, file=sys.stderr)
        code = Exit.TEMPORARY
        known = None if settings is None else _from_journal(what, settings, options)
        if known is None:
            return code
        view = known
    if isinstance(view, StatusView) and options.check:
        print(check_line(view))
        return code or severity(view)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(view)).decode())
    elif isinstance(view, StatusView):
        print(status_text(view, time.time()))
    else:
        print(rounds_text(view.rounds, time.time()))
    return code


def severity(view: StatusView) -> int:
    """0: nothing is wrong; 1: something is; 2: nobody is served, or memory is torn."""
    return max((2 if problem.severity == "critical" else 1 for problem in view.problems), default=0)


def _decode(data: bytes, kind: type[View]) -> View:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreachable(f"an answer that is not the daemon's: {error}") from error


def _from_journal(what: str, settings: Settings, options: argparse.Namespace) -> StatusView | RoundsView | None:
    try:
        if what == "status":
            return admin_journal.status_from(settings)
        return admin_journal.rounds_from(settings, options.last)
    except (JournalError, JournalLost, JournalUnreadable) as error:
        print(f"nor can the journal be read: {error}", file=sys.stderr)
        return None
