"""``completion``: a script by which a shell completes commands and options, made from the parser itself."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

SHELLS: Final = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Words:
    """What may follow the commands ``after``: ``plain`` words, and ``options``; those that take a ``file``."""

    after: tuple[str, ...]
    plain: tuple[str, ...]
    options: tuple[str, ...]
    file: tuple[str, ...]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of a shell in SHELLS."""
    words = list(words_of(parser))
    if shell == "fish":
        return _fish(parser.prog, words)
    body = _bash(parser.prog, words)
    return f"autoload -U +X bashcompinit && bashcompinit\n{body}" if shell == "zsh" else body


def words_of(parser: argparse.ArgumentParser, after: tuple[str, ...] = ()) -> Iterator[Words]:
    """Of the parser and of all commands below it."""
    options: list[str] = []
    plain: list[str] = []
    file: list[str] = []
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            below |= action.choices
        elif action.option_strings:
            options += action.option_strings
            file += action.option_strings if action.metavar == "PATH" else []
        elif action.choices is not None:
            plain += map(str, action.choices)
    yield Words(after, (*below, *plain), tuple(options), tuple(file))
    for name, command in below.items():
        yield from words_of(command, (*after, name))


def _bash(prog: str, words: list[Words]) -> str:
    name = "_" + prog.replace("-", "_")
    cases = "\n".join(
        f"        '{' '.join(each.after)}') words='{' '.join((*each.plain, *each.options))}'"
        f" files='{' '.join(each.file)}' below='{' '.join(each.plain)}' ;;"
        for each in words
    )
    return f"""\
{name}() {{
    local word words files below at='' i
    for (( i=1; i<=COMP_CWORD; i++ )); do
        case "$at" in
{cases}
        esac
        word="${{COMP_WORDS[i]}}"
        if (( i < COMP_CWORD )) && [[ "$word" != -* && " $below " == *" $word "* ]]; then at="${{at:+$at }}$word"; fi
    done
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    if [[ " $files " == *" $previous "* ]]; then COMPREPLY=( $(compgen -f -- "$current") ); return; fi
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F {name} {prog}
"""


def _fish(prog: str, words: list[Words]) -> str:
    lines = [f"complete -c {prog} -f"]
    for each in words:
        seen = " && ".join(f"__fish_seen_subcommand_from {word}" for word in each.after) or "__fish_use_subcommand"
        if each.after and each.plain:
            seen += f" && not __fish_seen_subcommand_from {' '.join(each.plain)}"
        for word in each.plain:
            lines.append(f"complete -c {prog} -n '{seen}' -a {word}")
        for option in each.options:
            kind = "l" if option.startswith("--") else "s"
            files = " -rF" if option in each.file else ""
            lines.append(f"complete -c {prog} -n '{seen}' -{kind} {option.lstrip('-')}{files}")
    return "\n".join(lines) + "\n"
