"""The configuration file as written: its values, and the line of each of its keys.

pydantic sees values only; the composed YAML nodes are kept beside them, so that an error can name the line.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any, Final

import yaml
from weightsync.orchestrator.settings.problems import ConfigError, Key, Problem, dotted

MAX_CONFIG_BYTES: Final = 1024 * 1024
"""A fleet of 1000 engines is under 200 kB."""

MAX_VALUES: Final = 65_536
"""As written, and again with every alias written out. A fleet of 4096 engines with five keys each has 45,000; a few
lines of nested aliases make billions. Each costs PyYAML a tenth of a millisecond."""

MAX_DEPTH: Final = 32
"""The deepest key has three levels. An alias of a mapping that contains it goes on for ever."""


def _open_plain(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file")
    return descriptor


class TooMuch(ValueError):
    """More values or levels than a configuration can have, by the text's ``line``, where it has some."""

    def __init__(self, line: int | None = None) -> None:
        super().__init__(f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, aliases written out")
        self.line = line


class _Loader(yaml.SafeLoader):
    """Stops at the limits instead of at the end of what may be a hostile text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_VALUES or self._depth > MAX_DEPTH + 1:
            raise TooMuch(self.line + 1)
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
            return node
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML's own constructors take it for granted that a scalar is what its tag says: ``!!timestamp x``."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(problem=f"no {kind}", problem_mark=node.start_mark) from error


def parsed(file: Path, text: str) -> tuple[yaml.Node | None, Any]:
    """The node and the value of one YAML document, neither of which was made if it is beyond the limits.

    Raises:
        ConfigError: beyond them, or a key is given twice; a line of ``file`` is named.
        yaml.YAMLError, ValueError, RecursionError: no YAML, or values that are none.
    """
    loader = _Loader(text)
    root = loader.get_single_node()
    if root is None:
        return None, None
    # Before any value is made: making those of a hostile text is what takes the time.
    _refuse(file, root)
    return root, loader.construct_document(root)


class Document:
    """One configuration file. ``values`` is its content as plain Python values.

    Raises:
        ConfigError: no YAML mapping, a doubled key, or more than the limits above.
    """

    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        try:
            self._root, values = parsed(file, text)
            if self._root is not None:
                _refuse_other_roots(file, self._root)
                self.values = values
        except TooMuch as error:
            raise ConfigError(file, Problem("", "", str(error), "is it a configuration file?", error.line)) from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(file, _yaml_problem(error)) from error

    @classmethod
    def read(cls, file: Path, *, plain: bool = False) -> "Document":
        """The document in ``file``, of which no more than MAX_CONFIG_BYTES are read.

        ``plain``: it may be no pipe, for whose writer a reader waits without end.

        Raises:
            ConfigError: unreadable, too large, no UTF-8, or one that the constructor refuses.
        """
        try:
            with open(file, "rb", opener=_open_plain if plain else None) as stream:
                data = stream.read(MAX_CONFIG_BYTES + 1)
            if len(data) > MAX_CONFIG_BYTES:
                found, fix = f"over {MAX_CONFIG_BYTES} bytes", "is it a configuration file?"
                raise ConfigError(file, Problem("", found, "the file is too large", fix))
            text = data.decode("utf-8")
        except OSError as error:
            fix = "give the path of a readable YAML file (weightsync-orchestrator config example prints one)"
            raise ConfigError(file, Problem("", "", f"cannot be read: {error.strerror or error}", fix)) from error
        except UnicodeDecodeError as error:
            raise ConfigError(file, Problem("", "", f"is not UTF-8: {error.reason}", "save it as UTF-8")) from error
        return cls(file, text)

    def find(self, key: Key) -> tuple[int | None, bool]:
        """The line of ``key`` (None: the file does not have it), and whether a mapping or a list stands there."""
        node: yaml.Node | None = self._root
        line: int | None = None
        for part in key:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == part), None)
                if pair is None:
                    return None, False
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                return None, False
        return line, isinstance(node, yaml.CollectionNode)


def _yaml_problem(error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error) or type(error).__name__
    line = mark.line + 1 if mark is not None else None
    return Problem("", "", f"is no valid YAML: {what}", "mind indentation, colons and quotes at that line", line)


def _refuse_other_roots(file: Path, root: yaml.Node) -> None:
    """Raises ConfigError for what is no mapping of names."""
    if not isinstance(root, yaml.MappingNode):
        fix = "start with keys such as run: and engines: (weightsync-orchestrator config example has all)"
        kind, line = root.tag.rpartition(":")[2], root.start_mark.line + 1
        raise ConfigError(file, Problem("", kind, "the file must hold a mapping", fix, line))
    for name, _ in root.value:
        if name.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            line = name.start_mark.line + 1
            text = str(name.value) if isinstance(name, yaml.ScalarNode) else ""
            raise ConfigError(file, Problem(text, "", "unknown key", "remove the line", line))


def _refuse(file: Path, root: yaml.Node) -> None:
    """Raises ConfigError for what safe_load would take and we do not."""
    seen = 0
    # Not recursive: an alias may contain itself.
    waiting: list[tuple[Key, yaml.Node]] = [((), root)]
    while waiting:
        key, node = waiting.pop()
        seen += 1
        if seen > MAX_VALUES or len(key) > MAX_DEPTH:
            line = node.start_mark.line + 1
            raise ConfigError(file, Problem(dotted(key[:1]), "", str(TooMuch()), "write out what is meant", line))
        if isinstance(node, yaml.MappingNode):
            _refuse_doubled_keys(file, node, key)
            waiting += [((*key, str(name.value)), child) for name, child in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [((*key, index), child) for index, child in enumerate(node.value)]


def _refuse_doubled_keys(file: Path, mapping: yaml.MappingNode, key: Key) -> None:
    lines: dict[str, int] = {}
    for name, _ in mapping.value:
        text, line = str(name.value), name.start_mark.line + 1
        if text in lines:
            what = f"the key is given twice (first at line {lines[text]})"
            raise ConfigError(file, Problem(dotted((*key, text)), "", what, "keep one of them", line))
        lines[text] = line
