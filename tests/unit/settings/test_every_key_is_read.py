"""Every key of the settings is read by code that acts on it; a key that only looks like a setting fails here.

The code is read, not run: the types of settings objects are followed through annotated parameters, assignments,
attributes of ``self``, loops and comprehensions, and each attribute that is taken of one is a read. It does not count

* in a validator or a property of the settings that nobody outside uses,
* in ``config check``, which only reports,
* as an argument of a message of the protocol or of the core's policy whose field nothing in agents or core reads.

What the walk cannot follow counts as not read, so a mistake of this test shows as a failure; annotate the parameter.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, create_model
from weightsync.orchestrator.settings.explain import models_in
from weightsync.orchestrator.settings.sections import DeadlinesSection
from weightsync.orchestrator.settings.settings import Settings

ROOT = Path(__file__).parents[3]
REPORTS_ONLY = "orchestrator/cli/config.py"

Sources = dict[str, str]
Model = type[BaseModel]


@pytest.fixture(scope="module")
def sources() -> Sources:
    files = [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "agents").rglob("*.py")]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


@dataclass(frozen=True)
class Kind:
    """What an expression may be: an instance of one of these models, or a sequence of them."""

    models: tuple[Model, ...] = ()
    many: bool = False

    def element(self) -> "Kind":
        return Kind(self.models) if self.many else Kind()


@dataclass(frozen=True)
class Read:
    """``attribute`` of ``model`` is taken within ``scope``, for the field ``carried`` of a message or of the policy."""

    model: str
    attribute: str
    scope: str
    carried: str


def keys(model: Model, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Each key that decides something, as (dotted key, class, attribute)."""
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        for section in inner:
            yield from keys(section, f"{prefix}{name}.")
        # A Literal of one value, like the types of transports, has nothing to decide.
        if not inner and not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1):
            yield f"{prefix}{name}", model.__name__, name


def models_of(model: Model) -> dict[str, Model]:
    found = {model.__name__: model}
    for field in model.model_fields.values():
        for section in models_in(field.annotation):
            found |= models_of(section)
    return found


class Walk(ast.NodeVisitor):
    """The reads of one module."""

    def __init__(self, models: dict[str, Model], structs: dict[str, list[str]], attributes: dict[Any, Kind]) -> None:
        self.models, self.structs, self.attributes = models, structs, attributes
        self.reads: set[Read] = set()
        self._names: dict[str, Kind] = {}
        self._class, self._scope, self._carried = "", "", ""

    def kind(self, node: ast.AST | None) -> Kind:
        """What ``node`` is; everything that is read on the way is noted."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, Kind())
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Subscript):
            self.kind(node.slice)
            return self.kind(node.value).element()
        if isinstance(node, ast.IfExp):
            self.kind(node.test)
            return self.kind(node.body) if self.kind(node.body).models else self.kind(node.orelse)
        if node is not None:
            self.visit(node)
        return Kind()

    def _attribute(self, node: ast.Attribute) -> Kind:
        if isinstance(node.value, ast.Name) and node.value.id == "self" and (self._class, node.attr) in self.attributes:
            return self.attributes[self._class, node.attr]
        owner, found, many = self.kind(node.value), [], False
        for model in owner.models if not owner.many else ():
            self.reads.add(Read(model.__name__, node.attr, self._scope, self._carried))
            field = model.model_fields.get(node.attr)
            if field is not None:
                found += models_in(field.annotation)
                many = many or get_origin(field.annotation) is tuple
        return Kind(tuple(self.models[model.__name__] for model in found), many)

    def _annotated(self, annotation: ast.AST | None) -> Kind:
        text = "" if annotation is None else ast.unparse(annotation)
        named = tuple(self.models[word] for word in re.findall(r"\w+", text) if word in self.models)
        return Kind(named, bool(re.search(r"(tuple|list|Sequence|Iterable)\[", text)))

    def _bind(self, target: ast.AST, kind: Kind) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = kind
        elif kind.models and isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            self.attributes[self._class, target.attr] = kind

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer = self._names, self._scope
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._names = self._names | {a.arg: self._annotated(a.annotation) for a in arguments}
        if self._class in self.models and "self" in self._names:
            self._names["self"] = Kind((self.models[self._class],))
        self._scope = self._scope or f"{self._class}.{node.name}"
        for statement in node.body:
            self.visit(statement)
        self._names, self._scope = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=True):
                    self._bind(one, self.kind(value))
            else:
                self._bind(target, self.kind(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.kind(node.value)
        self._bind(node.target, self._annotated(node.annotation))

    def visit_For(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> None:
        self._bind(node.target, self.kind(node.iter).element())
        for field in ("ifs", "body", "orelse"):
            for child in getattr(node, field, []):
                self.visit(child)

    visit_AsyncFor = visit_comprehension = visit_For

    def visit_GeneratorExp(self, node: Any) -> None:
        for generator in node.generators:  # They bind the names that the element uses, and stand behind it.
            self.visit(generator)
        for field in ("elt", "key", "value"):
            self.kind(getattr(node, field, None))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp

    def visit_Call(self, node: ast.Call) -> None:
        self.kind(node.func)
        fields = self.structs.get(node.func.id) if isinstance(node.func, ast.Name) else None
        named = [*zip(fields or [""] * len(node.args), node.args, strict=False)]
        named += [(keyword.arg or "", keyword.value) for keyword in node.keywords]
        for name, argument in named:
            outer = self._carried
            self._carried = name if fields else outer
            self.kind(argument)
            self._carried = outer

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.kind(node)


def structs_in(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """The messages of the protocol and the policy of the core, each with its fields in order."""
    return {
        node.name: [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
        for path, tree in trees.items()
        if path.startswith(("orchestrator/protocol/", "orchestrator/core/policy"))
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def unread(sources: Sources, settings: Model = Settings) -> list[str]:
    """The keys of ``settings`` that nothing in ``sources`` acts on."""
    trees = {path: ast.parse(text) for path, text in sources.items() if path != REPORTS_ONLY}
    models, structs = models_of(settings), structs_in(trees)
    attributes: dict[Any, Kind] = {}
    reads: set[Read] = set()
    for _ in range(2):  # An attribute may be used above the line that sets it.
        reads.clear()
        for path, tree in trees.items():
            if path.startswith("orchestrator/"):
                walk = Walk(models, structs, attributes)
                walk.visit(tree)
                reads |= walk.reads
    acted_on = {
        node.attr
        for path, tree in trees.items()
        if path.startswith(("agents/", "orchestrator/core/"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    by_scope: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for read in reads:
        if not read.carried or read.carried in acted_on:
            inside = read.scope.partition(".")[0] in models
            by_scope[read.scope if inside else ""].add((read.model, read.attribute))
    counted, waiting = set[tuple[str, str]](), list(by_scope[""])
    while waiting:
        taken = waiting.pop()
        if taken not in counted:
            counted.add(taken)
            waiting += by_scope[".".join(taken)]  # What a property or a method of the settings reads in its turn.
    return sorted({key for key, model, attribute in keys(settings) if (model, attribute) not in counted})


def test_every_key_is_read(sources: Sources) -> None:
    assert unread(sources) == []


def planted(**fields: Any) -> Model:
    section = create_model("DeadlinesSection", __base__=DeadlinesSection, **fields)
    return create_model("Settings", __base__=Settings, deadlines=(section, section()))


def changed(sources: Sources, path: str, old: str, new: str) -> Sources:
    assert old in sources[path]
    return sources | {path: sources[path].replace(old, new)}


def test_a_key_that_nobody_reads_is_found(sources: Sources) -> None:
    assert unread(sources, planted(idle_seconds=(float, 1.0))) == ["deadlines.idle_seconds"]


def test_a_key_that_only_a_validator_reads_is_found(sources: Sources) -> None:
    path = "orchestrator/settings/sections.py"
    text = "\n    def _checks(self):\n        return self.idle_seconds > 0\n"
    inside = changed(sources, path, "class DeadlinesSection(Section):\n", f"class DeadlinesSection(Section):\n{text}\n")
    assert unread(inside, planted(idle_seconds=(float, 1.0))) == ["deadlines.idle_seconds"]
    used = inside | {"orchestrator/x.py": "def f(settings: Settings):\n    settings.deadlines._checks()\n"}
    assert unread(used, planted(idle_seconds=(float, 1.0))) == []


def test_a_key_that_fills_a_field_that_nobody_reads_is_found(sources: Sources) -> None:
    lost = changed(sources, "orchestrator/settings/sections.py", "rails=self.rails", "unheard_of=self.rails")
    assert unread(lost) == ["transport.rails"]


def test_a_key_that_loses_its_only_reader_is_found(sources: Sources) -> None:
    (path,) = (path for path, text in sources.items() if "join=deadlines.join_seconds" in text)
    assert unread(changed(sources, path, "join=deadlines.join_seconds", "join=600")) == ["deadlines.join_seconds"]


def test_every_key_says_what_it_is_and_a_time_says_its_unit() -> None:
    models = models_of(Settings)
    for key, model, attribute in keys(Settings):
        field = models[model].model_fields[attribute]
        assert field.description, f"{key} has no description"
        if field.annotation is float and key != "commit.min_engines":  # it counts
            assert attribute.endswith("_seconds"), f"{key}: a number with a unit says the unit in its name"
