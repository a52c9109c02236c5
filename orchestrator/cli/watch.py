"""``watch``: the status, again and again, in place."""

import argparse
import asyncio
import shutil
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
from weightsync.orchestrator.cli.asking import daemon_of
from weightsync.orchestrator.cli.client import Denied, Unreachable, fetch, tls_for
from weightsync.orchestrator.cli.common import Exit
from weightsync.orchestrator.cli.status import decoded
from weightsync.orchestrator.cli.tables import status_text
from weightsync.orchestrator.daemon.admin.views import StatusView

_ENTER: Final = "\x1b[?1049h\x1b[?25l"
"""The terminal's other screen, without a cursor; what was on the first one comes back with _LEAVE."""
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME, _END_LINE, _END_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(options: argparse.Namespace) -> int:
    """Shows the status every ``options.every`` seconds until it is interrupted, or ``options.count`` times.

    On a terminal in place; elsewhere one after the other, with ``options.json`` as one JSON object in a line for each
    look: the status, or an object with the key ``error``. What cannot be reached is said, and asked again.

    Raises:
        ConfigError: as ``daemon_of``.
    """
    found = daemon_of(options)
    if found is None:
        return Exit.USAGE
    url, token, settings = found
    terminal = sys.stdout.isatty() and not options.json
    with _screen(terminal):
        return asyncio.run(_watch(f"{url}/status", token, tls_for(url, settings), options, terminal))


async def _watch(
    url: str, token: str | None, tls: ssl.SSLContext | None, options: argparse.Namespace, terminal: bool
) -> int:
    code, shown = Exit.OK, 0
    while True:
        try:
            view = decoded(await fetch(url, token, options.timeout, tls=tls), StatusView)
            text = _line(view) if options.json else status_text(view, time.time())
            code = Exit.OK
        except Denied as error:
            text, code = _line({"error": str(error)}) if options.json else str(error), Exit.DENIED
        except Unreachable as error:
            said = f"{time.strftime('%H:%M:%S')} {error}"
            text, code = _line({"error": str(error)}) if options.json else said, Exit.TEMPORARY
        print(framed(text, shutil.get_terminal_size().lines) if terminal else f"{text}\n", end="", flush=True)
        shown += 1
        if code is Exit.DENIED or shown == options.count:
            return code
        if not terminal and not options.json:
            print()
        await asyncio.sleep(options.every)


def _line(told: StatusView | dict[str, str]) -> str:
    return msgspec.json.encode(told).decode()


def framed(text: str, rows: int) -> str:
    """``text`` over what the screen shows, cut to its ``rows``; nothing flickers, because nothing is cleared first."""
    lines = text.splitlines()
    if len(lines) >= rows:
        lines = [*lines[: max(0, rows - 2)], f"… and {len(lines) - max(0, rows - 2)} more lines: status shows all"]
    return _HOME + "".join(f"{line}{_END_LINE}\r\n" for line in lines) + _END_SCREEN


@contextmanager
def _screen(terminal: bool) -> Iterator[None]:
    if not terminal:
        yield
        return
    try:
        print(_ENTER, end="", flush=True)
        yield
    finally:
        print(_LEAVE, end="", flush=True)
