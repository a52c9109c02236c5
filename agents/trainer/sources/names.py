"""The model's own names of its tensors, from those that wrappers around it make of them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Final

import torch
from weightsync.agents.trainer.errors import AmbiguousName

WRAPPERS: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Parts of names, wherever they stand, of torch.compile, activation checkpointing and FSDP1's layers."""

MARKS: Final = ("_orig_mod", "_wrapped_module")
"""One of them is in each of WRAPPERS."""

OUTER: Final = (
    ("module.", ()),  # DDP, DataParallel, DeepSpeed's engine, Megatron's Float16Module
    ("pretrained_model.", ("v_head.", "ilql_heads.")),  # TRL's value heads
    ("base_model.model.", ("prompt_encoder.", "word_embeddings.")),  # peft around a tuner around the model
    ("base_model.", ("prompt_encoder.", "word_embeddings.")),  # peft around the model itself
)
"""What wrappers of a whole model put before its names, and what each has of its own beside the model. A prefix is a
wrapper's only where all of the state bears it out; within a model the same word is the model's."""


def plain_names(names: Collection[str]) -> Callable[[str], str]:
    """How a name of the state ``names`` (or of a module among them) becomes the model's own."""
    inner, outer = _wrapped(names)
    return partial(_plain, inner, outer)


def plain_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tensors`` under the model's own names, in their order.

    Raises:
        AmbiguousName: two different tensors would have one name.
    """
    inner, outer = _wrapped(tensors)
    if not inner and not outer:
        return dict(tensors)
    plain = partial(_plain, inner, outer)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = plain(name)
        if state.setdefault(short, tensor) is not tensor:
            raise AmbiguousName(next(given for given in tensors if plain(given) == short), name, short)
    return state


def _wrapped(names: Collection[str]) -> tuple[bool, tuple[str, ...]]:
    """Whether there are wrappers within the model, and the prefixes of those around it."""
    together = "\n".join(names)  # there may be tens of thousands, and nearly always none is wrapped
    inner = any(mark in together for mark in MARKS)
    return inner, tuple(_outer({_inner(name) for name in names} if inner else set(names)))


def _plain(inner: bool, outer: tuple[str, ...], name: str) -> str:
    name = _inner(name) if inner else name
    for prefix in outer:
        name = name.removeprefix(prefix)
    return name


def _inner(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _outer(names: set[str]) -> Iterator[str]:
    """The prefixes of all wrappers around the model, the outermost first."""
    while True:
        prefix = next((p for p, beside in OUTER if _wraps(p, beside, names)), None)
        if prefix is None:
            return
        yield prefix
        names = {name.removeprefix(prefix) for name in names}


def _wraps(prefix: str, beside: tuple[str, ...], names: set[str]) -> bool:
    return all(name.startswith((prefix, *beside)) for name in names) and any(name.startswith(prefix) for name in names)
