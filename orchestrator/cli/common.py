"""What the commands share: exit codes, and the option that names the configuration."""

import argparse
import math
import os
import sys
import textwrap
from enum import IntEnum
from pathlib import Path
from typing import Final, Self, TypeAlias

import msgspec
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.settings.places import usable_url

CONFIG_VARIABLE: Final = "WEIGHTSYNC_CONFIG"

MAX_WAIT_SECONDS: Final = 86_400.0

MAX_OPTION_COUNT: Final = 10_000
"""Rounds that are shown, ranks that are imagined: ten times what anybody has."""

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Exit(IntEnum):
    """Exit codes, each with the commands that end with it, its meaning, and whether to start again.

    From 64 on they are those of sysexits.h. The help and docs/operations.md show these texts.
    """

    of: str
    meaning: str
    again: str

    OK = 0, "all", "done; `run`: stopped by SIGTERM or SIGINT"
    FAILURE = (
        1,
        "all",
        "a bug of ours, with a traceback; `demo`: it failed, or the answers differ; `status --check`: degraded;"
        " `doctor`: warnings",
        "yes; report it",
    )
    USAGE = 2, "all", "the command line is wrong; `status --check`: critical; `doctor`: errors", "no"
    REFUSED = (
        65,
        "verbs, `rounds show`, `admin-key`, `audit`",
        "the daemon refuses what was asked for, or there is no such round or engine; the message says why, and what"
        " there is; `audit verify`: the log is not what was written",
        "no",
    )
    UNAVAILABLE = (
        69,
        "`demo`, `certs`",
        "something that it needs is not installed; the message says what",
        "once installed",
    )
    INTERNAL = 70, "`run`", "an invariant did not hold; it ended before acting on it", "yes: the journal is believed"
    IO = (
        74,
        "`run`, `report`",
        "`run`: the journal's disk failed, the last commit's outcome is unknown; `report`: the file cannot be written",
        "yes: it is read again",
    )
    TEMPORARY = (
        75,
        "`run`, `status`, `rounds`, `watch`, `report`, `plan`, verbs",
        "`run`: another daemon holds the journal (the message names its process), or the address is taken; the others:"
        " the daemon cannot be reached (`status` and `rounds` then show what the journal knows)",
        "later",
    )
    DENIED = 77, "`status`, `rounds`, `watch`, `report`, `plan`, verbs", "the daemon refuses the token", "no"
    CONFIG = (
        78,
        "all",
        "the configuration, the journal or a layout cannot be used; the message names file, line or variable, key,"
        " value and fix",
        "no",
    )
    INTERRUPTED = 130, "all", "interrupted"

    def __new__(cls, code: int, of: str, meaning: str, again: str = "") -> Self:
        member = int.__new__(cls, code)
        member._value_ = code
        member.of, member.meaning, member.again = of, meaning, again
        return member


def exit_codes_text() -> str:
    """The exit codes as the help shows them."""
    lines = ["exit codes:"]
    for code in Exit:
        text = code.meaning if code.of == "all" else f"{code.of}: {code.meaning}"
        lines.append(
            textwrap.fill(text.replace("`", ""), 110, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7)
        )
    return "\n".join(lines) + "\n"


def add_command(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    """A command whose own help begins with what the list of commands says of it."""
    return commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")


def add_config_option(command: argparse.ArgumentParser, required: bool = True) -> None:
    """``--config``, by default the file that the environment variable WEIGHTSYNC_CONFIG names."""
    named = os.environ.get(CONFIG_VARIABLE)
    default = Path(named) if named else None
    text = f"the configuration file (default: ${CONFIG_VARIABLE})"
    needed = required and default is None
    command.add_argument("--config", type=Path, metavar="PATH", required=needed, default=default, help=text)


def add_daemon_options(command: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Which daemon is asked, for how long, and in which form its answer is printed."""
    add_config_option(command, required=False)
    command.add_argument("--url", type=url, help="the daemon's URL, instead of the configuration's")
    command.add_argument("--token-file", type=Path, metavar="PATH", help="with --url: file with the token")
    if json:
        command.add_argument("--json", action="store_true", help="print JSON, as the daemon answers it")
    command.add_argument("--timeout", type=seconds, default=10.0, metavar="SECONDS", help="in total (default 10)")


def url(text: str) -> str:
    """Of an option: the URL of a daemon."""
    try:
        return usable_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def seconds(text: str) -> float:
    """Of an option: a time to wait, of at most MAX_WAIT_SECONDS."""
    return _number(text, float, MAX_WAIT_SECONDS)


def positive(text: str) -> float:
    """Of an option: a number above 0."""
    return _number(text, float, sys.float_info.max)


def count(text: str) -> int:
    """Of an option: how many, from 1 to MAX_OPTION_COUNT."""
    return int(_number(text, int, MAX_OPTION_COUNT))


def _number(text: str, kind: type[float], most: float) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= most:  # NaN is neither
        raise argparse.ArgumentTypeError(f"{clean(text, 40)!r} is no number above 0 and up to {most:g}")
    return number


def json_text(told: object) -> str:
    """A struct, dataclass, dict or list as JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(told)).decode()
