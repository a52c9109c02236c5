"""Turns pydantic's findings into problems that name line, value and fix."""

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Union

from pydantic import BaseModel, ValidationError
from weightsync.orchestrator.settings.document import Document
from weightsync.orchestrator.settings.moved import moved
from weightsync.orchestrator.settings.problems import MAX_PROBLEMS, Key, Problem, closest, dotted, shown

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def explain(
    document: Document, variables: Mapping[Key, str], error: ValidationError, model: type[BaseModel]
) -> list[Problem]:
    """One Problem per finding, in the order of the file's keys.

    Args:
        document: the file, for the lines.
        variables: which environment variable gave which key.
        error: pydantic's findings about ``model``.
        model: the class of the whole settings.
    """
    # A few more than are told: a wrong entry has two findings, of which one is left out below.
    findings = error.errors(include_url=False)[: 4 * MAX_PROBLEMS]
    problems = [(details["type"], _problem(document, variables, details, model)) for details in findings]
    # An invalid entry makes pydantic say in addition that the list is too short.
    return [
        problem
        for kind, problem in problems
        if kind != "too_short" or not any(other.key.startswith(f"{problem.key}[") for _, other in problems)
    ]


def _problem(
    document: Document, variables: Mapping[Key, str], details: "ErrorDetails", model: type[BaseModel]
) -> Problem:
    key, owner, siblings = _follow(model, details["loc"])
    kind, value = details["type"], details["input"]
    context: dict[str, Any] = details.get("ctx", {})
    if kind == "extra_forbidden":
        what, fix = _unknown(key, owner, siblings)
    elif kind == "missing":
        what, fix, value = "the key is missing", f"add {dotted(key)}{_described(owner, key)}", None
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = str(context.get("expected_tags", "")) or _tags(siblings)
        what, fix = f"type must be one of {expected}", "set type to one of them"
        key = (*key, "type") if isinstance(value, dict) else key
        value = value.get("type") if isinstance(value, dict) else value
    elif kind == "fits_nowhere":
        what, fix = details["msg"], f"number the entries from 0 without a gap, as in {dotted(key)}[0]"
        key, value = (*key, context["entry"]), None
    elif kind == "value_error":
        what, fix = (
            str(context.get("error", details["msg"])),
            _described(owner, key).strip(" ()") or "change one of them",
        )
        value = None
    else:
        what = details["msg"][:1].lower() + details["msg"][1:]
        fix = _described(owner, key).strip(" ()") or "see weightsync-orchestrator config example"
    line, variable = _origin(document, variables, key)
    return Problem(dotted(key), "" if value is None else shown(key, value), what, fix, line, variable)


def _origin(document: Document, variables: Mapping[Key, str], key: Key) -> tuple[int | None, str]:
    """The line that gave ``key``, or the variable; where nothing gave it, those of what it should stand in."""
    for length in range(len(key), 0, -1):
        part = key[:length]
        if part in variables:
            return None, variables[part]
        line, collection = document.find(part)
        # A variable for a key of a mapping makes the mapping, unless the file has one already.
        below = next((name for other, name in variables.items() if other[:length] == part), "")
        if below and not collection:
            return None, below
        if line is not None:
            return line, ""
    return None, ""


def _follow(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[Key, type[BaseModel] | None, list[Any]]:
    """The key without pydantic's union tags, the model that holds its last part, and that model's union siblings."""
    key: list[str | int] = []
    owner: type[BaseModel] | None = model
    siblings: list[Any] = []
    candidates: list[Any] = [model]
    for part in location:
        tagged = [c for c in candidates if isinstance(part, str) and _tag(c) == part]
        if tagged and len(candidates) > 1:
            siblings, candidates, owner = candidates, tagged, tagged[0]
            continue
        key.append(part)
        holders = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if isinstance(part, str) and holders:
            owner = holders[0]
            siblings = siblings if owner in siblings else holders
            field = owner.model_fields.get(part)
            candidates = list(models_in(field.annotation)) if field else []
    return tuple(key), owner, siblings if owner in siblings else candidates


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field of this annotation may hold, one by one or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (Union, types.UnionType, tuple, list, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from models_in(argument)


def _tag(model: Any) -> str:
    field = model.model_fields.get("type") if isinstance(model, type) and issubclass(model, BaseModel) else None
    return str(field.default) if field is not None else ""


def _tags(models: list[Any]) -> str:
    return ", ".join(_tag(model) for model in models)


def _unknown(key: Key, owner: type[BaseModel] | None, siblings: list[Any]) -> tuple[str, str]:
    name = str(key[-1])
    instead = moved(key)
    if instead:
        return "the key is one of an earlier release and is gone", instead
    for other in siblings:
        if other is not owner and name in other.model_fields:
            section = dotted(key[:-1])
            return (
                f"the key belongs to {section} type {_tag(other)}, and this {section} is of type {_tag(owner)}",
                f"remove it, or set {section}.type to {_tag(other)}",
            )
    known = sorted(owner.model_fields) if owner is not None else []
    secret_file = f"{name}_file"
    if secret_file in known:
        return "a secret must not stand in the configuration", f"put it into a file and name that in {secret_file}"
    meant = closest(name, known)
    hint = f"did you mean {meant}? " if meant else ""
    return "unknown key", f"{hint}known here: {', '.join(known)}"


def _described(owner: type[BaseModel] | None, key: Key) -> str:
    field = owner.model_fields.get(str(key[-1])) if owner is not None and key else None
    if field is None or not field.description:
        return ""
    default = "" if field.is_required() or isinstance(field.default, BaseModel) else f" Default: {field.default}."
    return f" ({field.description}{default})"
