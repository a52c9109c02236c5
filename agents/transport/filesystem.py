"""The transport through files: each trainer rank saves a part of a checkpoint, each inference rank reads them all.

A part holds the boxes of the rank's slots as they are on the wire: one safetensors file, and one small JSON file that
says which box of which logical tensor each entry is. The JSON is written last, so a part without it was never
finished.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from weightsync.agents.errors import AgentError
from weightsync.agents.tables.box import Box
from weightsync.agents.transport.filling import Filled, whole
from weightsync.agents.transport.interface import Ended, HandedOver, Receiver, Sender, SourceMemory, TargetMemory
from weightsync.agents.transport.shares import Share
from weightsync.orchestrator.protocol.fields import Count, World
from weightsync.orchestrator.protocol.layout import ROW_BOX, ROW_OFFSET, ROW_REGION, ROW_TENSOR, Layout, Matrix, Tensor
from weightsync.orchestrator.protocol.limits import MAX_RANK
from weightsync.orchestrator.protocol.markers import BROADCASTS, step_name
from weightsync.orchestrator.protocol.messages import FilesystemSettings
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

INDEX_SUFFIX: Final = ".boxes.json"
MAX_INDEX_BYTES: Final = 256 * 1024 * 1024
"""Of one part's JSON file. A rank that holds all of Kimi-K2 alone has 140 k boxes of about 150 bytes."""


class CheckpointError(AgentError):
    """Parts of a saved checkpoint that do not make up whole tensors.

    Worth a retry: a shared file system may show another machine's files late.
    """

    fault = "trainer"
    retry = True


class FilesystemSender(Sender):
    """See ``transport.interface``. The bytes leave with ``stage``; a write hands over what lies in the files."""

    def __init__(self, memory: SourceMemory) -> None:
        self._memory = memory
        self._directory = Path()
        self._sizes: dict[Member, int] = {}

    def open(self, settings: FilesystemSettings) -> None:
        self._directory = Path(settings.directory)

    async def connect(self, shares: Sequence[Share]) -> Mapping[Member, Exception]:
        self._sizes = {share.peer.member: share.bytes for share in shares}
        return {}

    def stage(self, version: Version) -> None:
        save_checkpoint_part(parts_of(self._directory, version), self._memory)

    async def write(
        self,
        round_name: RoundName,
        members: Sequence[Member],
        deadline_seconds: float,
        ended: Ended,
        filled: Filled = whole,
    ) -> None:
        for member in members:
            if member in self._sizes:
                ended(HandedOver(member, self._sizes[member], link="files"))


class FilesystemReceiver(Receiver):
    """See ``transport.interface``."""

    def __init__(self, memory: TargetMemory) -> None:
        self._memory = memory
        self._directory = Path()

    def open(self, settings: FilesystemSettings) -> None:
        self._directory = Path(settings.directory)

    def renew(self, memory: TargetMemory) -> None:
        self._memory = memory

    def arrive(self, version: Version) -> None:
        self._memory.load(load_checkpoint_parts(parts_of(self._directory, version)))


def parts_of(directory: Path, version: Version) -> Path:
    """Where the parts of ``version`` lie below the run directory."""
    return directory / BROADCASTS / step_name(version.step)


class _SavedBox(msgspec.Struct, frozen=True):
    key: str
    tensor: Tensor
    offset: tuple[int, ...]
    extent: tuple[int, ...]


class _SavedPart(msgspec.Struct, frozen=True):
    rank: Count
    world: World
    boxes: tuple[_SavedBox, ...]


@dataclass(frozen=True, slots=True)
class _ReadableBox:
    """A saved box and the file that it is in."""

    file: Path
    key: str
    tensor: Tensor
    box: Box


def save_checkpoint_part(path: Path, memory: SourceMemory) -> Path:
    """Write this rank's part into the directory ``path``, through temporary files and renames.

    Boxes that several ranks hold are saved by the first replica only. The first rank removes what a trainer of another
    number of ranks has left there: a resumed one may come to the same step again.

    Returns:
        The safetensors file.

    Raises:
        OSError: the directory cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    rank, world = memory.member.rank, memory.world
    stem = f"part-{rank:05d}-of-{world:05d}"
    file, index = path / f"{stem}.safetensors", path / f"{stem}{INDEX_SUFFIX}"
    index.unlink(missing_ok=True)  # from here on the part is not finished
    if rank == 0:
        for other in sorted(path.glob("part-*-of-*")):  # an index before what it is of
            if f"-of-{world:05d}." not in other.name:
                other.unlink(missing_ok=True)
    rows = memory.layout.matrix()[np.fromiter(memory.first_replica, dtype=bool, count=len(memory.first_replica))]
    boxes = tuple(_saved_box(number, row, memory.layout) for number, row in enumerate(rows))
    temporary = path / f".{stem}.tmp"
    save_file({box.key: _bytes_of(box, row, memory) for box, row in zip(boxes, rows, strict=True)}, temporary)
    _settle(temporary, file)
    temporary.write_bytes(msgspec.json.encode(_SavedPart(rank, world, boxes)))
    _settle(temporary, index)
    return file


def load_checkpoint_parts(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All logical tensors of the parts in ``path``, whole, in the order of their names, one in memory at a time.

    All parts are examined before the first tensor is read. A box that several parts hold alike counts once.

    Raises:
        CheckpointError: a part is missing or unreadable, or the boxes of a tensor leave a gap or overlap; by name.
    """
    found: dict[str, list[_ReadableBox]] = {}
    for file, part in _parts(path):
        for saved in part.boxes:
            box = Box(saved.offset, saved.extent)
            found.setdefault(saved.tensor.name, []).append(_ReadableBox(file, saved.key, saved.tensor, box))
    distinct = {name: _covering(name, boxes) for name, boxes in sorted(found.items())}
    return _assembled(distinct)


def _saved_box(number: int, row: Matrix, layout: Layout) -> _SavedBox:
    tensor = layout.tensors[int(row[ROW_TENSOR])]
    padding = MAX_RANK - len(tensor.shape)  # rows have MAX_RANK dimensions, padded on the left
    offset, extent = row[ROW_BOX::3][padding:], row[ROW_BOX + 1 :: 3][padding:]
    return _SavedBox(f"{number:06d} {tensor.name}", tensor, tuple(offset.tolist()), tuple(extent.tolist()))


def _bytes_of(saved: _SavedBox, row: Matrix, memory: SourceMemory) -> torch.Tensor:
    """The box as it lies in its arena: slots are dense, so it is one contiguous run."""
    dtype: torch.dtype = getattr(torch, saved.tensor.dtype)
    size = math.prod(saved.extent) * dtype.itemsize
    run = memory.arenas[int(row[ROW_REGION])].narrow(0, int(row[ROW_OFFSET]), size)
    return run.view(dtype).view(saved.extent).cpu()


def _settle(temporary: Path, file: Path) -> None:
    """Make ``temporary`` durable and give it its name."""
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(file)


def _parts(path: Path) -> Iterator[tuple[Path, _SavedPart]]:
    indices = sorted(path.glob(f"part-*{INDEX_SUFFIX}"))
    if not indices:
        raise CheckpointError(f"{path} holds no finished part of a checkpoint")
    ranks, worlds = set(), set()
    for index in indices:
        _require_plain(index)
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index} exceeds {MAX_INDEX_BYTES} bytes")
        try:
            part = msgspec.json.decode(index.read_bytes(), type=_SavedPart)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointError(f"{index} is no index of a part: {error}") from error
        ranks.add(part.rank)
        worlds.add(part.world)
        yield index.with_name(index.name.removesuffix(INDEX_SUFFIX) + ".safetensors"), part
    if len(worlds) != 1:
        raise CheckpointError(f"{path} holds parts of trainers of {sorted(worlds)} ranks")
    missing = set(range(worlds.pop())) - ranks
    if missing:
        raise CheckpointError(f"{path} lacks the parts of ranks {sorted(missing)}")


def _require_plain(file: Path) -> None:
    """A pipe in its place would keep the worker for ever: whoever may write the run directory could put one there."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise CheckpointError(f"{file} is no plain file")


def _covering(name: str, boxes: Sequence[_ReadableBox]) -> list[_ReadableBox]:
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


def _assembled(tensors: dict[str, list[_ReadableBox]]) -> Iterator[tuple[str, torch.Tensor]]:
    with ExitStack() as stack:
        open_parts: dict[Path, Any] = {}
        for name, boxes in tensors.items():
            whole = torch.empty(boxes[0].tensor.shape, dtype=getattr(torch, boxes[0].tensor.dtype))
            for found in boxes:
                try:
                    if found.file not in open_parts:
                        _require_plain(found.file)
                        open_parts[found.file] = stack.enter_context(safe_open(found.file, framework="pt"))
                    saved = open_parts[found.file].get_tensor(found.key)
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{found.file} does not give {name!r}: {error}") from error
                if tuple(saved.shape) != found.box.extent or saved.dtype != whole.dtype:
                    raise CheckpointError(f"{found.file}: {name!r} is {saved.dtype} {tuple(saved.shape)}")
                whole[found.box.slices] = saved
            yield name, whole
