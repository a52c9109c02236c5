"""What the documents say about the tree is true: paths, names, links, import lines, make targets, keys and figures.

A document names code in code spans. ``folder/file.py`` is a path from the root of the repository,
``folder/file.py::Name`` or ``folder/file.py::Class.member`` a name in it; both are looked up here, so that a rename
which forgets the documents fails.
"""

import ast
import functools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsync.orchestrator.cli.main import parser
from weightsync.orchestrator.demo.command import _parser as demo_parser
from weightsync.orchestrator.settings.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "changelog.d/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PACKAGES = ("orchestrator", "agents", "kernels")
FOLDERS = (*PACKAGES, "tests", "docs", "deploy", "changelog.d", ".ci")
FOREIGN = frozenset(
    {
        "AsyncDistillationTrainer",
        "AsyncGRPOTrainer",
        "DTensor",
        "EngineCore",
        "StatelessProcessGroup",
        "WeightSource",
        "WeightTransferClient",
    }
)
"""Classes of torch, vLLM and TRL that the documents name."""

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FIGURE = re.compile(r"^\| `([a-z0-9_]+)`[^|]*\| ([\d.]+) \| [^|]*\| (\d+) \| ([\d.]+) \|", re.MULTILINE)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", document.read_text())


def spans(document: Path) -> Iterator[str]:
    """Every code span of the prose."""
    return (found[1] for found in SPAN.finditer(prose(document)))


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Names that the module defines at its top level, and ``Class.member`` for what its classes define."""
    return frozenset(_defined(ast.parse(path.read_text()).body, is_package=path.name == "__init__.py"))


def _defined(body: list[ast.stmt], *, is_package: bool = False) -> Iterator[str]:
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name, body=members):
                yield name
                yield from (f"{name}.{member}" for member in _defined(members))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign(targets=targets):
                # ``A, B = 0, 1`` binds two names, ``A = 0`` one.
                yield from (leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name))
            case ast.ImportFrom(names=names) if is_package:  # what a package hands on is its own
                yield from (alias.asname or alias.name for alias in names)
            case _:
                pass


@functools.cache
def names_of_the_tree() -> frozenset[str]:
    """Every top-level name of the three packages."""
    modules = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return frozenset(name for module in modules for name in names_in(module))


def problem_of_path(span: str) -> str:
    """What is wrong with a span that names a path or a module; empty for a true one and for other spans."""
    if re.fullmatch(r"weightsync(\.\w+)+", span):
        place = ROOT.joinpath(*span.split(".")[1:])
        return "" if place.is_dir() or place.with_suffix(".py").is_file() else "no such module"
    path, _, name = span.partition("::")
    rooted = path.startswith(tuple(f"{folder}/" for folder in FOLDERS))
    if "<" in path or " " in path or not (rooted or name or re.fullmatch(r"\w+\.py", path)):
        return ""  # a placeholder, a sentence, or no path at all
    if not rooted and not name:
        found = (match for package in PACKAGES for match in (ROOT / package).rglob(path))
        return "" if any(found) else "no module of that name"
    if not any(ROOT.glob(path.rstrip("/"))):
        return "no such path"
    if name and name not in names_in(ROOT / path):
        return "the module has no such name"
    return ""


@each_document
def test_paths_and_names_exist(document: Path) -> None:
    problems = {span: problem for span in spans(document) if (problem := problem_of_path(span))}
    assert not problems


@each_document
def test_classes_exist(document: Path) -> None:
    camel = {span for span in spans(document) if re.fullmatch(r"([A-Z][a-z]+){2,}", span)}
    assert camel - names_of_the_tree() - FOREIGN == set()


@each_document
def test_relative_links_resolve(document: Path) -> None:
    broken = [target for target in LINK.findall(prose(document)) if not _resolves(document, target)]
    assert not broken


def _resolves(document: Path, target: str) -> bool:
    if re.match(r"[a-z]+:", target):
        return True  # another host's affair
    path, _, anchor = target.partition("#")
    there = (document.parent / path).resolve() if path else document
    return there.exists() and (not anchor or anchor in {_slug(heading) for heading in HEADING.findall(prose(there))})


def _slug(heading: str) -> str:
    """The anchor that hosts of repositories give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@each_document
def test_import_lines_of_examples_resolve(document: Path) -> None:
    wrong = []
    for fence in FENCE.finditer(document.read_text()):
        if fence[2] == "python":
            indented = re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
            wrong += [line for line in ast.walk(ast.parse(indented)) if not _imports(line)]
    assert [ast.unparse(line) for line in wrong] == []


def _imports(node: ast.AST) -> bool:
    """False for a ``from weightsync.… import …`` of something that is not there."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("weightsync."):
        return True
    place = ROOT.joinpath(*str(node.module).split(".")[1:])
    module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return module.exists() and {alias.name for alias in node.names} <= names_in(module)


def command_lines(document: Path) -> Iterator[list[str]]:
    """The words behind each ``weightsync-orchestrator`` of the fenced blocks, and of code spans that begin with it."""
    text = document.read_text()
    for fence in FENCE.finditer(text):
        for line in re.findall(r"(?:^|[\s/])weightsync-orchestrator ([^\n]*)", fence[3].replace("\\\n", " ")):
            yield shlex.split(re.split(r" [#&]| 2?>", line)[0])
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        if found := re.match(r"(?:\S*/)?weightsync-orchestrator (.+)", " ".join(span.split())):
            yield shlex.split(found[1])


@each_document
def test_command_lines_are_understood(document: Path) -> None:
    wrong = []
    for words in command_lines(document):
        try:
            if words[0] == "demo":
                demo_parser().parse_args(words[1:])
            elif words != ["VERB"]:  # stands for any of them
                parser(words[0]).parse_args(words)
        except SystemExit:
            wrong.append(words)
    assert wrong == []


def test_documents_have_command_lines() -> None:
    assert sum(1 for document in DOCUMENTS for _ in command_lines(document)) > 30


@each_document
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    asked = [word for span in spans(document) if span.startswith("make ") for word in span.split()[1:]]
    assert {word for word in asked if "=" not in word} <= targets


@each_document
def test_settings_keys_exist(document: Path) -> None:
    schema = Settings.model_json_schema()
    keys = set(_keys(schema, schema))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    asked = {span.replace("[]", "") for span in spans(document) if re.fullmatch(r"[a-z_]+(\[\])?(\.[a-z_]+)+", span)}
    asked = {key for key in asked if not key.endswith(".token")}  # files of credentials
    assert {key for key in asked if key.partition(".")[0] in sections} <= keys


def _keys(schema: dict[str, Any], part: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key below ``part`` of a JSON schema as ``section.key``, through references, alternatives and lists."""
    if "$ref" in part:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    for choice in (*part.get("anyOf", ()), *part.get("oneOf", ())):
        yield from _keys(schema, choice, prefix)
    if "items" in part:
        yield from _keys(schema, part["items"], prefix)
    for name, below in part.get("properties", {}).items():
        yield f"{prefix}{name}"
        yield from _keys(schema, below, f"{prefix}{name}.")


def test_figures_are_those_of_the_filed_lines() -> None:
    """A row ``| `figure` … | value | unit | n | spread |`` says what the line of that name in docs/performance says."""
    lines = [line for file in (ROOT / "docs/performance").glob("*.jsonl") for line in file.read_text().splitlines()]
    filed = {line["figure"]: line for line in map(json.loads, lines)}
    rows = FIGURE.findall((ROOT / "docs/performance.md").read_text())
    assert len(rows) > 20
    shown = FIGURE.findall((ROOT / "README.md").read_text())
    assert len(shown) > 4
    assert set(shown) <= set(rows)
    for figure, value, n, spread in rows:
        assert int(n) == filed[figure]["n"], figure
        assert _as_shown(filed[figure]["value"], value), figure
        assert _as_shown(filed[figure]["spread"], spread), figure


def _as_shown(exact: float, shown: str) -> bool:
    """Whether ``exact``, rounded to as many decimals, is what is shown."""
    return f"{exact:.{len(shown.partition('.')[2])}f}" == shown


def test_fragments_have_a_type_that_the_changelog_knows() -> None:
    known = {
        kind["directory"] for kind in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]["type"]
    }
    names = [path.name for path in (ROOT / "changelog.d").glob("*") if path.name != "README.md"]
    assert [name for name in names if not re.fullmatch(rf"(\+[a-z0-9-]+|\d+)\.({'|'.join(known)})\.md", name)] == []


@pytest.mark.parametrize(
    "span",
    [
        "orchestrator/core/nowhere.py",
        "orchestrator/core/machine.py::nobody",
        "docs/nothing.md",
        "nowhere_at_all.py",
        "weightsync.shell",
    ],
)
def test_a_false_path_is_found(span: str) -> None:
    assert problem_of_path(span)


@pytest.mark.parametrize(
    "span",
    [
        "orchestrator/core/machine.py::step",
        "tests/unit/",
        "docs/*.md",
        "machine.py",
        "agents/<engine>",
        "weightsync.agents",
    ],
)
def test_a_true_path_passes(span: str) -> None:
    assert not problem_of_path(span)
