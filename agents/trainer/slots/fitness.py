"""Which trainer tensors can be weights at all; every other is refused by its name, before a byte of it is read."""

from collections.abc import Collection, Iterator
from itertools import islice
from typing import Final

import torch
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from weightsync.agents.trainer.errors import UnfitTensor

ACCEPTED: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of sources. Others are codes of a quantisation, whose values depend on scales that lie elsewhere."""

CALLABLE: Final = "give a callable that returns"
"""How a model's tensors can be given otherwise than they are."""

NEAR_NAMES: Final = 3
"""How many similar names an error about a missing tensor shows."""

ADVICE: Final = (
    (".parametrizations.", ": a parametrised module; give a callable that returns the weight that it computes"),
    (".base_layer.", ": an adapter's base; give the peft model itself, or lora=LoraMerge(…)"),
    ("_flat_param", ": flat shards of FSDP1; use fully_shard (FSDP2)"),
)
"""What to do where a similar name shows who has taken the tensor's place."""

FSDP1: Final = (
    "is sharded by FullyShardedDataParallel, which keeps flat shards; use fully_shard (FSDP2), or give a callable that"
    " returns whole tensors: torch.distributed.checkpoint.state_dict.get_model_state_dict(model,"
    " options=StateDictOptions(full_state_dict=True))"
)


def refuse_unfit(name: str, tensor: object, *, values: bool = True, as_they_are: Collection[torch.dtype] = ()) -> None:
    """That ``tensor`` holds numbers that can be weights, here and now.

    Args:
        name: the trainer's.
        tensor: what the state has under it.
        values: False accepts tensors on meta, for plans over tensors that are never converted.
        as_they_are: see ``objection``.

    Raises:
        UnfitTensor: with the name, what is wrong and what to do.
    """
    reason = objection(tensor, values=values, as_they_are=as_they_are)
    if reason:
        raise UnfitTensor(name, reason)


def objection(
    tensor: object, *, values: bool = True, as_they_are: Collection[torch.dtype] = (), give: str = CALLABLE
) -> str:
    """Why ``tensor`` can be no weight, as the end of a sentence that begins with its name; empty if it can.

    Args:
        tensor: of a state or a stream.
        values: see ``refuse_unfit``.
        as_they_are: further dtypes that are accepted, because engines are sent them unchanged.
        give: how it can be given otherwise.
    """
    if not isinstance(tensor, torch.Tensor):
        return f"is a {type(tensor).__name__} and no tensor"
    if is_lazy(tensor):
        return "has no shape yet (a lazy module); run one forward first"
    placeholder = _placeholder(tensor, give)
    if placeholder:
        return placeholder
    # A DTensor's local tensor may itself be of a class that only looks like numbers (quantised and sharded).
    parts = (tensor, tensor._local_tensor) if isinstance(tensor, DTensor) else (tensor,)
    return next((reason for part in parts for reason in _plain_objections(part, values, as_they_are, give)), "")


def hint(wanted: str, names: Collection[str]) -> str:
    """Why ``wanted`` may be missing among ``names``, as the end of a sentence; empty if nothing comes near it."""
    found = near_names(wanted, names)
    advice = next((text for part, text in ADVICE if any(part in name for name in found)), "")
    return f"; it has {', '.join(map(repr, found))}{advice}" if found else ""


def near_names(wanted: str, names: Collection[str]) -> tuple[str, ...]:
    """At most NEAR_NAMES of ``names`` that say why ``wanted`` is missing: one with a prefix more or less, or what its
    module holds in its place."""
    module, _, leaf = wanted.rpartition(".")
    longer = (n for n in names if n.endswith("." + wanted) or ("." in n and wanted.endswith("." + n)))
    beside = (n for n in names if module and n.startswith(module + ".") and leaf in n.split("."))
    within = (n for n in names if module and n.startswith(module + "."))
    found = dict.fromkeys(name for some in (longer, beside, within) for name in some)
    return tuple(islice(found, NEAR_NAMES))


def _placeholder(tensor: torch.Tensor, give: str) -> str:
    """What FSDP1 and DeepSpeed leave in a parameter's place while its values are elsewhere."""
    if isinstance(tensor, FlatParameter) or getattr(tensor, "_fsdp_flattened", False):
        return FSDP1
    whole = getattr(tensor, "ds_shape", None)  # DeepSpeed marks what ZeRO-3 partitions
    if whole is not None and tuple(whole) != tuple(tensor.shape):
        return (
            f"is a placeholder of DeepSpeed ZeRO-3 of shape {tuple(tensor.shape)}, the weight's is {tuple(whole)};"
            f" {give} tensors gathered with deepspeed.zero.GatheredParameters, or use ZeRO-1 or 2"
        )
    return ""


def _plain_objections(
    tensor: torch.Tensor, values: bool, as_they_are: Collection[torch.dtype], give: str
) -> Iterator[str]:
    dispatched = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if dispatched and not isinstance(tensor, DTensor):
        yield (
            f"is a {type(tensor).__name__}, whose values are not in its own memory; {give} a plain tensor (dequantised,"
            " or merged)"
        )
    if tensor.layout != torch.strided:
        yield f"has the layout {tensor.layout}; {give} it dense"
    if tensor.dtype not in ACCEPTED and tensor.dtype not in as_they_are:
        accepted = ", ".join(_short(dtype) for dtype in ACCEPTED)
        yield f"is {_short(tensor.dtype)}; weights are {accepted}: {give} it dequantised, or merged or master weights"
    if tensor.is_meta:
        if values:
            yield (
                "is on meta, it has no values (offloaded by accelerate, or never materialised); load it onto a device,"
                f" or {give} it there"
            )
    elif tensor.numel() and not isinstance(tensor, DTensor) and not dispatched and not _backed(tensor):
        yield f"has no memory now: whoever shards or offloads it has given it back; {give} it gathered"


def _backed(tensor: torch.Tensor) -> bool:
    """Whether the memory that the tensor describes exists (sharding frameworks shrink storages to nothing)."""
    return tensor.untyped_storage().nbytes() >= tensor.element_size() * tensor.storage_offset() + tensor.element_size()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
