"""Where a command's daemon is, and one verb asked of it."""

import argparse
import asyncio
import sys

import msgspec
from weightsync.orchestrator.cli.client import Denied, NotDone, Unreachable, fetch, tls_for, token_for
from weightsync.orchestrator.cli.common import CONFIG_VARIABLE, Exit
from weightsync.orchestrator.daemon.admin.verbs import MAX_REASON, MAX_WHO, Order
from weightsync.orchestrator.daemon.admin.views import VerbView
from weightsync.orchestrator.settings.credentials import Role
from weightsync.orchestrator.settings.settings import Settings, load


def daemon_of(
    options: argparse.Namespace, role: Role | None = "viewer"
) -> tuple[str, str | None, Settings | None] | None:
    """URL, token of ``role`` and settings, as far as the options name them; None (said) where they name no daemon.

    ``role`` None: no token is read.

    Raises:
        ConfigError: the configuration or the token file cannot be used.
    """
    settings = load(options.config) if options.config is not None and options.url is None else None
    if settings is None and options.url is None:
        print(f"give --config PATH, set {CONFIG_VARIABLE}, or give --url and --token-file", file=sys.stderr)
        return None
    url = options.url or settings.agents_url  # type: ignore[union-attr]
    token = None if role is None else token_for(options.token_file, settings, role)
    return url.rstrip("/"), token, settings


def ask(verb: str, target: str, by: str, options: argparse.Namespace) -> int:
    """Asks for one verb, prints the answer and returns the exit code.

    Raises:
        ConfigError: as ``daemon_of``.
    """
    found = daemon_of(options, "operator")
    if found is None:
        return Exit.USAGE
    if len(options.reason) > MAX_REASON:
        print(f"--reason: {len(options.reason)} characters, at most {MAX_REASON}", file=sys.stderr)
        return Exit.USAGE
    url, token, settings = found
    order = msgspec.json.encode(Order(target=target, reason=options.reason, by=by[:MAX_WHO]))
    try:
        data = asyncio.run(
            fetch(f"{url}/verbs/{verb}", token, options.timeout, order=order, tls=tls_for(url, settings))
        )
        view = msgspec.json.decode(data, type=VerbView)
    except Denied as error:
        print(error, file=sys.stderr)
        return Exit.DENIED
    except NotDone as error:
        print(error, file=sys.stderr)
        return Exit.REFUSED
    except Unreachable as error:
        print(error, file=sys.stderr)
        return Exit.TEMPORARY
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        print(f"{url}: an answer that is not the daemon's: {error}", file=sys.stderr)
        return Exit.TEMPORARY
    print(msgspec.json.format(data).decode() if options.json else view.says)
    return Exit.OK
