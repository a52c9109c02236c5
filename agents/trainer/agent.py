"""TrainerAgent: publishes versions from one trainer rank.

Everything collective runs on the caller's thread, on all ranks in one order, and only after all ranks have agreed that
they come; the agent's own thread only writes what it is granted. Slots are separate memory, so training goes on while
they are being sent.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self, SupportsIndex

import torch
import torch.distributed as dist
from torch import nn
from weightsync.agents.link.thread import AgentThread, ControlAddress, Identity
from weightsync.agents.link.token import read_token
from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.interrupts import held_interrupts
from weightsync.agents.trainer.markers import write_stable
from weightsync.agents.trainer.models.table import ConfigSource, ModelTable
from weightsync.agents.trainer.options import StrPath, TrainerSettings, TrainerSettingsError, trainer_settings
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.replicas import Ranks
from weightsync.agents.trainer.slots.slots import ARENA_REGION, SlotOptions, TrainerSlots
from weightsync.agents.trainer.state import current_state
from weightsync.agents.trainer.step import step_number
from weightsync.agents.trainer.tables import table_of
from weightsync.agents.trainer.thread_side import TrainerSide, source_of
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.names import Member, Version

__all__ = ["BusyError", "Publication", "PublishError", "TrainerAgent"]

log = logging.getLogger(__name__)

CONNECT_SECONDS: Final = 60.0
"""For the daemon's first Welcome; the daemon may start after the trainer."""

RANKS_SECONDS: Final = 600.0
"""For the slowest rank to come to an agreement: it may be loading its weights, or be a step behind."""

END_SECONDS: Final = 30.0
"""For the slowest rank to hear the end of a version that another rank has heard."""

CLOSE_SECONDS: Final = 30.0
"""For the open grant to be closed when the agent is; the slots are kept for as long as it is not."""

CLOSE_POLL_SECONDS: Final = 0.02

COMMITTED, FAILED = "committed ", "failed "
"""How a rank tells the others what it has heard of a version."""


class TrainerAgent:
    """One per trainer rank, made on all ranks of ``process_group`` together, and closed or left by ``with``.

    What is not given as an argument comes from the environment or a small file: see ``options.trainer_settings``. A
    rank that fails, in here or in ``publish``, or is interrupted, ends the call on all others within seconds.

    Args:
        source: the model, or a callable that returns the current state dict (plain tensors or DTensors) by the
            trainer's own names; asked at every publish.
        table: how these become checkpoint tensors, or the model's configuration; None: its own ``config``.
        hub_url: ``ws://host:port/agents`` of the daemon.
        token_file: file with the bearer token.
        run_id, run_dir: the run; ``STABLE`` is written below ``run_dir``, which the daemon must see, too.
        process_group: the trainer's ranks; None for the default group, or this process alone without one.
        options: which slots are sharded, gathered or by expert; see SlotOptions.
        publish_seconds: total deadline of ``publish``.
        connect_seconds: for the first Welcome.

    Raises:
        ReplicaFailed: another rank failed; with its number and reason.
        TrainerSettingsError: something is given nowhere, or the run directory does not exist.
        RefusedForGood: the daemon does not want this rank (another run, a wrong world size).
        TimeoutError: no daemon within ``connect_seconds``.
        Errors of the table and the slots, each with the tensor's name.
    """

    def __init__(
        self,
        source: nn.Module | Callable[[], Mapping[str, torch.Tensor]],
        table: ModelTable | ConfigSource | None = None,
        *,
        hub_url: str | None = None,
        token_file: StrPath | None = None,
        run_id: str | None = None,
        run_dir: StrPath | None = None,
        process_group: dist.ProcessGroup | None = None,
        options: SlotOptions | None = None,
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._source = source
        self._publish_seconds = publish_seconds
        self._ranks = Ranks(process_group)
        self._agent: AgentThread[TrainerSide] | None = None
        self._last: Publication | None = None
        self._committed: set[int] = set()
        self._failures: dict[int, int] = {}
        """Steps whose versions FAILED, and how often."""
        try:
            with self._ranks.section():
                self._settings = trainer_settings(hub_url, token_file, run_id, run_dir)
                read_token(self._settings.token_file)
                self._generation = self._agreed_start()
                # Before the ranks meet, since what is made of a state may be collective.
                state, made = self._state(), table_of(source, table)
                self._ranks.agree(seconds=RANKS_SECONDS)
                self.slots = TrainerSlots(state, made, options=options)
                warm_up(self.slots.arenas[0].device)  # here, and not on the agent's thread while a daemon waits
                self._connect(connect_seconds)
                self._ranks.agree(seconds=RANKS_SECONDS)
        except BaseException:
            if self._agent is not None:
                self._agent.close("a trainer rank could not start")
            self._ranks.close()
            raise

    def _agreed_start(self) -> int:
        """The generation, drawn by the first rank, of ranks that agree on where they belong."""
        where, drawn = (self._settings.hub_url, self._settings.run_id), secrets.randbits(62)
        said = self._ranks.agree(f"{drawn} {' '.join(where)}", seconds=RANKS_SECONDS)
        first = said[0].partition(" ")[2]
        for rank, text in enumerate(said):
            if text.partition(" ")[2] != first:
                other = text.partition(" ")[2]
                raise ReplicaFailed(rank, f"its hub_url and run_id are {other!r}, those of rank 0 are {first!r}")
        return int(said[0].partition(" ")[0])

    def _connect(self, seconds: float) -> None:
        """Start the agent's thread, on ranks that hold slots, and wait until the daemon has taken it in."""
        said = self._ranks.agree(str(self.slots.primary), seconds=RANKS_SECONDS)
        senders = [rank for rank, primary in enumerate(said) if primary == str(True)]
        if not self.slots.primary:
            return
        member = Member("trainer", "", senders.index(self._ranks.rank))
        identity = Identity(self._settings.run_id, member, len(senders), self._generation)
        memory = source_of(self.slots, member, len(senders))
        size = self.slots.arenas[ARENA_REGION].numel()
        address = ControlAddress(self._settings.hub_url, self._settings.token_file)
        self._agent = AgentThread(identity, address, lambda thread: TrainerSide(thread, memory, size))
        self._agent.start()
        welcome = self._agent.wait_welcome(seconds, look=self._ranks.look)
        if self._ranks.rank == 0:
            _compare_run_dirs(self._settings, welcome.run_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _state(self) -> Mapping[str, torch.Tensor]:
        return current_state(self._source)

    @property
    def generation(self) -> int:
        """Of this start of the trainer; part of every version's identity."""
        return self._generation

    def publish(self, step: SupportsIndex) -> int:
        """Convert the current weights, have them written into the engines, and return when they serve.

        Args:
            step: an integer of any kind, the same on all ranks; one whose version FAILED may be published again.

        Returns:
            The commit sequence number.

        Raises:
            PublishError: the version is FAILED, or the deadline passed; on every rank.
            BusyError: an earlier ``publish_async`` has not ended.
        """
        ends = time.monotonic() + self._publish_seconds
        with self._publishing(step):
            publication = self._stage_together(step)
            heard = self._hear(publication, ends)
            return _agreed_end(self._ranks.agree(heard, seconds=max(0.0, ends - time.monotonic()) + END_SECONDS))

    def publish_async(self, step: SupportsIndex) -> Publication:
        """As ``publish``, but returns once the slots hold the weights; training may go on at once."""
        with self._publishing(step):
            return self._stage_together(step)

    def close(self) -> None:
        """Leave the fleet, once the open grant is closed. While something is still written from the slots, for longer
        than CLOSE_SECONDS, they and the agent's thread are kept until this process ends."""
        self._ranks.close()
        if self._agent is None or self._agent.failure is not None:
            return
        agent, ends = self._agent, time.monotonic() + CLOSE_SECONDS
        while not agent.call(agent.side.retire):
            if time.monotonic() >= ends:
                log.warning("a write from the slots is in flight after %g s; they are kept", CLOSE_SECONDS)
                return
            time.sleep(CLOSE_POLL_SECONDS)
        agent.close("the trainer closed its agent")

    # ---------------------------------------------------------------------------------------- one version, on all ranks
    @contextmanager
    def _publishing(self, step: SupportsIndex) -> Iterator[None]:
        """A section that all ranks leave by an error of one kind if one of them does; an interrupt stays its own."""
        try:
            with self._ranks.section():
                yield
        except ReplicaFailed as error:
            kind = BusyError if error.reason.startswith(BusyError.__name__) else PublishError
            raise kind(f"step {step} was not published: {error}") from error
        except PublishError:
            raise
        except Exception as error:
            log.exception("rank %d cannot publish step %s", self._ranks.rank, step)
            why = f"rank {self._ranks.rank}: {type(error).__name__}: {error}"
            raise PublishError(f"step {step} was not published: {why}") from error

    def _stage_together(self, step: SupportsIndex) -> Publication:
        """The version in the slots of all ranks, announced to the daemon."""
        version = Version(self._generation, step_number(step))
        state = self._state()
        self.slots.check(state)
        self._reserve(version.step)
        try:
            # Agreed before the conversion's collectives, so that no rank waits in them for one that cannot come …
            mine = f"{version.step} {self._failures.get(version.step, 0)}"
            restaged = _agreed_staging(self._ranks.agree(mine, seconds=RANKS_SECONDS))
        except BaseException:
            self._release()
            raise
        self._take()
        with held_interrupts():
            convert_seconds, digest_seconds = self._stage(version, state)
        # … and after, so that STABLE speaks for all. It comes before STAGED, without which the daemon does not heed it.
        self._ranks.agree(seconds=RANKS_SECONDS, then=lambda: self._mark(version, restaged))
        self._last = self._report(version, convert_seconds, digest_seconds, restaged)
        return self._last

    def _reserve(self, step: int) -> None:
        """That this rank's slots may be filled with ``step``; grants wait from here on.

        Raises:
            PublishError: the step is committed, or the agent has ended.
            BusyError: the version before has not ended, or is still being written.
        """
        if self._agent is None:
            return
        if self._agent.failure is not None:
            raise PublishError(f"the agent of rank {self._ranks.rank} has ended: {self._agent.failure}")
        if self._last is not None:
            if not self._last.done():
                raise BusyError(f"{self._last.version} has not ended")
            self._book(self._last)
        if step in self._committed:
            raise PublishError(f"step {step} is committed already; a step names one version for good")
        if not self._agent.call(self._agent.side.reserve):
            raise BusyError("a write from the slots is still in flight")

    def _book(self, ended: Publication) -> None:
        """What became of the last version. One that FAILED may be staged again, and the daemon is told how often."""
        step, self._last = ended.version.step, None
        if ended.committed():
            self._committed.add(step)
            self._failures.pop(step, None)
        else:
            self._failures[step] = self._failures.get(step, 0) + 1

    def _release(self) -> None:
        if self._agent is not None and self._agent.failure is None:
            self._agent.post(self._agent.side.release)

    def _take(self) -> None:
        # Posted, not called: grants wait since ``_reserve``, so that nothing can come in between.
        if self._agent is not None:
            self._agent.post(self._agent.side.take)

    def _stage(self, version: Version, state: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Fill the slots and have them digested; the seconds of each."""
        began = time.monotonic()
        with torch.no_grad():
            self.slots.convert(state)
        self._synchronise()
        convert_seconds = time.monotonic() - began
        return convert_seconds, self._agent.side.prepare(version) if self._agent is not None else 0.0

    def _mark(self, version: Version, restaged: int) -> None:
        write_stable(self._settings.run_dir, self._settings.run_id, version, restaged)

    def _report(self, version: Version, convert_seconds: float, digest_seconds: float, restaged: int) -> Publication:
        """STAGED; a replica that sends nothing learns the result from the others, in ``publish``."""
        outcome: Future[int] = Future()
        if self._agent is None:
            outcome.set_result(0)
            return Publication(version, outcome)
        side = self._agent.side
        # Posted, not called: a busy thread must not make this rank fail where the others go on.
        self._agent.post(lambda: side.staged(version, convert_seconds, digest_seconds, outcome, restaged))
        return Publication(version, outcome)

    def _hear(self, publication: Publication, ends: float) -> str:
        """What becomes of the version, as this rank hears it; empty on ranks without an agent."""
        if self._agent is None:
            return ""
        try:
            return f"{COMMITTED}{publication.wait(max(0.1, ends - time.monotonic()), look=self._look)}"
        except PublishError as error:
            return f"{FAILED}{error}"

    def _look(self) -> None:
        """While the version is on its way: whether all ranks and this one's agent are still there."""
        self._ranks.look()
        if self._agent is not None and self._agent.failure is not None:
            raise PublishError(f"the agent of rank {self._ranks.rank} has ended: {self._agent.failure}")

    def _synchronise(self) -> None:
        if torch.cuda.is_available() and any(arena.is_cuda for arena in self.slots.arenas):
            torch.cuda.synchronize()


def _agreed_staging(said: tuple[str, ...]) -> int:
    """How often the one step that all ranks give was staged before; ranks without an agent do not know.

    Raises:
        PublishError: the ranks give different steps.
    """
    steps = [text.split()[0] for text in said]
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise PublishError(f"rank {rank} publishes step {step}, rank 0 step {steps[0]}: give all ranks one step")
    return max(int(text.split()[1]) for text in said)


def _agreed_end(heard: tuple[str, ...]) -> int:
    """The commit sequence number, if any rank has heard of it: the daemon says so only of what all engines serve.

    Raises:
        PublishError: no rank has, with the first reason.
    """
    numbers = [int(text.removeprefix(COMMITTED)) for text in heard if text.startswith(COMMITTED)]
    if numbers:
        return max(numbers)
    raise PublishError(next((text.removeprefix(FAILED) for text in heard if text), "no rank has an agent"))


def _compare_run_dirs(settings: TrainerSettings, theirs: str) -> None:
    """Tell at once that markers will not be seen. The same directory may have two paths on two hosts.

    Raises:
        TrainerSettingsError: the trainer's does not exist.
    """
    ours = settings.run_dir
    if not ours.is_dir():
        raise TrainerSettingsError(f"run_dir {ours} is no directory on this host; the daemon watches {theirs}")
    if os.path.realpath(ours) != os.path.realpath(theirs) and not (os.path.exists(theirs) and ours.samefile(theirs)):
        log.warning("run_dir is %s here, the daemon watches %s: no version begins unless they are one", ours, theirs)
