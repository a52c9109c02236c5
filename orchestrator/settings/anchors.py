"""Relative paths of a configuration count from the directory of the file that they are in."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)


def anchored(model: Model, base: Path) -> Model:
    """``model`` with every relative path counted from ``base``."""
    update: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Path):
            update[name] = base / value
        elif isinstance(value, BaseModel):
            update[name] = anchored(value, base)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            update[name] = tuple(anchored(item, base) for item in value)
    return model.model_copy(update=update)
