"""TrainerAgent: publishes versions from one trainer rank.

Everything collective runs on the caller's thread inside ``publish``, on all ranks in one order; the agent's own thread
only writes what it is granted. Slots are separate memory, so training goes on while they are being sent.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from weightsync.agents.agent import Agent, ControlAddress, Identity
from weightsync.agents.trainer.body import TrainerBody
from weightsync.agents.trainer.markers import write_stable
from weightsync.agents.trainer.models.table import ModelTable
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.orchestrator.protocol.names import Member, Version

__all__ = ["BusyError", "Publication", "PublishError", "TrainerAgent"]

log = logging.getLogger(__name__)

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
        publish_seconds: total deadline of ``publish``.

    Raises:
        RefusedForGood: the daemon does not want this rank (another run, a wrong world size).
        TimeoutError: no daemon within CONNECT_SECONDS.
        Errors of the table and the slots, each with the tensor's name.
    """

    def __init__(
        self,
        source: nn.Module | Callable[[], Mapping[str, torch.Tensor]],
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
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._state = source.state_dict if isinstance(source, nn.Module) else source
        self._rank, self._world, self._run_id, self._run_dir = rank, world, run_id, run_dir
        self._group = process_group
        self._publish_seconds = publish_seconds
        self._generation = self._agree_generation()
        self.slots = TrainerSlots(self._state(), table, options=options, rank=rank, world=world)
        member = Member("trainer", "", rank)
        self._body = TrainerBody(member, self.slots, run_dir)
        identity = Identity(run_id, member, world, self._generation)
        self._agent = Agent(identity, ControlAddress(hub_url, token_file), self._body)
        self._body.agent = self._agent
        self._agent.start()
        self._last: Publication | None = None
        try:
            self._agent.wait_welcome(connect_seconds)
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
        began = time.monotonic()
        publication = self.publish_async(step)
        return publication.wait(max(0.1, self._publish_seconds - (time.monotonic() - began)))

    def publish_async(self, step: int) -> Publication:
        """As ``publish``, but returns once the slots hold the weights; training may go on at once."""
        version = Version(self._generation, step)
        # Agreed before the conversion's collectives, so that no rank waits in them for one that cannot come …
        self._together(version, self._claim_slots)
        # … and after, so that STABLE speaks for all.
        self._together(version, lambda: self._stage(version))
        publication = Publication(version, self._agent.call(lambda: self._body.staged(version)))
        if self._rank == 0:
            write_stable(self._run_dir, self._run_id, version)
        self._last = publication
        return publication

    def close(self) -> None:
        """Leave the fleet. Slots are freed only when no write of ours is in flight."""
        self._agent.close("the trainer closed its agent")

    def _claim_slots(self) -> None:
        if self._agent.failure is not None:
            raise PublishError(f"the agent of rank {self._rank} has ended: {self._agent.failure}")
        if self._last is not None and not self._last.done():
            raise BusyError(f"{self._last.version} has not ended")
        if not self._agent.call(self._body.claim):
            raise BusyError("a write from the slots is still in flight")
        self.slots.check(self._state())

    def _stage(self, version: Version) -> None:
        began = time.monotonic()
        with torch.no_grad():
            self.slots.convert(self._state())
        self._synchronise()
        converted = time.monotonic()
        self._body.prepare(version)
        self._body.timings = (converted - began, time.monotonic() - converted)

    def _synchronise(self) -> None:
        if torch.cuda.is_available() and any(arena.is_cuda for arena in self.slots.arenas):
            torch.cuda.synchronize()

    def _together(self, version: Version, work: Callable[[], None]) -> None:
        """All ranks succeed, or all raise: one collective, reached on every path."""
        trouble, busy = "", False
        try:
            work()
        except BusyError as error:
            trouble, busy = str(error), True
        except Exception as error:
            log.exception("rank %d cannot stage %s", self._rank, version)
            trouble = f"{type(error).__name__}: {error}"
        troubles = [trouble]
        if self._world > 1:
            gathered: list[str | None] = [None] * self._world
            dist.all_gather_object(gathered, trouble, group=self._group)
            troubles = [entry or "" for entry in gathered]
        wrong = {rank: text for rank, text in enumerate(troubles) if text}
        if wrong:
            rank, text = next(iter(wrong.items()))
            kind = BusyError if busy else PublishError
            raise kind(f"{version} is not staged by {len(wrong)} of {self._world} ranks; rank {rank}: {text}")

    def _agree_generation(self) -> int:
        drawn = [secrets.randbits(62)]
        if self._world > 1:
            dist.broadcast_object_list(drawn, src=0, group=self._group)
        return drawn[0]
