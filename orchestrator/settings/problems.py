"""What is wrong with a configuration, said so that the operator can mend it."""

import dataclasses
import difflib
from pathlib import Path
from typing import Final

from weightsync.orchestrator.files.ownership import NotOurs
from weightsync.orchestrator.protocol.text import clean

MAX_SHOWN_CHARS: Final = 200
"""A wrong value is shown, not dumped."""

MAX_PROBLEMS: Final = 20
"""Told at once: whoever mends these sees the others then."""

_SECRET_WORDS: Final = ("token", "secret", "password", "passphrase", "api_key", "credential")

Key = tuple[str | int, ...]
"""The path to a value, list entries by their number: ``("engines", 0, "url")``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration: where, what was found, why it is wrong and what to write instead."""

    key: str
    value: str
    problem: str
    fix: str
    line: int | None = None
    variable: str = ""

    def where(self) -> str:
        """``line 12: engines[0].url: ``, or the environment variable that set it; empty for the whole file."""
        variable = clean(self.variable, MAX_SHOWN_CHARS)
        source = f"environment variable {variable}" if variable else f"line {self.line}" if self.line else ""
        return "".join(f"{part}: " for part in (source, clean(self.key, MAX_SHOWN_CHARS)) if part)

    def __str__(self) -> str:
        found = f" (found {self.value})" if self.value else ""
        return clean(f"{self.where()}{self.problem}{found}. Fix: {self.fix}")


class ConfigError(Exception):
    """The configuration cannot be used. The operator's fault; a retry without a change is useless (exit code 78)."""

    def __init__(self, file: Path, *problems: Problem) -> None:
        self.file = file
        self.problems = problems
        name = clean(str(file))
        lines = [f"{name}: {problem}" for problem in problems[:MAX_PROBLEMS]]
        more = len(problems) - MAX_PROBLEMS
        super().__init__("\n".join([*lines, f"{name}: … and {more} more"] if more > 0 else lines))


def not_ours(error: NotOurs) -> ConfigError:
    """What the configuration names cannot be believed."""
    return ConfigError(error.place, Problem("", "", error.what, error.fix))


def shown(key: Key, value: object) -> str:
    """``value`` as an error may show it: cut, and withheld where the key names a secret."""
    words = [part.lower() for part in key if isinstance(part, str)]
    # What ends so, and credentials, are names of files.
    words = [part for part in words if not part.endswith("_file") and part != "credentials"]
    if any(word in part for part in words for word in _SECRET_WORDS):
        return "a value that is not shown"
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def dotted(key: Key) -> str:
    """``('engines', 0, 'url')`` as ``engines[0].url``."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def closest(word: str, words: list[str]) -> str:
    """The member of ``words`` that ``word`` was probably meant to be, or an empty string."""
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.6)), "")
