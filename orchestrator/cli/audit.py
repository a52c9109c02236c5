"""``audit verify``: whether the audit log is what the daemon wrote."""

import argparse
import sys

from weightsync.orchestrator.cli.common import (
    CONFIG_VARIABLE,
    Commands,
    Exit,
    add_command,
    add_config_option,
    json_text,
)
from weightsync.orchestrator.protocol.text import clean


def add_audit_commands(commands: Commands) -> None:
    """The parser of ``audit``."""
    audit = add_command(commands, "audit", "whether the log of what operators asked for is what was written")
    actions = audit.add_subparsers(title="actions", metavar="ACTION", required=True)
    verify = add_command(actions, "verify", "follow the chain of its lines; exit 0, or 65 where it is broken")
    add_config_option(verify, required=False)
    verify.add_argument("--state", metavar="DIR", help="the state directory, or a copy, instead of the configuration's")
    verify.add_argument("--noted", default="", metavar="HASH", help="of a line that must be there, too")
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from pathlib import Path

    from weightsync.orchestrator.daemon.admin.audit import verify
    from weightsync.orchestrator.settings.settings import load

    if options.state is None and options.config is None:
        print(f"give --config PATH, set {CONFIG_VARIABLE}, or give --state DIR", file=sys.stderr)
        return Exit.USAGE
    directory = load(options.config).state_directory if options.state is None else Path(options.state)
    if options.state is not None and not directory.is_dir():
        print(f"{clean(str(directory))}: is no directory. Fix: give that of audit.jsonl", file=sys.stderr)
        return Exit.CONFIG
    try:
        found = verify(directory, options.noted)
    except (OSError, ValueError) as error:
        print(f"{clean(str(directory))}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return Exit.CONFIG
    if options.json:
        print(json_text(found))
        return Exit.REFUSED if found.problems else Exit.OK
    for problem in found.problems:
        print(problem, file=sys.stderr)
    if found.problems:
        return Exit.REFUSED
    print(
        f"lines {found.first} to {found.last} are whole; the last one's hash: {found.head}"
        if found.last
        else f"no line yet in {clean(str(directory))}"
    )
    return Exit.OK
