"""A checkpoint in parts: every rank saves the boxes that its slots hold, as they are on the wire; a reader joins them.

This is the wire of the filesystem transport. Each part is one safetensors file and one small JSON file that says which
box of which logical tensor each entry is; the JSON is written last, so a part without it was never finished.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from weightsync.agents.trainer.errors import CheckpointError
from weightsync.agents.trainer.slots.boxes import Box
from weightsync.agents.trainer.slots.slots import ARENA_REGION, LayoutEntry, TrainerSlots
from weightsync.orchestrator.protocol.layout import Tensor

INDEX_SUFFIX: Final = ".boxes.json"
MAX_INDEX_BYTES: Final = 256 * 1024 * 1024
"""Of one part's JSON file. A rank that holds all of Kimi-K2 alone has 140 k boxes of about 150 bytes."""


class _SavedBox(msgspec.Struct, frozen=True):
    key: str
    tensor: Tensor
    offset: tuple[int, ...]
    extent: tuple[int, ...]


class _Part(msgspec.Struct, frozen=True):
    rank: int
    world: int
    boxes: tuple[_SavedBox, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A saved box and the file that it is in."""

    file: Path
    key: str
    tensor: Tensor
    box: Box


def save_checkpoint_part(path: Path, slots: TrainerSlots) -> Path:
    """Write this rank's part into the directory ``path``, through temporary files and renames.

    Boxes that several ranks hold are saved by the first replica only.

    Returns:
        The safetensors file.

    Raises:
        OSError: the directory cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    stem = f"part-{slots.rank:05d}-of-{slots.world:05d}"
    file, index = path / f"{stem}.safetensors", path / f"{stem}{INDEX_SUFFIX}"
    entries = [entry for entry in slots.entries() if entry.first_replica]
    keys = [f"{number:06d} {entry.tensor.name}" for number, entry in enumerate(entries)]
    arena = slots.arenas[ARENA_REGION]
    index.unlink(missing_ok=True)
    tensors = {key: _bytes_of(entry, arena) for key, entry in zip(keys, entries, strict=True)}
    temporary = path / f".{stem}.tmp"
    save_file(tensors, temporary)
    _settle(temporary, file)
    boxes = tuple(
        _SavedBox(key, entry.tensor, entry.box.offset, entry.box.extent)
        for key, entry in zip(keys, entries, strict=True)
    )
    temporary.write_bytes(msgspec.json.encode(_Part(slots.rank, slots.world, boxes)))
    _settle(temporary, index)
    return file


def load_checkpoint_parts(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All logical tensors of the parts in ``path``, whole, in the order of their names, one in memory at a time.

    All parts are examined before the first tensor is read. A box that several parts hold alike counts once.

    Raises:
        CheckpointError: a part is missing or unreadable, or the boxes of a tensor leave a gap or overlap; by name.
    """
    found: dict[str, list[_Found]] = {}
    for file, part in _parts(path):
        for saved in part.boxes:
            box = Box(saved.offset, saved.extent)
            found.setdefault(saved.tensor.name, []).append(_Found(file, saved.key, saved.tensor, box))
    distinct = {name: _covering(name, boxes) for name, boxes in sorted(found.items())}
    return _assembled(distinct)


def _bytes_of(entry: LayoutEntry, arena: torch.Tensor) -> torch.Tensor:
    """The box of ``entry`` in ``arena``: slots are dense, so it is one contiguous run."""
    dtype: torch.dtype = getattr(torch, entry.tensor.dtype)
    size = entry.box.volume * dtype.itemsize
    return arena.narrow(0, entry.offset, size).view(dtype).view(entry.box.extent).cpu()


def _settle(temporary: Path, file: Path) -> None:
    """Make ``temporary`` durable and give it its name."""
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(file)


def _parts(path: Path) -> Iterator[tuple[Path, _Part]]:
    indices = sorted(path.glob(f"part-*{INDEX_SUFFIX}"))
    if not indices:
        raise CheckpointError(f"{path} holds no finished part of a checkpoint")
    ranks, worlds = set(), set()
    for index in indices:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index} exceeds {MAX_INDEX_BYTES} bytes")
        try:
            part = msgspec.json.decode(index.read_bytes(), type=_Part)
        except msgspec.MsgspecError as error:
            raise CheckpointError(f"{index} is no index of a part: {error}") from error
        ranks.add(part.rank)
        worlds.add(part.world)
        yield index.with_name(index.name.removesuffix(INDEX_SUFFIX) + ".safetensors"), part
    if len(worlds) != 1:
        raise CheckpointError(f"{path} holds parts of trainers of {sorted(worlds)} ranks")
    missing = set(range(worlds.pop())) - ranks
    if missing:
        raise CheckpointError(f"{path} lacks the parts of ranks {sorted(missing)}")


def _covering(name: str, boxes: Sequence[_Found]) -> list[_Found]:
    """The distinct boxes of a tensor, proved to be all of it, once."""
    tensors = {found.tensor for found in boxes}
    if len(tensors) != 1:
        raise CheckpointError(f"{name!r} is saved with several shapes or dtypes: {sorted(map(str, tensors))}")
    distinct = list({found.box: found for found in boxes}.values())
    tensor = distinct[0].tensor
    for number, found in enumerate(distinct):
        outside = any(o < 0 or e > s for o, e, s in zip(found.box.offset, found.box.end, tensor.shape, strict=True))
        if outside:
            raise CheckpointError(f"{name!r}: {found.box} reaches outside its shape {tensor.shape}")
        clash = next((other for other in distinct[:number] if other.box.overlaps(found.box)), None)
        if clash is not None:
            raise CheckpointError(
                f"{name!r}: {found.box} of {found.file.name} overlaps {clash.box} of {clash.file.name}"
            )
    lacking = Box.whole(tensor.shape).volume - sum(found.box.volume for found in distinct)
    if lacking:
        raise CheckpointError(f"{name!r} of shape {tensor.shape} lacks {lacking} elements")
    return distinct


def _assembled(tensors: dict[str, list[_Found]]) -> Iterator[tuple[str, torch.Tensor]]:
    with ExitStack() as stack:
        open_parts: dict[Path, Any] = {}
        for name, boxes in tensors.items():
            whole = torch.empty(boxes[0].tensor.shape, dtype=getattr(torch, boxes[0].tensor.dtype))
            for found in boxes:
                try:
                    if found.file not in open_parts:
                        open_parts[found.file] = stack.enter_context(safe_open(found.file, framework="pt"))
                    saved = open_parts[found.file].get_tensor(found.key)
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{found.file} does not give {name!r}: {error}") from error
                if tuple(saved.shape) != found.box.extent or saved.dtype != whole.dtype:
                    raise CheckpointError(f"{found.file}: {name!r} is {saved.dtype} {tuple(saved.shape)}")
                whole[found.box.slices] = saved
            yield name, whole
