"""The trainer's tensors as the slots read them: looked up once per publish, each compared with what it was at first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from weightsync.agents.trainer.errors import ChangedTensor, MissingTensor, TrainerError
from weightsync.agents.trainer.slots.boxes import LocalShare
from weightsync.agents.trainer.slots.fitness import hint, refuse_unfit
from weightsync.agents.trainer.slots.merged import MergedState, like_merged

State = Mapping[str, torch.Tensor]
"""The trainer's tensors by its own names: plain ones, or DTensors."""

Look = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], torch.device]
"""Dtype, shape, strides and device: what a prepared conversion depends on. Only the address may change."""

UNSHARDED: Final = (
    "; FSDP2 leaves parameters whole after a forward without backward: give the model itself, or a callable that calls"
    " reshard() on its FSDP modules first"
)
"""What to do about a tensor that lost its mesh."""

PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
"""Classes whose values are in their own memory; of another one more is asked."""


@dataclass(frozen=True, slots=True)
class Read:
    """One tensor that slots read. ``dst``: a logical tensor that it becomes, for errors."""

    key: str
    dst: str
    share: LocalShare


@dataclass(frozen=True, slots=True)
class Taken:
    """This rank's local tensors of one moment, in the order of the readings that gave them.

    ``locals``: as the state has them, bases where weights have adapters. ``merged``: the names of those, by number, in
    ``state``.
    """

    locals: Sequence[torch.Tensor]
    merged: Mapping[int, str]
    state: MergedState | None = None

    def gather(self) -> None:
        """Have on this rank what is merged into weights. Collective where that is sharded; before ``of``."""
        if self.merged and self.state is not None:
            self.state.gather()

    def of(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """What is converted: local tensors, merged weights made now."""
        if not self.merged or self.state is None:
            return [self.locals[number] for number in numbers]
        merged, made = self.merged, self.state.local
        return [made(merged[number]) if number in merged else self.locals[number] for number in numbers]

    def like(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """Tensors that look like those of ``of``; of merged weights the values are not made."""
        return [like_merged(self.locals[n]) if n in self.merged else self.locals[n] for n in numbers]

    def merged_bytes(self, number: int) -> int:
        """Of the weight that ``of`` makes; 0 where it makes none."""
        return 4 * self.locals[number].numel() if number in self.merged else 0


class Picks:
    """Parts of taken tensors, each tensor fetched once however many parts of it there are.

    Args:
        picks: the number of a tensor, and an index into it or None for all of it.
    """

    def __init__(self, picks: Sequence[tuple[int, tuple[slice, ...] | None]]) -> None:
        self._numbers = tuple(dict.fromkeys(number for number, _ in picks))
        place = {number: place for place, number in enumerate(self._numbers)}
        self._places = None if len(picks) == len(self._numbers) else [place[number] for number, _ in picks]
        # Most tensors are taken whole; indexing them would cost as much as all the rest of their Python.
        self._cuts = [(position, index) for position, (_, index) in enumerate(picks) if index is not None]

    def of(self, taken: Taken) -> list[torch.Tensor]:
        """The parts, in the order of ``picks``."""
        return self._parts(taken.of(self._numbers))

    def like(self, taken: Taken) -> list[torch.Tensor]:
        """Tensors that look like those of ``of``."""
        return self._parts(taken.like(self._numbers))

    def _parts(self, fetched: list[torch.Tensor]) -> list[torch.Tensor]:
        parts = fetched if self._places is None else [fetched[place] for place in self._places]
        for position, index in self._cuts:
            parts[position] = parts[position][index]
        return parts


class Readings:
    """What is read at every publish, each tensor once however many slots it feeds.

    Args:
        state: the trainer's tensors now, found fit; the later ones must look like them.
        reads: in the order of the slots; one of each key is kept.

    Attributes:
        numbers: the place of each key in ``Taken.locals``.
        meshes: of each place.
    """

    @torch.no_grad()
    def __init__(self, state: State, reads: Iterable[Read]) -> None:
        kept: dict[str, Read] = {}
        for read in reads:
            kept.setdefault(read.key, read)
        self._reads = tuple(kept.values())
        self.numbers = {read.key: number for number, read in enumerate(self._reads)}
        self.meshes = [_mesh(state[read.key]) for read in self._reads]
        self._expected = [_expected(read.key, state[read.key], read.share) for read in self._reads]

    @torch.no_grad()
    def first(self, state: State) -> Taken:
        """The local tensors of the state that the readings were made of, which may be on meta."""
        return self._taken([_local(state[read.key]) for read in self._reads], state)

    # The one loop of a publish that is Python for each tensor: some 20,000 of them are to cost milliseconds.
    @torch.no_grad()
    def take(self, state: State) -> Taken:
        """The local tensors of ``state``, without touching a value or another rank.

        Raises:
            MissingTensor: the state lacks one.
            UnfitTensor: one can be no weight as it is now.
            ChangedTensor: one's dtype, shape, strides, device or sharding is not what its slot was made for.
        """
        taken: list[torch.Tensor] = []
        append, get = taken.append, state.get
        for key, shape, mesh, placements, look in self._expected:
            tensor = get(key)
            if tensor is None:
                raise self._refusal(key, state)
            local = tensor
            if isinstance(tensor, DTensor):
                # Nearly always these are the same objects as at first; to compare them takes longer than all the rest.
                spec = tensor._spec
                same = spec.mesh is mesh and spec.placements is placements
                if spec.shape != shape or not (same or (spec.mesh == mesh and spec.placements == placements)):
                    raise self._refusal(key, state)
                local = tensor._local_tensor  # what to_local() gives where no gradient is wanted
            elif placements is not None:
                raise self._refusal(key, state)
            if type(local) not in PLAIN:
                self._refuse_unfit(key, tensor)
            # A rank without a share may have a local tensor of any empty shape.
            if look is not None:
                if local.layout is not torch.strided or local.is_meta:
                    raise self._refusal(key, state)
                if (local.dtype, local.shape, local.stride(), local.device) != look:
                    raise self._refusal(key, state)
                # Frameworks that shard or offload shrink what a tensor still describes to nothing.
                if not local.untyped_storage().nbytes():
                    self._refuse_unfit(key, tensor)
            append(local)
        return self._taken(taken, state)

    def _taken(self, locals_: list[torch.Tensor], state: State) -> Taken:
        if not isinstance(state, MergedState):
            return Taken(locals_, {})
        return Taken(locals_, {n: read.key for n, read in enumerate(self._reads) if state.is_merged(read.key)}, state)

    def _refuse_unfit(self, key: str, tensor: object) -> None:
        # A dtype that its slot was made for was found fit then: integers that engines are sent unchanged.
        refuse_unfit(key, tensor, as_they_are=(self._reads[self.numbers[key]].share.dtype,))

    def _refusal(self, key: str, state: State) -> TrainerError:
        """What is wrong with a tensor of ``state`` beside what its slot was made for."""
        number = self.numbers[key]
        read, (_, _, _, placements, look) = self._reads[number], self._expected[number]
        tensor = state.get(key)
        if tensor is None:
            return MissingTensor(key, read.dst, hint(key, state))
        self._refuse_unfit(key, tensor)
        shape = tuple(tensor.shape)
        if shape != read.share.shape or isinstance(tensor, DTensor) != (read.share.grid is not None):
            whole = read.share.grid is not None and not isinstance(tensor, DTensor)
            return ChangedTensor(
                f"{key!r} is {type(tensor).__name__} {shape} now; its slot was made for {read.share.shape}"
                f" over {read.share.grid or 'no mesh'}{UNSHARDED if whole else ''}"
            )
        if isinstance(tensor, DTensor) and (
            tensor.placements != placements or tensor.device_mesh != self.meshes[number]
        ):
            return ChangedTensor(
                f"{key!r} is placed as {tensor.placements} over {tensor.device_mesh} now; its slot was made for"
                f" {placements} over {self.meshes[number]}. Make the agent anew after sharding anew"
            )
        return ChangedTensor(
            f"a source of {read.dst!r} has dtype, shape, strides and device {_look(_local(tensor))} now ({key!r}); its"
            f" slot was made for {look}. Make the agent anew after such a change"
        )


_Expected = tuple[str, tuple[int, ...], DeviceMesh | None, tuple[Placement, ...] | None, Look | None]


def _expected(key: str, tensor: torch.Tensor, share: LocalShare) -> _Expected:
    local = _local(tensor)
    placements = tuple(tensor.placements) if isinstance(tensor, DTensor) else None
    return key, share.shape, _mesh(tensor), placements, _look(local) if local.numel() or placements is None else None


def _mesh(tensor: torch.Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _look(tensor: torch.Tensor) -> Look:
    return (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.device)
