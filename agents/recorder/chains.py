"""What happens to the values of an element on its way from the checkpoint: casts, and functions of one element.

A chain is what tracing saw, in order. An element that is only copied, or cast once, travels as a value of the engine's
dtype. One that goes through elementwise functions travels as it is before the first of them; the rest of the chain is
its *program*, which the engine runs again after every write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, TypeAlias

import torch

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Cast:
    """An element seen as ``seen`` and stored as ``stored``; the same dtype where it is only copied."""

    seen: torch.dtype
    stored: torch.dtype


@dataclass(frozen=True, slots=True)
class Function:
    """A function of one element: ``operation(x, *numbers, **options)`` takes ``seen`` and gives ``stored``."""

    seen: torch.dtype
    stored: torch.dtype
    operation: Any
    numbers: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


Chain: TypeAlias = tuple[Cast | Function, ...]

ELEMENTWISE: Final = frozenset(
    {aten.abs, aten.add, aten.div, aten.exp, aten.log, aten.mul, aten.neg, aten.pow, aten.reciprocal, aten.rsqrt,
     aten.rsub, aten.sqrt, aten.sub}
)  # fmt: skip
"""Operations that give each element of the result from one element and numbers: all that a loader may compute with."""


def step_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], gives: torch.dtype) -> Function | None:
    """``func(*args, **kwargs)`` as a step, if it is elementwise over ``args[0]`` and takes only numbers besides."""
    others = (*args[1:], *kwargs.values())
    if func.overloadpacket not in ELEMENTWISE or not all(isinstance(o, bool | int | float | str) for o in others):
        return None
    return Function(args[0].dtype, gives, func, tuple(args[1:]), tuple(kwargs.items()))


def functional(func: Any) -> Any:
    """The function behind an in-place one (``mul`` of ``mul_``), None if ``func`` is not that of an elementwise one."""
    name = str(func.overloadpacket).removeprefix("aten.")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, func._overloadname, None) if packet in ELEMENTWISE else None


def travelling(source: torch.dtype, chain: Chain) -> tuple[torch.dtype, Chain] | None:
    """The wire dtype of elements that begin as ``source``, and their program; None if bytes cannot stand for them."""
    casts: list[torch.dtype] = []
    reinterpreted = False
    current = source
    for index, link in enumerate(chain):
        if isinstance(link, Function):
            program = chain[index:]
            plain = not reinterpreted and len(casts) <= 1 and link.seen == current and _connected(program)
            return (current, program) if plain else None
        reinterpreted |= link.seen != current
        if link.stored != link.seen:
            casts.append(link.stored)
        current = link.stored
    if not casts:
        return source, ()  # copied as it is: under its own dtype, or reinterpreted under one of the same size
    # One cast gives the same values at the sender as in the loader; two may round twice.
    return (casts[0], ()) if len(casts) == 1 and not reinterpreted else None


def _connected(program: Chain) -> bool:
    return all(before.stored == after.seen for before, after in pairwise(program))


def run(program: Chain, values: torch.Tensor) -> torch.Tensor:
    """What the engine's loader makes of ``values``: a new tensor (or ``values`` itself without a program)."""
    for link in program:
        if isinstance(link, Function):
            values = link.operation(values, *link.numbers, **dict(link.options))
        else:
            values = values.to(link.stored)
    return values


def described(chain: Chain) -> str:
    """The dtypes and functions of ``chain`` for people, in order."""
    words: list[str] = []
    for link in chain:
        if isinstance(link, Function):
            words.append(f"{link.operation.overloadpacket}{list(link.numbers) if link.numbers else ''}")
        words += [str(link.stored).removeprefix("torch.")] if isinstance(link, Cast) else []
    return " to ".join(word for index, word in enumerate(words) if index == 0 or word != words[index - 1])
