"""The log's schema against the code: every event that is logged is in the table, and nothing else is."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.admin.log_events import EVENTS, FIELDS
from weightsync.orchestrator.daemon.admin.views import RoundRow

ROOT = Path(__file__).parents[4] / "orchestrator"

LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}

OF_LOGGING = {"exc_info", "stack_info"}


def constants(node: ast.expr) -> Iterator[str]:
    """The texts that an argument may be."""
    if isinstance(node, ast.Constant):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from constants(node.body)
        yield from constants(node.orelse)


def logged() -> Iterator[tuple[str, str, set[str]]]:
    """Where, the event, and the names of its fields, of each call in the daemon that says something."""
    for module in sorted((*ROOT.glob("core/**/*.py"), *ROOT.glob("daemon/**/*.py"))):
        tree = ast.parse(module.read_text())
        names = {
            target.id: node.value
            for node in ast.walk(tree) if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            where = f"{module.relative_to(ROOT)}:{node.lineno}"
            given = {word.arg or "**" for word in node.keywords} - OF_LOGGING
            if called == "turn.say":
                event = next((word.value for word in node.keywords if word.arg == "event"), None)
                for text in constants(event) if event is not None else ("note",):
                    yield where, text, (given - {"event"}) | {"message", "cause"}
            elif (called.rpartition(".")[2] in LEVELS and "log" in called) or called.endswith("refusals.say"):
                first = node.args[0]
                if isinstance(first, ast.Name) and first.id in names:
                    first = names[first.id]
                for text in constants(first):
                    yield where, text, given


SAID = list(logged())


def test_what_is_logged_is_found() -> None:
    assert len(SAID) > 70


@pytest.mark.parametrize(("where", "event", "fields"), SAID, ids=[f"{where} {event}" for where, event, _ in SAID])
def test_every_event_and_every_field_is_in_the_schema(where: str, event: str, fields: set[str]) -> None:
    assert event in EVENTS, f"{where}: name the event in daemon/admin/log_events.py"
    assert fields - {"**"} <= FIELDS.keys(), f"{where}: name the fields in daemon/admin/log_events.py"


def test_no_event_is_named_that_nobody_logs() -> None:
    assert EVENTS.keys() - {event for _, event, _ in SAID} == {"round committed", "round failed"}


def test_a_rounds_line_has_no_field_that_means_something_else() -> None:
    assert FIELDS.keys() & set(RoundRow.__struct_fields__) == {"round", "reason", "fault"}


DASHBOARD = ROOT.parent / "deploy/monitoring/grafana-log.json"


def test_the_logs_dashboard_asks_for_events_and_fields_that_there_are() -> None:
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    events = {event for expr in asked for names in re.findall(r'event=~"([^"]+)"', expr) for event in names.split("|")}
    assert len(events) > 8
    assert events <= EVENTS.keys()
    fields = {name for expr in asked for name in re.findall(r"\| (\w+)(?:=|!=|=~)\"", expr)} - {"__error__"}
    shown = {name for expr in asked for name in re.findall(r"\{\{\.(\w+)\}\}", expr)}
    assert fields == {"run", "level", "event", "engine"}
    assert fields | shown <= FIELDS.keys() | set(RoundRow.__struct_fields__)
