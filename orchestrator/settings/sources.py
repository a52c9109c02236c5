"""Where the settings' values come from: pydantic-settings' YAML source below its source of the environment.

Both are narrowed to what an operator expects: the file is read once and its lines are known, a variable that sets
nothing is an error, values that are lists or mappings are YAML as in the file, list entries have numbers.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, YamlConfigSettingsSource
from weightsync.orchestrator.settings.document import MAX_CONFIG_BYTES, MAX_DEPTH, Document, TooMuch, parsed
from weightsync.orchestrator.settings.problems import ConfigError, Key, Problem, dotted

PREFIX: Final = "WEIGHTSYNC__"
DELIMITER: Final = "__"

_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}")
"""Of a list entry, in the one way of writing it: 00 beside 0 would be the same entry under two names."""


class EnvironmentSource(EnvSettingsSource):
    """The values of the variables in ``environ`` that begin with PREFIX, in any case.

    Raises:
        ConfigError: a variable names no key, or a part of what another one gives as a whole.
    """

    def __init__(self, settings_class: type[BaseSettings], document: Document, environ: Mapping[str, str]) -> None:
        self._given = {name: text for name, text in environ.items() if name.upper().startswith(PREFIX)}
        self.variables: dict[Key, str] = {}
        for name in sorted(self._given, key=str.lower):  # A variable comes before those of the parts of its key.
            key = _key_of(document, name)
            whole = next((self.variables[key[:n]] for n in range(1, len(key) + 1) if key[:n] in self.variables), None)
            if whole is not None:  # pydantic-settings would silently take one of the two.
                what, fix = f"{whole} gives all of that", "unset one of the two"
                raise ConfigError(document.file, Problem(dotted(key), "", what, fix, variable=name))
            self.variables[key] = name
            _refuse_hostile(document.file, key, name, self._given[name])
        super().__init__(settings_class, env_prefix=PREFIX, env_nested_delimiter=DELIMITER)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        # The library's own reads os.environ, which need not be what ``load`` was given.
        return {name.lower(): text for name, text in self._given.items()}

    def decode_complex_value(self, field_name: str, field: FieldInfo | None, value: Any) -> Any:
        """``value`` as it is: the library knows JSON only, and not what stands below the number of a list entry."""
        return value

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        for key, name in self.variables.items():
            # The library leaves out what fits no field; here that is refused, like a key of the file.
            values.setdefault(str(key[0]), _nested(key[1:], self._given[name]))
        return {key: _parsed(value) for key, value in values.items()}


class FileSource(YamlConfigSettingsSource):
    """The values of a document that has been read already, ready for ``environment`` to be merged into them."""

    def __init__(
        self, settings_class: type[BaseSettings], document: Document, environment: "EnvironmentSource"
    ) -> None:
        self._document, self._environment = document, environment
        super().__init__(settings_class, yaml_file=document.file)

    def _read_files(self, files: object, deep_merge: bool = False) -> dict[str, Any]:
        # A second reading could find another file than the one whose lines are known; a pipe can be read once only.
        return self._document.values

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = _beneath((), super().__call__(), self._environment.variables)
        return values


def in_order(value: object) -> object:
    """A list of which single entries were given by their numbers, as a list.

    Raises:
        PydanticCustomError: an entry has no number, or a number is missing below it.
    """
    if not isinstance(value, dict) or "0" not in value:
        return value
    for expected, key in enumerate(sorted(value, key=_by_number)):
        if key != str(expected):
            raise PydanticCustomError("fits_nowhere", "fits nowhere in the file", {"entry": _part(key)})
    return [value[str(number)] for number in range(len(value))]


NUMBERED: Final = BeforeValidator(in_order)
"""For fields that are lists: lets a variable set one entry, as WEIGHTSYNC__ENGINES__0__URL does."""


def _key_of(document: Document, name: str) -> Key:
    parts = name[len(PREFIX) :].lower().split(DELIMITER)
    if "" in parts or len(parts) > MAX_DEPTH:
        fix = f"separate the parts of a key by {DELIMITER}, for example {PREFIX}LISTEN__PORT"
        raise ConfigError(document.file, Problem("", "", "names no key", fix, variable=name))
    return tuple(map(_part, parts))


def _part(text: str) -> str | int:
    return int(text) if _NUMBER.fullmatch(text) else text


def _by_number(text: object) -> tuple[bool, int]:
    part = _part(str(text))
    return isinstance(part, str), part if isinstance(part, int) else 0


def _beneath(key: Key, value: object, variables: Mapping[Key, str]) -> Any:
    """The file's ``value`` at ``key`` as what variables are merged into.

    pydantic-settings merges mappings key by key and nothing else. So what a variable gives as a whole is left out, and
    a list of which variables give single entries becomes a mapping by number, until ``in_order``.
    """
    if not any(other[: len(key)] == key for other in variables):
        return value
    if isinstance(value, list):
        value = {str(number): entry for number, entry in enumerate(value)}
    if isinstance(value, dict):
        inner = {name: (*key, _part(str(name))) for name in value}
        return {name: _beneath(inner[name], value[name], variables) for name in value if inner[name] not in variables}
    return value


def _parsed(value: object) -> object:
    """Lists and mappings in YAML flow style, null as None; the rest stays text, for pydantic to convert."""
    if isinstance(value, dict):
        return {key: _parsed(entry) for key, entry in value.items()}
    if isinstance(value, str) and (value.strip() == "null" or value.lstrip()[:1] in ("[", "{")):
        try:
            return parsed(Path(), value)[1]
        except (yaml.YAMLError, ValueError, RecursionError):
            return value
    return value


def _refuse_hostile(file: Path, key: Key, name: str, text: str) -> None:
    """Raise ConfigError for a value that YAML takes and we do not; what YAML does not take is a text, as before."""
    try:
        if len(text) > MAX_CONFIG_BYTES:
            raise TooMuch
        if text.lstrip()[:1] in ("[", "{"):
            parsed(file, text)
    except TooMuch as error:
        raise ConfigError(
            file, Problem(dotted(key), "", str(error), "write out what is meant", variable=name)
        ) from error
    except ConfigError as error:
        (problem,) = error.problems
        where = dotted(key) + (f".{problem.key}" if problem.key else "")
        raise ConfigError(file, replace(problem, key=where, line=None, variable=name)) from error
    except (yaml.YAMLError, ValueError, RecursionError):
        pass


def _nested(key: Key, value: object) -> object:
    for part in reversed(key):
        value = {str(part): value}
    return value
