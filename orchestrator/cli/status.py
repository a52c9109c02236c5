"""``status``, ``rounds`` and ``rounds show``: from the daemon, or from the journal when the daemon is down."""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec
from weightsync.orchestrator.cli.asking import daemon_of
from weightsync.orchestrator.cli.client import Denied, Unreachable, fetch, tls_for
from weightsync.orchestrator.cli.common import MAX_OPTION_COUNT, Exit, json_text
from weightsync.orchestrator.cli.tables import check_line, round_text, rounds_text, status_text
from weightsync.orchestrator.core.errors import JournalUnreadable
from weightsync.orchestrator.daemon.admin import from_journal as admin_journal
from weightsync.orchestrator.daemon.admin.views import RoundsView, StatusView
from weightsync.orchestrator.daemon.journal import JournalError, JournalLost
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.settings.settings import Settings

View = TypeVar("View", StatusView, RoundsView)


def show(what: Literal["status", "rounds"], options: argparse.Namespace) -> int:
    """Prints the view and returns the exit code.

    Raises:
        ConfigError: the configuration or the token file cannot be used.
    """
    if what == "rounds":
        return _rounds(options)
    if options.ready:
        return _ready(options)
    view, code = _view(options, "/status", StatusView, admin_journal.status_from)
    if view is None:
        return code
    if options.check:
        judged = code or severity(view)
        said = check_line(view)
        print(json_text({"exit": int(judged), "says": said, "problems": view.problems}) if options.json else said)
        return judged
    print(json_text(view) if options.json else status_text(view, time.time()))
    return code


def _ready(options: argparse.Namespace) -> int:
    """Whether the daemon at the configuration's address does what it decides; nobody has to be known for that."""
    found = daemon_of(options, None)
    if found is None:
        return Exit.USAGE
    url, _, settings = found
    try:
        answer = asyncio.run(fetch(url + "/readyz", None, options.timeout, tls=tls_for(url, settings)))
    except (Denied, Unreachable) as error:
        if options.json:
            print(json_text({"ready": False, "says": str(error)}))
        else:
            print(error, file=sys.stderr)
        return Exit.TEMPORARY
    said = clean(answer.decode(errors="replace").strip(), 300)
    print(json_text({"ready": True, "says": said}) if options.json else said)
    return Exit.OK


def _rounds(options: argparse.Namespace) -> int:
    if options.of and (len(options.of) != 2 or options.of[0] != "show"):
        given = clean(" ".join(options.of), 100)
        print(f"rounds {given}: write rounds show ROUND, such as rounds show 3.17", file=sys.stderr)
        return Exit.USAGE
    view, code = rounds_view(options, MAX_OPTION_COUNT if options.of else options.last)
    if view is None:
        return code
    if not options.of:
        print(json_text(view) if options.json else rounds_text(view.rounds, time.time()))
        return code
    row = next((row for row in view.rounds if row.round == options.of[1]), None)
    if row is None:
        known = f"; there are {view.rounds[0].round} to {view.rounds[-1].round}" if view.rounds else ""
        print(f"no round {clean(options.of[1], 100)} has ended{known}", file=sys.stderr)
        return Exit.REFUSED
    print(json_text(row) if options.json else round_text(row, time.time()))
    return code


def rounds_view(options: argparse.Namespace, last: int) -> tuple[RoundsView | None, int]:
    """The newest rounds, from the daemon or else from the journal, and the exit code; None: from neither, as is said.

    Raises:
        ConfigError: as ``show``.
    """
    return _view(
        options, f"/rounds?last={last}", RoundsView, lambda settings: admin_journal.rounds_from(settings, last)
    )


def _view(
    options: argparse.Namespace, route: str, kind: type[View], from_journal: Callable[[Settings], View]
) -> tuple[View | None, int]:
    found = daemon_of(options)
    if found is None:
        return None, Exit.USAGE
    url, token, settings = found
    try:
        data = asyncio.run(fetch(url + route, token, options.timeout, tls=tls_for(url, settings)))
        return decoded(data, kind), Exit.OK
    except Denied as error:
        print(error, file=sys.stderr)
        return None, Exit.DENIED
    except Unreachable as error:
        print(error, file=sys.stderr)
    try:
        return None if settings is None else from_journal(settings), Exit.TEMPORARY
    except (JournalError, JournalLost, JournalUnreadable) as error:
        print(f"nor can the journal be read: {error}", file=sys.stderr)
        return None, Exit.TEMPORARY


def severity(view: StatusView) -> int:
    """0: nothing is wrong; 1: something is; 2: nobody is served, or memory is torn."""
    return max((2 if problem.severity == "critical" else 1 for problem in view.problems), default=0)


def decoded(data: bytes, kind: type[View]) -> View:
    """A view of the daemon's.

    Raises:
        Unreachable: it is none.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreachable(f"an answer that is not the daemon's: {error}") from error
