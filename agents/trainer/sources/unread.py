"""What the trainer trains and no engine would get: refused, unless somebody says that it is meant so."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

import torch
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.errors import UnreadTensors

ADAPTER: Final = re.compile(r"(^|[._])(lora|adapter)s?(_|\.|$)|_adapters?(\.|$)", re.IGNORECASE)
"""Names of adapters, which are trained by nature: detached copies do not show that they require a gradient."""

HEAD: Final = re.compile(r"(^|\.)lm_head\.(weight|bias)$")
"""An output head that nothing reads belongs to a model that is configured as tied; it must be the embedding then."""


def unread(state: Mapping[str, torch.Tensor], read: Collection[str], ignore: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of ``state`` whose values no engine gets, sorted.

    Args:
        state: the trainer's tensors.
        read: names that are converted. The same memory under another name (a tied head) counts as read.
        ignore: patterns (``fnmatch``) of names that nobody is to get.
    """
    left = [
        name for name in sorted(state.keys() - set(read)) if not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    # Only tensors of one shape can share all of their memory, and mostly there is nothing left to compare with.
    shapes = {_shape(state[name]) for name in left}
    alike = (state[name] for name in read if left and name in state and _shape(state[name]) in shapes)
    known = {place for tensor in alike for place in _places(tensor)}
    return tuple(name for name in left if known.isdisjoint(_places(state[name])))


def refuse_trained(state: Mapping[str, torch.Tensor], left: Collection[str], read: Collection[str]) -> None:
    """That none of ``left`` (see ``unread``) is trained.

    Raises:
        UnreadTensors: some are, by ``requires_grad``, by an adapter's name, or as a head that differs from every
            tensor that is read.
    """
    trained = [
        name
        for name in left
        if getattr(state[name], "requires_grad", False)
        or ADAPTER.search(name)
        or (HEAD.search(name) and not _copied(state, name, read))
    ]
    if trained:
        raise UnreadTensors(trained)


def _places(tensor: object) -> Iterator[object]:
    """What two names of one tensor have in common: the object itself, or its memory."""
    yield id(tensor)
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if isinstance(local, torch.Tensor) and not local.is_meta and local.layout == torch.strided and local.numel():
        address = local.data_ptr()  # 0 for classes without memory of their own
        if address:
            yield (address, tuple(local.shape), local.stride(), local.dtype)


def _shape(tensor: object) -> tuple[int, ...]:
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()  # extra state may be anything


def _copied(state: Mapping[str, torch.Tensor], name: str, read: Collection[str]) -> bool:
    """Whether a tensor that is read holds the same values: a callable may return copies of what is tied."""
    own = _local(state[name])
    alike = (_local(state[other]) for other in read if other in state and _shape(state[other]) == _shape(state[name]))
    return any(own.shape == other.shape and torch.equal(own, other.to(own)) for other in alike)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()
