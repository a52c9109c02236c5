"""StreamAgent: publishes versions that pass as a stream, from one trainer rank."""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from weightsync.agents.link.thread import AgentThread, ControlAddress, Identity
from weightsync.agents.trainer.agent import CONNECT_SECONDS, OnNonFinite, TrainerAgent
from weightsync.agents.trainer.publication import Publication, PublishError
from weightsync.agents.trainer.replicas import ALONE, agree_on
from weightsync.agents.trainer.slots.conversion import ConversionTable
from weightsync.agents.trainer.stream import Pairs, StreamSlots, treatments_of
from weightsync.agents.trainer.streamed import StreamedTensor
from weightsync.agents.trainer.thread_side import TrainerSide, source_of
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.names import Member, Version


class StreamAgent(TrainerAgent):
    """As TrainerAgent, for a trainer that hands over (name, tensor) pairs and no model.

    It meets the daemon in its first ``publish_stream``: what there is to announce is known only then.

    Args:
        hub_url, token_file, run_id, run_dir, rank, process_group, nonfinite, publish_seconds,
            connect_seconds: see TrainerAgent.
        world: ranks that have an agent. With 1 it enters no collective, whatever job its rank is a part of.
        table: of the model, for engines that serve FP8 blocks; None: nothing is quantised.
        forward_dtype: what tensors without an entry in the table are rounded to; None: each travels in the dtype that
            it has.

    Raises:
        StreamError: a table for other tensors than the checkpoint's.
    """

    def __init__(
        self,
        *,
        hub_url: str,
        token_file: Path,
        run_id: str,
        run_dir: Path,
        rank: int = 0,
        world: int = 1,
        process_group: dist.ProcessGroup | None = None,
        table: ConversionTable | None = None,
        forward_dtype: torch.dtype | None = None,
        nonfinite: OnNonFinite = "refuse",
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        # Not TrainerAgent's, which makes slots of a model and joins the fleet with them.
        self._rank, self._world, self._run_id, self._run_dir = rank, world, run_id, run_dir
        self._group = process_group if world > 1 else ALONE
        self._publish_seconds, self._connect_seconds = publish_seconds, connect_seconds
        self._nonfinite = nonfinite
        self._address = ControlAddress(hub_url, token_file)
        self._treatments = treatments_of(table) if table is not None else {}
        self._forward_dtype = forward_dtype
        self._generation = agree_on(secrets.randbits(62), self._group)
        self._last = None
        self._steps = set()
        self._agent = None
        self._stream = self._slots_for(None)

    def publish_stream(self, step: int, tensors: Pairs, *, metadata: Sequence[StreamedTensor] | None = None) -> int:
        """Convert tensors into the slots as they pass, have them written, and return when the engines serve them.

        All ranks of the agent's world call it; an agent that is alone calls it while the other ranks of its job drain
        the same generator. The generator is always read to its end, also when the version is refused, because other
        ranks may stand in its collectives.

        Args:
            step: the version's.
            tensors: (name in the checkpoint, tensor) pairs, in any order; every one of the model in each call. A tensor
                need not outlive its turn.
            metadata: what passes, the same on every rank. Needed where ranks yield pieces; elsewhere it lets the slots
                have exactly their size. Heeded until a first call has succeeded in filling them.

        Returns:
            The commit sequence number.

        Raises:
            PublishError, BusyError: as ``publish``; a tensor that cannot travel, or a name that is lacking or new, is
                named in it, before anything was written.
        """
        return self._until_it_serves(lambda: self._publish_pass(step, tensors, metadata))

    def publish_async(self, step: int) -> NoReturn:
        """Never, nor ``publish``.

        Raises:
            PublishError: always.
        """
        raise PublishError(f"step {step}: this agent has no model to publish; call publish_stream(step, tensors)")

    def _publish_pass(self, step: int, tensors: Pairs, metadata: Sequence[StreamedTensor] | None) -> Publication:
        version = Version(self._generation, step)
        try:
            with self._together(version):
                self._claim_stream(step, metadata)
        except PublishError:
            for _ in tensors:  # other ranks may stand in its collectives
                pass
            raise
        # Agreed before anybody joins: a daemon is not to see ranks whose version has been refused at another one.
        with self._together(version):
            convert_seconds = self._fill(version, tensors)
        with self._together(version):
            digest_seconds = self._joined().side.prepare(version)
        return self._staged(version, convert_seconds, digest_seconds)

    def _slots_for(self, metadata: Sequence[StreamedTensor] | None) -> StreamSlots:
        return StreamSlots(metadata, rank=self._rank, treatments=self._treatments, forward_dtype=self._forward_dtype)

    def _claim_stream(self, step: int, metadata: Sequence[StreamedTensor] | None) -> None:
        if step in self._steps:
            raise PublishError(f"this trainer has published step {step} before; a step names one version for good")
        if not self._stream.complete:
            self._stream = self._slots_for(metadata)  # anew after a first pass that failed
        self._claim_memory()

    def _fill(self, version: Version, tensors: Pairs) -> float:
        """Convert the tensors as they pass; the seconds that it took, those of the stream itself included."""
        began = time.monotonic()
        self._stream.fill(tensors)
        if any(arena.is_cuda for arena in self._stream.arenas):
            torch.cuda.synchronize()
        self._judge_numbers(version, self._stream.nonfinite)
        return time.monotonic() - began

    def _joined(self) -> AgentThread[TrainerSide]:
        """The agent, with its Welcome; made with the layout of the first pass."""
        if self._agent is not None:
            return self._agent
        arenas, staging = self._stream.arenas, self._stream.layout.staging
        warm_up(arenas[0].device)  # here, and not on the agent's thread while a daemon waits for its word
        identity = Identity(self._run_id, Member("trainer", "", self._rank), self._world, self._generation)
        memory = source_of(self._stream, identity.member, identity.world)
        size = sum(arena.numel() for number, arena in enumerate(arenas) if number != staging)
        agent = AgentThread(identity, self._address, lambda thread: TrainerSide(thread, memory, size))
        agent.start()
        try:
            agent.wait_welcome(self._connect_seconds)
        except BaseException:
            agent.close("no Welcome")
            raise
        self._agent = agent
        return agent
