"""Reference pages of the site, made from the code at each build: configuration, command line, metrics, messages."""

import argparse
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from prometheus_client.core import Metric
from weightsync.orchestrator.cli.main import parser
from weightsync.orchestrator.daemon.admin.log_events import EVENTS, FIELDS
from weightsync.orchestrator.daemon.admin.views import EngineView, RoundRow, StatusView, VersionView
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.metrics import StatusCollector
from weightsync.orchestrator.protocol import messages
from weightsync.orchestrator.settings.settings import Settings


def configuration() -> str:
    """Every key, from the JSON schema of the settings."""
    schema = Settings.model_json_schema()
    lines = [
        "# Configuration",
        "",
        "Every key, as `weightsync-orchestrator config schema` has it; `config example` prints a file of all.",
        "A key may be given in the environment: `WEIGHTSYNC__` and its parts in capitals, joined by `__`.",
        "",
        "| key | type | default | what it is |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in keys(schema, schema)]
    return "\n".join(lines) + "\n"


def keys(schema: dict[str, Any], part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of everything below ``part``."""
    for name, field in part.get("properties", {}).items():
        key = f"{prefix}{name}"
        below = list(_sections(schema, field))
        if not below:
            required = name in part.get("required", ())
            default = "required" if required else f"`{msgspec.json.encode(field.get('default')).decode()}`"
            yield key, _cell(_type(schema, field)), _cell(default), _cell(field.get("description", ""))
        kinds = [section["properties"]["type"]["const"] for section in below if len(below) > 1]
        if kinds:
            default = f"`{field['default']['type']}`"
            yield f"{key}.type", ", ".join(f"`{kind}`" for kind in kinds), default, _cell(field.get("description", ""))
        for number, section in enumerate(below):
            dots = "[]." if field.get("type") == "array" else "."
            for inner in keys(schema, section, f"{key}{dots}"):
                if kinds and inner[0] != f"{key}.type":
                    yield *inner[:3], f"Of type `{kinds[number]}`. {inner[3]}"
                elif not kinds:
                    yield inner


def _sections(schema: dict[str, Any], field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Mappings with keys of their own that a field may hold."""
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    if "properties" in field:
        yield field
    for other in (*field.get("anyOf", ()), *field.get("oneOf", ()), *([field["items"]] if "items" in field else ())):
        yield from _sections(schema, other)


def _type(schema: dict[str, Any], field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(schema, each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(schema, field.get('items', {}))}"
    bounds = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
    limits = [f"{sign} {field[name]:g}" for name, sign in bounds if name in field]
    return str(field.get("type", "value")) + (f" {', '.join(limits)}" if limits else "")


def command_line() -> str:
    """Every command with its options, from the parser."""
    lines = ["# Command line", "", "Exit codes are in [operations](../operations.md#exit-codes).", ""]
    for command, says, below in commands(parser()):
        lines += [f"## {command}", "", f"{says[:1].upper()}{says[1:]}.", "", "| argument | what it is |", "|---|---|"]
        for action in below._actions:
            if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                continue
            name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            value = (
                "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
            )
            words = f" One of {', '.join(map(str, action.choices))}." if action.choices is not None else ""
            text = _cell((action.help or "") + words)
            lines.append(f"| `{name}{value}` | {text} |")
        lines.append("")
    return "\n".join(lines)


def commands(top: argparse.ArgumentParser, says: str = "") -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """The commands that do something, with what is said of them and their parsers."""
    actions = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    if not actions:
        yield top.prog, says, top
    for action in actions:
        told = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, below in action.choices.items():
            yield from commands(below, told.get(name, ""))


def metrics() -> str:
    """Every family, from a status in which there is something of everything."""
    lines = [
        "# Metrics",
        "",
        "What `/metrics` of the daemon tells; [operations](../operations.md#metrics) says which are worth an alert.",
        "",
        "| name | type | labels | what it is |",
        "|---|---|---|---|",
    ]
    for family, labels in families():
        ending = "_total" if family.type == "counter" else ""
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{family.name}{ending}` | {family.type} | {shown} | {_cell(family.documentation)} |")
    return "\n".join(lines) + "\n"


def families() -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Every family with the names of its labels."""
    version = VersionView(step=1, generation=1, sequence=1)
    engine = EngineView(name="a", url="", role="both", state="serving", version=version)
    row = RoundRow(round="1.1", step=1, generation=1, attempt=1, outcome="committed")
    status = StatusView(run="a", state="", committed=version, engines=(engine,), rounds=(row,))
    meters = Meters()
    meters.refusals_of({"a": 1})
    for family in StatusCollector(status, meters, 0.0).collect():
        yield family, tuple(dict.fromkeys(name for sample in family.samples for name in sample.labels))
    names = {id(collector): getattr(collector, "_labelnames", ()) for collector in meters.registry._collector_to_names}
    for collector in list(meters.registry._collector_to_names):
        for family in collector.collect():
            yield family, tuple(names[id(collector)])


def log_page() -> str:
    """Every event of the log, and every field."""
    lines = [
        "# Log",
        "",
        "One JSON object on each line of standard error, where that is no terminal. Under systemd a line begins with",
        "its priority (`journalctl -p warning`). Filter by `event`; `message` is for people.",
        "",
        "| event | what it means |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {_cell(text)} |" for name, text in EVENTS.items()]
    lines += ["", "| field | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(text)} |" for name, text in FIELDS.items()]
    lines += ["", f"`round committed` and `round failed` have these, too: {', '.join(f'`{n}`' for n in ROUND_FIELDS)}."]
    return "\n".join(lines) + "\n"


ROUND_FIELDS: Final = tuple(RoundRow(round="", step=0, generation=0, attempt=0, outcome="").fields())

MESSAGES: Final = (
    ("From an agent to the daemon", typing.get_args(messages.FromAgent)),
    ("From the daemon to an agent", typing.get_args(messages.FromDaemon)),
)


def messages_page() -> str:
    """Every message with its fields."""
    lines = ["# Messages", "", "In the order of a round they are in [the protocol](../protocol.md).", ""]
    for title, structs in MESSAGES:
        lines += [f"## {title}", ""]
        for struct in structs:
            lines += [f"### {struct.__name__}", "", inspect.cleandoc(struct.__doc__ or ""), ""]
            fields = msgspec.structs.fields(struct)
            if fields:
                lines += ["| field | type |", "|---|---|"]
                lines += [f"| `{field.encode_name}` | `{_cell(_annotation(field.type))}` |" for field in fields]
                lines.append("")
    return "\n".join(lines)


def _annotation(kind: Any) -> str:
    """A type as it is written, without the module that it is from and without its bounds."""
    if typing.get_origin(kind) is typing.Annotated:
        return _annotation(typing.get_args(kind)[0])
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if arguments:
        parts = ["…" if part is ... else _annotation(part) for part in arguments]
        name = getattr(origin, "__name__", "")
        return " or ".join(parts) if name in ("UnionType", "Union") else f"{name}[{', '.join(parts)}]"
    return "nothing" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES: Final[dict[str, Callable[[], str]]] = {
    "reference/configuration.md": configuration,
    "reference/command-line.md": command_line,
    "reference/metrics.md": metrics,
    "reference/messages.md": messages_page,
    "reference/log.md": log_page,
}
"""Page of the site → what makes it."""
