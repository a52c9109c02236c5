"""What the commands share: exit codes, and the option that names the configuration."""

import argparse
import os
import textwrap
from enum import IntEnum
from pathlib import Path
from typing import Final, Self, TypeAlias

CONFIG_VARIABLE: Final = "WEIGHTSYNC_CONFIG"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Exit(IntEnum):
    """Exit codes, each with the commands that end with it, its meaning, and whether to start again.

    From 64 on they are those of sysexits.h. The help and docs/operations.md show these texts.
    """

    of: str
    meaning: str
    again: str

    OK = 0, "all", "done; `run`: stopped by SIGTERM or SIGINT"
    FAILURE = 1, "all", "a bug of ours, with a traceback; `demo`: it failed, or the answers differ", "yes; report it"
    USAGE = 2, "all", "the command line is wrong", "no"
    UNAVAILABLE = 69, "`demo`", "something that it needs is not installed; the message says what", "once installed"
    INTERNAL = 70, "`run`", "an invariant did not hold; it ended before acting on it", "yes: the journal is believed"
    IO = 74, "`run`", "the journal's disk failed, the last commit's outcome is unknown", "yes: it is read again"
    TEMPORARY = (
        75,
        "`run`, `status`, `rounds`, `plan`",
        "`run`: another daemon holds the journal (the message names its process), or the address is taken; the others:"
        " the daemon cannot be reached (`status` and `rounds` then show what the journal knows)",
        "later",
    )
    DENIED = 77, "`status`, `rounds`, `plan`", "the daemon refuses the token", "no"
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


def add_config_option(command: argparse.ArgumentParser, required: bool = True) -> None:
    """``--config``, by default the file that the environment variable WEIGHTSYNC_CONFIG names."""
    named = os.environ.get(CONFIG_VARIABLE)
    default = Path(named) if named else None
    text = f"the configuration file (default: ${CONFIG_VARIABLE})"
    needed = required and default is None
    command.add_argument("--config", type=Path, metavar="PATH", required=needed, default=default, help=text)
