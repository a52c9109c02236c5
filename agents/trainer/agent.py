"""TrainerAgent: publishes versions from one trainer rank.

Everything collective runs on the caller's thread inside ``publish``, on all ranks in one order; the agent's own thread
only writes what it is granted. Slots are separate memory, so training goes on while they are being sent.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, get_args

import torch
import torch.distributed as dist
from weightsync.agents.link.thread import AgentThread, ControlAddress, Identity
from weightsync.agents.trainer.errors import NonFiniteWeights, ReplicaFailed
from weightsync.agents.trainer.markers import write_stable
from weightsync.agents.trainer.models.table import ModelTable
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.replicas import Group, agree_on, gather_texts, leave_together
from weightsync.agents.trainer.slots.finite import NonFinite
from weightsync.agents.trainer.slots.slots import ARENA_REGION, SlotOptions, TrainerSlots
from weightsync.agents.trainer.sources.lora import LoraMerge
from weightsync.agents.trainer.state import StateSource, TrainerSource
from weightsync.agents.trainer.thread_side import TrainerSide, source_of
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.names import Member, Version

__all__ = ["BusyError", "LoraMerge", "Publication", "PublishError", "TrainerAgent"]

log = logging.getLogger(__name__)

OnNonFinite = Literal["refuse", "warn", "allow"]

BUSY: Final = "busy: "
"""How a rank tells the others that waiting helps."""

CONNECT_SECONDS: Final = 60.0
"""For the daemon's first Welcome; the daemon may start after the trainer."""


class TrainerAgent:
    """One per trainer rank, made on all ranks together (slots of sharded tensors agree on sizes collectively).

    Args:
        source: the model, or a callable that returns the current state dict (plain tensors or DTensors) by the
            trainer's own names; asked at every publish.
        table: how these become checkpoint tensors.
        hub_url: ``ws://host:port/agents`` of the daemon.
        token_file: file with the bearer token.
        run_id, run_dir: the run; ``STABLE`` is written below ``run_dir``.
        rank, world: of the trainer fleet; alone without torch.distributed: 0 and 1.
        process_group: for the collectives of publish; None for the default group.
        options: which slots are sharded, gathered or by expert; see SlotOptions.
        lora: how adapters are merged into their weights, where the source is no peft model (which says it itself).
        ignore: patterns of tensors that are trained and that no engine is to get, such as ``("v_head.*",)``.
        nonfinite: what becomes of a version with NaN or infinity in what engines would be sent.
        publish_seconds: total deadline of ``publish``.

    Raises:
        RefusedForGood: the daemon does not want this rank (another run, a wrong world size).
        TimeoutError: no daemon within CONNECT_SECONDS.
        Errors of the table and the slots, each with the tensor's name.
    """

    def __init__(
        self,
        source: StateSource,
        table: ModelTable,
        *,
        hub_url: str,
        token_file: Path,
        run_id: str,
        run_dir: Path,
        rank: int = 0,
        world: int = 1,
        process_group: dist.ProcessGroup | None = None,
        options: SlotOptions | None = None,
        lora: Sequence[LoraMerge] = (),
        ignore: Sequence[str] = (),
        nonfinite: OnNonFinite = "refuse",
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        if nonfinite not in get_args(OnNonFinite):
            raise ValueError(f"nonfinite={nonfinite!r}; it is one of {', '.join(get_args(OnNonFinite))}")
        self._source = TrainerSource(source, lora=lora, ignore=ignore)
        self._rank, self._world, self._run_id, self._run_dir = rank, world, run_id, run_dir
        self._group: Group = process_group
        self._publish_seconds, self._nonfinite = publish_seconds, nonfinite
        self._generation = agree_on(secrets.randbits(62), process_group)
        self.slots = TrainerSlots(self._source.values(), table, options=options, rank=rank, world=world)
        self._source.account_for(self._source.state(), self.slots.read)
        warm_up(self.slots.arenas[0].device)  # here, and not on the agent's thread while a daemon waits for its word
        self._last: Publication | None = None
        self._steps: set[int] = set()
        senders = [n for n, says in enumerate(gather_texts(str(self.slots.primary), process_group)) if says == "True"]
        self._agent: AgentThread[TrainerSide] | None = None
        if self.slots.primary:
            member = Member("trainer", "", senders.index(rank))
            self._start(Identity(run_id, member, len(senders), self._generation), ControlAddress(hub_url, token_file))
            self._await_welcome(connect_seconds)

    def _start(self, identity: Identity, address: ControlAddress) -> None:
        memory = source_of(self.slots, identity.member, identity.world)
        size = self.slots.arenas[ARENA_REGION].numel()
        self._agent = AgentThread(identity, address, lambda thread: TrainerSide(thread, memory, size))
        self._agent.start()

    def _await_welcome(self, seconds: float) -> None:
        assert self._agent is not None
        try:
            self._agent.wait_welcome(seconds)
        except BaseException:
            self._agent.close("no Welcome")
            raise

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
            self._claim_slots(step)
        # … and after, so that STABLE speaks for all.
        with self._together(version):
            convert_seconds, digest_seconds = self._stage(version)
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
        state = self._source.state()
        self.slots.check(state)
        self._source.account_for(state, self.slots.read)
        self._claim_memory()

    def _claim_memory(self) -> None:
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
            self.slots.convert(self._source.values())
        self._synchronise()
        self._judge_numbers(version, self.slots.nonfinite)
        convert_seconds = time.monotonic() - began
        return convert_seconds, self._agent.side.prepare(version) if self._agent is not None else 0.0

    def _judge_numbers(self, version: Version, find: Callable[[], tuple[NonFinite, ...]]) -> None:
        """NaN and infinity in the slots, as the option ``nonfinite`` says; the ranks agree on the outcome."""
        found = find() if self._nonfinite != "allow" else ()
        if found and self._nonfinite == "refuse":
            raise NonFiniteWeights(found)
        if found:
            log.warning("%s: NaN or infinity in %s", version, ", ".join(map(str, found)))

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
