"""The operator's verbs: what is asked of the daemon in one word, as ``VERBS`` lists them."""

import argparse
import getpass
import socket
from typing import Final

from weightsync.orchestrator.cli.common import Commands, add_command, add_daemon_options

VERBS: Final[tuple[tuple[str, str, str], ...]] = (
    ("hold", "ENGINE", "keep an engine paused and out of rounds, until it is released"),
    ("release", "ENGINE", "let a held, drained or forgotten engine serve and take part again"),
    ("drain", "ENGINE", "keep an engine out of rounds and not ready; it serves until another version is decided"),
    ("forget", "ENGINE", "let an engine go: it is no member any more, and nobody waits for it"),
    ("abort", "", "give up the round under way, unless it is decided"),
    (
        "rollback",
        "[STEP]",
        "have engines serve again what they have beside it: the version before, or that of STEP",
    ),
    ("retry", "", "try engines and versions that wait for their next attempt at once"),
    ("declare-dead", "WRITER", "say that a writer's process is dead (trainer/1), so that rounds may go on"),
    ("maintenance", "on|off", "let no round begin, or let them again"),
)
"""Each with what it is about and what it does."""


TARGETS: Final = {"ENGINE": "its name, as status shows it", "WRITER": "such as trainer/1, as status shows it"}


def add_verb_commands(commands: Commands) -> None:
    """One command for each verb."""
    for verb, target, text in VERBS:
        command = add_command(commands, verb, text)
        if target == "on|off":
            command.add_argument("target", choices=("on", "off"), help="which of the two")
        elif target == "[STEP]":
            command.add_argument(
                "target", nargs="?", default="", metavar="STEP", help="of the version (default: the one before)"
            )
        elif target:
            command.add_argument("target", metavar=target, help=TARGETS[target])
        command.add_argument("--reason", default="", help="for the log, the audit log and status")
        add_daemon_options(command)
        command.set_defaults(run=perform, verb=verb)


def perform(options: argparse.Namespace) -> int:
    """Asks the daemon, prints what happens now, and returns the exit code.

    Raises:
        ConfigError: the configuration or the token file cannot be used.
    """
    from weightsync.orchestrator.cli.asking import ask  # it needs an HTTP client, which --help does not

    return ask(options.verb, getattr(options, "target", ""), who(), options)


def who() -> str:
    """The user of this machine who asks, for people; nothing depends on it."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = "unknown"
    return f"{name}@{socket.gethostname()}"
