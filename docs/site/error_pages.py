"""The page of errors, made at each build from the source of the agents: importing all of them would need vLLM."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

AGENTS: Final = Path(__file__).resolve().parents[2] / "agents"
ROOT: Final = "AgentError"

FAULTS: Final = {
    "trainer": "the training job: its model, its step, a rank that ended",
    "engine": "the engine: its model, its memory, its process; a restart is safe, it catches up by itself",
    "daemon": "this software; report it with the log",
    "network": "the way between two hosts: `doctor` on both, and `rounds` for the edge",
    "config": "what is configured, or does not fit together; the text names the key or tensor and what to write",
}


@dataclass(frozen=True)
class Kind:
    """One class of the tree. ``fault`` and ``retry`` are None where it says the same as its base."""

    name: str
    base: str
    module: str
    fault: str | None
    retry: bool | None
    says: str


def page() -> str:
    """Every error that an agent raises."""
    lines = [
        "# Errors",
        "",
        "`status`, `rounds` and the log say of each failure whose *fault* it is: who has to change something.",
        "",
        "| fault | look at |",
        "|---|---|",
        *(f"| `{fault}` | {where} |" for fault, where in FAULTS.items()),
        "",
        "A traceback, and a text about another process, name one of these. *Again*: the same attempt may succeed later",
        "without any change, so that it is made by itself. The exit codes of the commands are in",
        "[operations](../operations.md#exit-codes), what to do about an alert in the [runbook](../runbook.md).",
        "",
        "| error | fault | again | what it says | module of `agents` |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{kind.name}` | {fault} | {'yes' if retry else 'no'} | {kind.says} | `{kind.module}` |"
        for kind, fault, retry in errors()
    ]
    return "\n".join(lines) + "\n"


def errors() -> Iterator[tuple[Kind, str, bool]]:
    """All below ``AgentError``, by module, with what they inherit."""
    known = {kind.name: kind for path in sorted(AGENTS.rglob("*.py")) for kind in _kinds(path)}
    for kind in known.values():
        line = [kind]
        while line[-1].base in known:
            line.append(known[line[-1].base])
        if line[-1].name == ROOT and len(line) > 1:
            fault = next(each.fault for each in line if each.fault is not None)
            yield kind, fault, next(each.retry for each in line if each.retry is not None)


def _kinds(path: Path) -> Iterator[Kind]:
    module = ".".join(path.relative_to(AGENTS).with_suffix("").parts)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.bases:
            bases = [ast.unparse(base) for base in node.bases]
            base = next((name for name in bases if name != "RuntimeError"), bases[0])
            own = dict(_constants(node))
            says = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split()).replace("|", "\\|")
            yield Kind(node.name, base, module, own.get("fault"), own.get("retry"), says.replace("``", "`"))


def _constants(kind: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in kind.body:
        if isinstance(item, ast.AnnAssign | ast.Assign) and isinstance(item.value, ast.Constant):
            target = item.target if isinstance(item, ast.AnnAssign) else item.targets[0]
            yield ast.unparse(target), item.value.value


PAGES: Final[dict[str, Callable[[], str]]] = {"reference/errors.md": page}
