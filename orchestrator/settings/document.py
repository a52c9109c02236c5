"""The configuration file as written: values with their line numbers, and the environment laid over them.

Kept apart from the model in ``settings`` so that an error can name file, line and key: pydantic sees only values.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

PREFIX: Final = "WEIGHTSYNC__"
DELIMITER: Final = "__"

MAX_CONFIG_BYTES: Final = 1024 * 1024
"""A fleet of 1000 engines is under 200 kB."""

MAX_SHOWN_CHARS: Final = 200
"""A wrong value is shown, not dumped."""

_SECRET_WORDS: Final = ("token", "secret", "password", "passphrase", "api_key", "credential")

Key = tuple[str | int, ...]


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
        source = f"environment variable {self.variable}" if self.variable else f"line {self.line}" if self.line else ""
        return "".join(f"{part}: " for part in (source, self.key) if part)

    def __str__(self) -> str:
        found = f" (found {self.value})" if self.value else ""
        return f"{self.where()}{self.problem}{found}. Fix: {self.fix}"


class ConfigError(Exception):
    """The configuration cannot be used. The operator's fault; a retry without a change is useless (exit code 78)."""

    def __init__(self, file: Path, *problems: Problem) -> None:
        self.file = file
        self.problems = problems
        super().__init__("\n".join(f"{file}: {problem}" for problem in problems))


def shown(key: Key, value: object) -> str:
    """``value`` as an error may show it: cut, and withheld where the key names a secret."""
    words = [part.lower() for part in key if isinstance(part, str)]
    if any(word in part and not part.endswith("_file") for part in words for word in _SECRET_WORDS):
        return "a value that is not shown"
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
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


class Document:
    """One configuration file with the environment's overrides.

    ``values`` is the merged tree of plain Python values. Raises ConfigError from ``read`` and from the constructor.
    """

    def __init__(self, file: Path, text: str, environ: Mapping[str, str]) -> None:
        self.file = file
        self._root = _compose(file, text)
        self.values = _construct(file, text, self._root)
        self._variables: dict[Key, str] = {}
        for name in sorted(environ):
            if name.startswith(PREFIX):
                self._override(name, environ[name])

    @classmethod
    def read(cls, file: Path, environ: Mapping[str, str]) -> "Document":
        """The document in ``file``.

        Raises:
            ConfigError: unreadable, too large, no UTF-8, no YAML mapping, a doubled key, a variable that fits nowhere.
        """
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_CONFIG_BYTES + 1)
            if len(data) > MAX_CONFIG_BYTES:
                raise ConfigError(
                    file,
                    Problem(
                        "", f"over {MAX_CONFIG_BYTES} bytes", "the file is too large", "is it a configuration file?"
                    ),
                )
            text = data.decode("utf-8")
        except OSError as error:
            fix = "give the path of a readable YAML file (an example is in deploy/config.example.yaml)"
            raise ConfigError(file, Problem("", "", f"cannot be read: {error.strerror or error}", fix)) from error
        except UnicodeDecodeError as error:
            raise ConfigError(file, Problem("", "", f"is not UTF-8: {error.reason}", "save it as UTF-8")) from error
        return cls(file, text, environ)

    def problem(self, key: Key, value: object, what: str, fix: str) -> Problem:
        """A Problem at ``key``, with the line or the variable that it came from."""
        variable = next((self._variables[k] for k in _prefixes(key) if k in self._variables), "")
        line = None if variable else self._line(key)
        return Problem(dotted(key), "" if value is None else shown(key, value), what, fix, line, variable)

    def _line(self, key: Key) -> int | None:
        node: yaml.Node | None = self._root
        line: int | None = None
        for part in key:
            if isinstance(node, yaml.MappingNode):
                pair = next((p for p in node.value if p[0].value == part), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line

    def _override(self, name: str, text: str) -> None:
        key: Key = tuple(int(part) if part.isdigit() else part.lower() for part in name[len(PREFIX) :].split(DELIMITER))
        if "" in key:
            fix = f"separate the parts of a key by {DELIMITER}, for example {PREFIX}LISTEN__PORT"
            raise ConfigError(self.file, Problem("", "", "names no key", fix, variable=name))
        made = _set(self.values, key, _parsed(text))
        if made is None:
            fix = "name an existing key; list entries are numbered from 0, for example WEIGHTSYNC__ENGINES__0__URL"
            raise ConfigError(self.file, Problem(dotted(key), "", "fits nowhere in the file", fix, variable=name))
        self._variables.update(dict.fromkeys(made, name))


def _prefixes(key: Key) -> list[Key]:
    return [key[:length] for length in range(len(key), 0, -1)]


def _parsed(text: str) -> object:
    """Lists and mappings in YAML flow style, ``null`` as absent; the rest stays text, for pydantic to convert."""
    if text.strip() == "null":
        return None
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def _set(tree: Any, key: Key, value: object) -> list[Key] | None:
    """Puts ``value`` at ``key`` of ``tree``; the keys that are new or other than before, None where it fits nowhere."""
    made: list[Key] = []
    for depth, (part, following) in enumerate(itertools.pairwise(key), 1):
        if isinstance(tree, dict) and isinstance(part, str):
            if not isinstance(tree.get(part), dict | list):
                tree[part] = [] if isinstance(following, int) else {}
                made.append(key[:depth])
            tree = tree[part]
        elif isinstance(tree, list) and isinstance(part, int) and part <= len(tree):
            if part == len(tree):
                tree.append({})
                made.append(key[:depth])
            tree = tree[part]
        else:
            return None
    last = key[-1]
    if isinstance(tree, dict) and isinstance(last, str):
        tree[last] = value
    elif isinstance(tree, list) and isinstance(last, int) and last <= len(tree):
        tree[last:] = [value, *tree[last + 1 :]]
    else:
        return None
    return [*made, key]


def _compose(file: Path, text: str) -> yaml.Node | None:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(file, _yaml_problem(error)) from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        fix = "start with keys such as run: and engines: (see deploy/config.example.yaml)"
        raise ConfigError(file, Problem("", root.tag.rpartition(":")[2], "the file must hold a mapping", fix, line))
    _refuse_doubled_keys(file, root, ())
    return root


def _construct(file: Path, text: str, root: yaml.Node | None) -> dict[str, Any]:
    if root is None:
        return {}
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(file, _yaml_problem(error)) from error
    assert isinstance(values, dict)
    for key in values:
        if not isinstance(key, str) or key.startswith("_"):
            # pydantic-settings takes arguments of its own by names that start with an underscore.
            raise ConfigError(file, Problem(str(key), "", "unknown key", "remove the line"))
    return values


def _yaml_problem(error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error) or type(error).__name__
    line = mark.line + 1 if mark is not None else None
    return Problem("", "", f"is no valid YAML: {what}", "mind indentation, colons and quotes at that line", line)


def _refuse_doubled_keys(file: Path, node: yaml.Node | None, key: Key) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, child in node.value:
            line = name.start_mark.line + 1
            here = (*key, str(name.value))
            if name.value in seen:
                what = f"the key is given twice (first at line {seen[name.value]})"
                raise ConfigError(file, Problem(dotted(here), "", what, "keep one of them", line))
            seen[str(name.value)] = line
            _refuse_doubled_keys(file, child, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _refuse_doubled_keys(file, child, (*key, index))
