"""vLLM's own trainer API (``vllm.distributed.weight_transfer``, 0.28 and later): the trainer's side of "weightsync".

Importing this module registers the engine with ``WeightTransferTrainerFactory``; vLLM's plugins do not, because they
run in servers. ``WeightSource`` changed its shape in 0.33, and both are spoken:

* 0.28 – 0.32: ``metadata()`` and ``__iter__``, whole tensors on every rank. Rank 0 sends; where a source says which
  names a rank holds (``held_names``), each rank sends its own.
* 0.33: the property ``metadata`` with owners and placements. Pieces (``iter_local``) go from the rank that has them,
  without a gather; a source without them has whole tensors (``iter_full``), which each tensor's first owner sends.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from weightsync.agents.trainer.adapters.connection import PUBLISH_SECONDS, Connection
from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.publisher import RANKS_SECONDS
from weightsync.agents.trainer.replicas import ALONE, Group, TrainerRanks
from weightsync.agents.trainer.streams.stream import drain
from weightsync.agents.trainer.streams.stream_agent import StreamAgent
from weightsync.agents.trainer.streams.streamed import StreamedTensor, StreamError

BACKEND: Final = "weightsync"

PLACEMENTS: Final = ("Shard", "Replicate")
"""Names of the classes, vLLM's and torch's, by which a piece is known."""


@dataclass
class WeightsyncTrainerInitInfo(TrainerInitInfo):  # type: ignore[misc]
    """What ``WeightTransferTrainerFactory.trainer_init`` is called with, on every trainer rank (``rank`` by keyword).

    Args:
        hub_url, token_file, run_id, run_dir, forward_dtype, model_config, publish_seconds: see ``Connection``.
        world: trainer ranks; None: those of ``process_group``, or one without torch.distributed.
        process_group: connects the trainer ranks in the order of ``rank``; None: the default group.
        first_step: number of the first version, where ``send_weights`` is given none.
    """

    backend: ClassVar[str] = BACKEND
    hub_url: str
    token_file: str | os.PathLike[str]
    run_id: str
    run_dir: str | os.PathLike[str]
    forward_dtype: str | torch.dtype | None = None
    model_config: str | os.PathLike[str] | Mapping[str, object] | None = None
    publish_seconds: float = PUBLISH_SECONDS
    world: int | None = None
    process_group: dist.ProcessGroup | None = None
    first_step: int = 1


@dataclass(frozen=True, slots=True)
class _Pass:
    """How one source is streamed.

    ``metadata``: what this rank's agent declares. ``elsewhere``: names that pass here and are sent by another rank.
    ``every_rank``: whether every rank has an agent, or rank 0 alone. ``pieces``: whether ``iter_local`` is read.
    """

    metadata: Sequence[StreamedTensor]
    elsewhere: frozenset[str]
    every_rank: bool
    pieces: bool = False


class WeightsyncTrainerEngine(TrainerWeightTransferEngine):  # type: ignore[misc]
    """Publishes a ``WeightSource``. The client is not used: the daemon drives the engines.

    Attributes:
        step: of the last version that was sent; ``first_step - 1`` before.
    """

    init_info_cls = WeightsyncTrainerInitInfo

    def __init__(self, info: WeightsyncTrainerInitInfo, *, client: Any, source: Any) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self.rank = info.rank  # vLLM before 0.33 does not keep it
        self.step = info.first_step - 1
        self._ranks = TrainerRanks(_group(info))
        self._connection = Connection(
            info.hub_url, info.token_file, info.run_id, info.run_dir, info.forward_dtype, info.model_config,
            info.publish_seconds,
        )  # fmt: skip
        self._pass = _planned(source, info.rank, quantised=info.model_config is not None)
        self._agent: StreamAgent | None = None
        if self._pass.every_rank and _world(info) > 1:
            if self._ranks.world == 1:
                raise ValueError(
                    "ranks that send pieces of one version agree on it: initialise torch.distributed first"
                )
            self._agent = self._connection.agent(info.process_group)
        elif info.rank == 0:
            self._agent = self._connection.agent()

    @classmethod
    def trainer_init(
        cls, init_info: WeightsyncTrainerInitInfo, *, client: Any = None, source: Any | None = None
    ) -> Self:
        """On every trainer rank. Meets nobody yet: the daemon is met in the first ``send_weights``.

        Raises:
            ValueError: no source, or contradictory ranks.
        """
        if source is None:
            raise ValueError("weightsync publishes whole versions: trainer_init needs source=WeightSource")
        return cls(init_info, client=client, source=source)

    def send_weights(self, step: int | None = None) -> None:
        """Publish the source's weights as version ``step`` (None: the one after the last), on every trainer rank.

        Returns on all ranks when the whole fleet serves the version, or raises on all.

        Raises:
            PublishError: it is not served.
        """
        self.step = self.step + 1 if step is None else step
        try:
            with self._ranks.section():
                self._send(self.step)
                # Ranks that only gather wait here for the one that publishes, and hear of its failure.
                self._ranks.agree(seconds=self._connection.publish_seconds + RANKS_SECONDS)
        except ReplicaFailed as error:
            raise PublishError(str(error)) from error

    def shutdown(self) -> None:
        """Leave the fleet; engines keep the last version."""
        self._ranks.close()
        if self._agent is not None:
            self._agent.close()

    def _send(self, step: int) -> None:
        pairs = _passing(self.source, pieces=self._pass.pieces)
        if self._agent is None:
            drain(pairs)  # the gathering is collective
            return
        own = (pair for pair in pairs if pair[0] not in self._pass.elsewhere)
        self._agent.publish_stream(step, own, metadata=self._pass.metadata)


def _world(info: WeightsyncTrainerInitInfo) -> int:
    if info.world is not None:
        world = info.world
    else:
        world = dist.get_world_size(info.process_group) if dist.is_initialized() else 1
    if not 0 <= info.rank < world:
        raise ValueError(f"rank {info.rank} is outside of the {world} trainer ranks; world= says how many there are")
    return world


def _group(info: WeightsyncTrainerInitInfo) -> Group:
    """Who fails together, in the order of ``rank``.

    Raises:
        ValueError: the process group says otherwise than ``rank`` and ``world``.
    """
    if _world(info) == 1 or not dist.is_initialized():
        return ALONE
    place, size = dist.get_rank(info.process_group), dist.get_world_size(info.process_group)
    if (place, size) != (info.rank, _world(info)):
        raise ValueError(f"rank {info.rank} of {_world(info)} is rank {place} of the {size} of its process group")
    return info.process_group


def _planned(source: Any, rank: int, *, quantised: bool) -> _Pass:
    """How ``source`` is streamed; the same kind of pass on every rank."""
    metadata = source.metadata
    if callable(metadata):  # 0.28 – 0.32
        return _planned_by_names(source, [StreamedTensor(m.name, m.dtype, tuple(m.shape)) for m in metadata()])
    # Whole tensors where they are to be quantised: a piece may end inside a block.
    if source.implements_iter_local() and not (quantised and source.implements_iter_full()):
        _refuse_unspoken(source)
        return _Pass([_piece(meta) for meta in metadata], frozenset(), every_rank=True, pieces=True)
    senders = {meta.name: 0 if meta.owners is None else meta.owners[0] for meta in metadata}
    declared = [StreamedTensor(m.name, m.dtype, tuple(m.shape), owners=(senders[m.name],)) for m in metadata]
    elsewhere = frozenset(name for name, sender in senders.items() if sender != rank)
    return _Pass(declared, elsewhere, every_rank=any(senders.values()))


def _planned_by_names(source: Any, declared: Sequence[StreamedTensor]) -> _Pass:
    """Before 0.33: rank 0 has everything, unless the source's class says which names a rank holds."""
    says = getattr(type(source), "held_names", None)
    if says is None or says is getattr(WeightSource, "held_names", None):
        return _Pass(declared, frozenset(), every_rank=False)
    names = source.held_names()
    held = [tensor for tensor in declared if names is None or tensor.name in names]
    return _Pass(held, frozenset(), every_rank=True)


def _refuse_unspoken(source: Any) -> None:
    """That ParamMeta's two words say how the parameters of a module lie, since vLLM's own source has no other.

    Raises:
        StreamError: one is strided (FSDP2 over tensor parallelism) or a sum that is pending.
    """
    module = getattr(source, "_module", None)
    if type(source).__name__ != "ModuleSource" or not isinstance(module, torch.nn.Module):
        return
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            _refuse_others(name, parameter.placements)


def _refuse_others(name: str, placements: Iterable[object] | None) -> None:
    for placement in placements or ():
        if type(placement).__name__ not in PLACEMENTS:
            raise StreamError(
                f"{name!r} is placed by {placement!r}, and pieces are known by {' and '.join(PLACEMENTS)} alone; give a"
                " source that yields whole tensors (iter_full), or a TrainerAgent the model"
            )


def _piece(meta: Any) -> StreamedTensor:
    """vLLM's ParamMeta of 0.33."""
    _refuse_others(meta.name, meta.placements)
    placements = None if meta.placements is None else tuple(getattr(each, "dim", None) for each in meta.placements)
    return StreamedTensor(meta.name, meta.dtype, tuple(meta.shape), meta.owners, meta.mesh_shape, placements)


def _passing(source: Any, *, pieces: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """One pass over ``source``. Before 0.33 a name that this rank does not hold comes with None."""
    whole = source.__iter__ if callable(source.metadata) else source.iter_full
    pairs = source.iter_local() if pieces else whole()
    return ((name, tensor) for name, tensor in pairs if tensor is not None)


WeightTransferTrainerFactory.register_engine(BACKEND, WeightsyncTrainerEngine)
