"""TrainerAgent: publishes versions from one trainer rank.

Everything collective runs on the caller's thread inside ``publish``, on all ranks in one order; the agent's own thread
only writes what it is granted. Slots are separate memory, so training goes on while they are being sent.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from weightsync.agents.link.thread import AgentThread, ControlAddress, Identity
from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.markers import write_stable
from weightsync.agents.trainer.models.table import ModelTable
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.replicas import ALONE, Group, agree_on, gather_texts, leave_together
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.state import current_state
from weightsync.agents.trainer.stream import Pairs, StreamSlots, treatments_of
from weightsync.agents.trainer.streamed import StreamedTensor
from weightsync.agents.trainer.thread_side import TrainerSide, source_of
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.names import Member, Version

__all__ = ["BusyError", "Publication", "PublishError", "TrainerAgent"]

log = logging.getLogger(__name__)

BUSY: Final = "busy: "
"""How a rank tells the others that waiting helps."""

CONNECT_SECONDS: Final = 60.0
"""For the daemon's first Welcome; the daemon may start after the trainer."""


class TrainerAgent:
    """One per trainer rank, made on all ranks together (slots of sharded tensors agree on sizes collectively).

    Args:
        source: the model, or a callable that returns the current state dict (plain tensors or DTensors) by the
            trainer's own names; asked at every publish. None: an agent for ``publish_stream``.
        table: how these become checkpoint tensors. A stream needs none where tensors travel as they are or are cast;
            with one, its tensors are quantised as the table says.
        hub_url: ``ws://host:port/agents`` of the daemon.
        token_file: file with the bearer token.
        run_id, run_dir: the run; ``STABLE`` is written below ``run_dir``.
        rank, world: of the trainer fleet; alone without torch.distributed: 0 and 1.
        process_group: for the collectives of publish; None for the default group.
        options: which slots are sharded, gathered or by expert; see SlotOptions.
        publish_seconds: total deadline of ``publish``.
        forward_dtype: of a stream: what its tensors are rounded to; None: each travels in the dtype that it has.

    An agent for streams meets the daemon in its first ``publish_stream``, because what it has is known only then.

    Raises:
        RefusedForGood: the daemon does not want this rank (another run, a wrong world size).
        TimeoutError: no daemon within CONNECT_SECONDS.
        Errors of the table and the slots, each with the tensor's name.
    """

    def __init__(
        self,
        source: nn.Module | Callable[[], Mapping[str, torch.Tensor]] | None,
        table: ModelTable | None,
        *,
        hub_url: str,
        token_file: Path,
        run_id: str,
        run_dir: Path,
        rank: int = 0,
        world: int = 1,
        process_group: dist.ProcessGroup | None = None,
        options: SlotOptions | None = None,
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
        forward_dtype: torch.dtype | None = None,
    ) -> None:
        self._source = source
        self._rank, self._world, self._run_id, self._run_dir = rank, world, run_id, run_dir
        self._group: Group = process_group if world > 1 else ALONE
        self._publish_seconds, self._connect_seconds = publish_seconds, connect_seconds
        self._address = ControlAddress(hub_url, token_file)
        self._generation = agree_on(secrets.randbits(62), self._group)
        self._last: Publication | None = None
        self._steps: set[int] = set()
        self._agent: AgentThread[TrainerSide] | None = None
        self.slots: TrainerSlots | StreamSlots
        if source is None:
            self._treatments = treatments_of(table) if table is not None else {}
            self._forward_dtype = forward_dtype
            self.slots = self._stream_slots(None)
            return
        if table is None:
            raise TypeError("TrainerAgent of a model needs a table: model_table(config)")
        self.slots = TrainerSlots(self._state(), table, options=options, rank=rank, world=world)
        senders = [n for n, says in enumerate(gather_texts(str(self.slots.primary), self._group)) if says == "True"]
        if self.slots.primary:
            self._agent = self._joined(Member("trainer", "", senders.index(rank)), len(senders))

    def _joined(self, member: Member, world: int) -> AgentThread[TrainerSide]:
        """The agent of ``member``, with its Welcome."""
        warm_up(self.slots.arenas[0].device)  # here, and not on the agent's thread while a daemon waits for its word
        memory, staging = source_of(self.slots, member, world), self.slots.layout.staging
        size = sum(arena.numel() for number, arena in enumerate(self.slots.arenas) if number != staging)
        identity = Identity(self._run_id, member, world, self._generation)
        agent = AgentThread(identity, self._address, lambda thread: TrainerSide(thread, memory, size))
        agent.start()
        try:
            agent.wait_welcome(self._connect_seconds)
        except BaseException:
            agent.close("no Welcome")
            raise
        return agent

    def _state(self) -> Mapping[str, torch.Tensor]:
        return {} if self._source is None else current_state(self._source)

    @property
    def generation(self) -> int:
        """Of this start of the trainer; part of every version's identity."""
        return self._generation

    def publish(self, step: int) -> int:
        """Convert the current weights, have them written into the engines, and return when they serve.

        Returns:
            The commit sequence number.

        Raises:
            PublishError: the version is FAILED, or the deadline passed; on every rank.
            BusyError: an earlier ``publish_async`` has not ended.
        """
        return self._until_it_serves(lambda: self.publish_async(step))

    def publish_stream(self, step: int, tensors: Pairs, *, metadata: Sequence[StreamedTensor] | None = None) -> int:
        """Convert tensors into the slots as they pass, have them written, and return when the engines serve them.

        All ranks of the agent's world call it. An agent of world 1 meets nobody: in a larger job its rank calls this
        while the others drain the same generator. The generator is always read to its end, also when the version is
        refused, because the other ranks may stand in its collectives.

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

    def _until_it_serves(self, staged: Callable[[], Publication]) -> int:
        began = time.monotonic()
        try:
            with leave_together(self._group):
                publication = staged()
                sequence = publication.wait(max(0.1, self._publish_seconds - (time.monotonic() - began)))
        except ReplicaFailed as error:
            raise PublishError(str(error)) from error
        return agree_on(sequence, self._group)

    def publish_async(self, step: int) -> Publication:
        """As ``publish``, but returns once the slots hold the weights; training may go on at once."""
        version = Version(self._generation, step)
        # Agreed before the conversion's collectives, so that no rank waits in them for one that cannot come …
        with self._together(version):
            self._model_slots().check(self._state())
            self._claim_slots(step)
        # … and after, so that STABLE speaks for all.
        with self._together(version):
            convert_seconds, digest_seconds = self._stage(version)
        return self._staged(version, convert_seconds, digest_seconds)

    def _publish_pass(self, step: int, tensors: Pairs, metadata: Sequence[StreamedTensor] | None) -> Publication:
        version = Version(self._generation, step)
        try:
            with self._together(version):
                self._claim_stream(step, metadata)
        except PublishError:
            for _ in tensors:  # the other ranks may stand in its collectives
                pass
            raise
        # Agreed before anybody joins: a daemon is not to see ranks whose trainer has been refused at another one.
        with self._together(version):
            convert_seconds = self._fill(tensors)
        with self._together(version):
            digest_seconds = self._joined_once().side.prepare(version)
        return self._staged(version, convert_seconds, digest_seconds)

    def _staged(self, version: Version, convert_seconds: float, digest_seconds: float) -> Publication:
        """The slots of all ranks hold ``version``: say so."""
        self._steps.add(version.step)
        publication = Publication(version, self._report(version, convert_seconds, digest_seconds))
        if self._rank == 0:
            write_stable(self._run_dir, self._run_id, version)
        self._last = publication
        return publication

    def close(self) -> None:
        """Leave the fleet. Slots are freed only when no write of ours is in flight."""
        if self._agent is not None:
            self._agent.close("the trainer closed its agent")

    def _report(self, version: Version, convert_seconds: float, digest_seconds: float) -> "Future[int]":
        """STAGED; a replica that sends nothing learns the result from the others, in ``publish``."""
        if self._agent is None:
            nothing: Future[int] = Future()
            nothing.set_result(0)
            return nothing
        side = self._agent.side
        return self._agent.call(lambda: side.staged(version, convert_seconds, digest_seconds))

    def _claim_slots(self, step: int) -> None:
        if step in self._steps:
            raise PublishError(f"this trainer has published step {step} before; a step names one version for good")
        if self._agent is None:
            return
        if self._agent.failure is not None:
            raise PublishError(f"the agent of rank {self._rank} has ended: {self._agent.failure}")
        if self._last is not None and not self._last.done():
            raise BusyError(f"{self._last.version} has not ended")
        if not self._agent.call(self._agent.side.claim):
            raise BusyError("a write from the slots is still in flight")

    def _stage(self, version: Version) -> tuple[float, float]:
        """Fill the slots and have them digested; the seconds of each."""
        began = time.monotonic()
        with torch.no_grad():
            self._model_slots().convert(self._state())
        self._synchronise()
        convert_seconds = time.monotonic() - began
        return convert_seconds, self._agent.side.prepare(version) if self._agent is not None else 0.0

    def _model_slots(self) -> TrainerSlots:
        if not isinstance(self.slots, TrainerSlots):
            raise PublishError("this agent has no model to publish; it was made for publish_stream(step, tensors)")
        return self.slots

    # ------------------------------------------------------------------------------------------------- streams
    def _stream_slots(self, metadata: Sequence[StreamedTensor] | None) -> StreamSlots:
        return StreamSlots(metadata, rank=self._rank, treatments=self._treatments, forward_dtype=self._forward_dtype)

    def _claim_stream(self, step: int, metadata: Sequence[StreamedTensor] | None) -> None:
        if not isinstance(self.slots, StreamSlots):
            raise PublishError("this agent publishes its model; for streams make one with TrainerAgent(None, …)")
        if not self.slots.complete:
            self.slots = self._stream_slots(metadata)  # anew after a first pass that failed
        self._claim_slots(step)

    def _fill(self, tensors: Pairs) -> float:
        """Convert the tensors as they pass; the seconds that it took, those of the stream itself included."""
        assert isinstance(self.slots, StreamSlots)
        began = time.monotonic()
        self.slots.fill(tensors)
        self._synchronise()
        return time.monotonic() - began

    def _joined_once(self) -> AgentThread[TrainerSide]:
        if self._agent is None:
            self._agent = self._joined(Member("trainer", "", self._rank), self._world)
        return self._agent

    def _synchronise(self) -> None:
        if torch.cuda.is_available() and any(arena.is_cuda for arena in self.slots.arenas):
            torch.cuda.synchronize()

    @contextmanager
    def _together(self, version: Version) -> Iterator[None]:
        """All ranks leave the section, or all raise: one collective, reached on every path."""
        trouble = ""
        try:
            yield
        except BusyError as error:
            trouble = f"{BUSY}{error}"
        except Exception as error:
            log.exception("rank %d cannot stage %s", self._rank, version)
            trouble = f"{type(error).__name__}: {error}"
        wrong = {rank: text for rank, text in enumerate(gather_texts(trouble, self._group)) if text}
        if wrong:
            rank, text = next(iter(wrong.items()))
            kind = BusyError if all(text.startswith(BUSY) for text in wrong.values()) else PublishError
            raise kind(f"{version} is not staged by {len(wrong)} of {self._world} ranks; rank {rank}: {text}")
