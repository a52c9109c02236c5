"""Watches post-load processing: which memory it wrote to, and where copies of weights, or what is made of them, went.

Attributes do not tell who holds a copy: a closure may, or a container, or a kernel's own object. So the data is
followed, not the holders: every tensor that an operation makes from a loaded weight is remembered by its memory, and
whatever of that is still there afterwards, and is not written or refreshed by a round, would keep the old weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from weightsync.agents.recorder.contents import storage_key
from weightsync.agents.recorder.operations import leaves, written

aten = torch.ops.aten

MAX_NAMES: Final = 4
"""Weights that one sentence names."""

OWN: Final = ("aten", "prim", "prims", "profiler")
"""Namespaces of torch's own operations, none of which keeps what it is given."""

LOOKS: Final = frozenset({aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.allclose})
"""Operations by which a program learns values: what it decides or keeps by them is not seen."""


class Processing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode under which an engine processes the weights that it has loaded."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        """``weights``: what was loaded, by name. Nothing is kept alive by being watched."""
        super().__init__()  # type: ignore[no-untyped-call]
        # A weak reference keeps the identity of a storage from being given to another one, and no byte of it.
        self._refs: dict[int, StorageWeakRef] = {}
        self._origin: dict[int, frozenset[str]] = {}
        self._made_by: dict[int, str] = {}
        self._changed: set[int] = set()
        self.entered = False
        self._custom = _CustomOperations(self._perform)
        self.handed_over: list[str] = []
        """Sentences about weights that went into an operation which gave no tensor: some object of its own has them."""
        self.looked: set[str] = set()
        """Names of weights whose values were looked at."""
        for name, tensor in weights.items():
            self._follow(tensor, self._origin.get(storage_key(tensor), frozenset()) | {name}, "")

    def __enter__(self) -> Self:
        self.entered = True
        super().__enter__()  # type: ignore[no-untyped-call]
        self._custom.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        self._custom.__exit__(*exc)  # type: ignore[no-untyped-call]
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._perform(func, func, args, kwargs or {})

    def _perform(self, call: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``call(*args, **kwargs)``, which is ``func`` by its schema."""
        inputs = leaves(args, kwargs)
        origin = frozenset[str]().union(*(self._origin.get(storage_key(t), frozenset()) for t in inputs))
        changed = written(func, args, kwargs)
        out = call(*args, **kwargs)
        for tensor in changed:
            self._changed.add(storage_key(tensor))
            self._hold_identity(tensor)
        if origin:
            results = [*leaves(out), *changed]
            for tensor in results:
                if not origin <= self._origin.get(storage_key(tensor), frozenset()):
                    self._follow(tensor, origin, str(func))
            if not results:
                self._seen_without_result(func, origin)
        return out

    def _follow(self, tensor: torch.Tensor, origin: frozenset[str], by: str) -> None:
        key = storage_key(tensor)
        self._hold_identity(tensor)
        self._origin[key] = self._origin.get(key, frozenset()) | origin
        self._made_by[key] = by

    def _hold_identity(self, tensor: torch.Tensor) -> None:
        if storage_key(tensor) not in self._refs:
            self._refs[storage_key(tensor)] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def _seen_without_result(self, func: Any, origin: frozenset[str]) -> None:
        if func.overloadpacket in LOOKS:
            self.looked |= origin
        elif func.namespace not in OWN:
            fault = f"{_names(origin)} went into {func}, which keeps it where no round can reach"
            self.handed_over = [*dict.fromkeys([*self.handed_over, fault])]

    def touched(self, key: int) -> bool:
        """Whether an operation wrote to the storage of this key."""
        return key in self._changed

    def copies(self, accounted: set[int]) -> list[str]:
        """Sentences about memory made from weights that is still held and not among ``accounted`` storages (keys)."""
        alive = self._alive(accounted)
        if alive:
            gc.collect()  # what only a circle of references holds is no copy
            alive = self._alive(accounted)
        return sorted(
            f"{_names(self._origin[key])}: "
            + (f"a result of {self._made_by[key]} is kept" if self._made_by[key] else "its first memory is still held")
            for key in alive
        )

    def _alive(self, accounted: set[int]) -> list[int]:
        return [
            key
            for key in self._origin
            if key not in accounted and not self._refs[key].expired()  # type: ignore[no-untyped-call]
        ]


class _CustomOperations(TorchFunctionMode):
    """Lets ``perform`` see operations of kernel libraries that were registered for all devices at once.

    For a dispatch mode these are made of the operations inside them; but there are none, and they read memory.
    """

    def __init__(self, perform: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._see = perform

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = _custom(func)
        if schema is None:
            return func(*args, **(kwargs or {}))
        return self._see(func, schema, args, kwargs or {})


def _custom(func: Any) -> Any:
    """The operation of a kernel library behind ``func``, None for torch's own and for functions."""
    if isinstance(func, OpOverloadPacket):
        overloads = func.overloads()  # type: ignore[no-untyped-call]
        func = getattr(func, overloads[0]) if len(overloads) == 1 else None
    return func if isinstance(func, OpOverload) and func.namespace not in OWN else None


def _names(origin: frozenset[str]) -> str:
    names = sorted(origin)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
