"""TrainerAgent: publishes versions from one trainer rank.

Everything collective runs on the caller's thread, on all ranks in one order, and only after all ranks have agreed that
they come; the agent's own thread only writes what it is granted. Slots are separate memory, so training goes on while
they are being sent.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self, SupportsIndex

import torch
import torch.distributed as dist
from weightsync.agents.link.thread import AgentThread, ControlAddress, Identity
from weightsync.agents.link.token import read_token
from weightsync.agents.trainer.agreed import COMMITTED, FAILED, agreed_end, agreed_staging, agreed_start
from weightsync.agents.trainer.errors import ReplicaFailed
from weightsync.agents.trainer.following import FollowedNeeds, await_needs, fingerprint_number, followed
from weightsync.agents.trainer.interrupts import held_interrupts
from weightsync.agents.trainer.markers import write_stable
from weightsync.agents.trainer.models.table import ModelTable
from weightsync.agents.trainer.nonfinite import OnNonFinite, judge_numbers, known_option
from weightsync.agents.trainer.options import StrPath, compare_run_dirs, trainer_settings
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.replicas import TrainerRanks
from weightsync.agents.trainer.slots.conversion import ConversionTable
from weightsync.agents.trainer.slots.slots import ARENA_REGION, SlotOptions, TrainerSlots, holds_slots
from weightsync.agents.trainer.sources.lora import LoraMerge
from weightsync.agents.trainer.state import StateSource, TrainerSource
from weightsync.agents.trainer.step import step_number
from weightsync.agents.trainer.thread_side import TrainerSide, source_of
from weightsync.agents.transport.interface import SourceMemory
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.codec import encode
from weightsync.orchestrator.protocol.messages import Needs
from weightsync.orchestrator.protocol.names import Member, Version

__all__ = ["BusyError", "LoraMerge", "Publication", "PublishError", "TrainerAgent"]

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


class TrainerAgent:
    """One per trainer rank, made on all ranks of ``process_group`` together, and closed or left by ``with``.

    What is not given as an argument comes from the environment or a small file: see ``options.trainer_settings``. A
    rank that fails, in here or in ``publish``, or is interrupted, ends the call on all others within seconds.

    Args:
        source: the model, or a callable that returns the current state dict (plain tensors or DTensors) by the
            trainer's own names; asked at every publish.
        table: how these become checkpoint tensors. None: what the engines need decides, and the slots are made at the
            first publish; names are the checkpoint's, or those that transformers maps to them.
        hub_url: ``ws://host:port/agents`` of the daemon.
        token_file: file with the bearer token.
        run_id, run_dir: the run; ``STABLE`` is written below ``run_dir``, which the daemon must see, too.
        process_group: the trainer's ranks; None for the default group, or this process alone without one.
        options: which slots are sharded, gathered or by expert; see SlotOptions.
        config: the model's transformers configuration, for a ``source`` that is no module; without a table only.
        forward_dtype: what masters are rounded to before anything else; without a table only. None: masters are cast
            straight to what the engines need, as they are when the trainer's checkpoint is loaded, and rounded to
            bfloat16 before they are quantised.
        lora: how adapters are merged into their weights, where the source is no peft model (which says it itself).
        ignore: patterns of tensors that are trained and that no engine is to get, such as ``("v_head.*",)``.
        nonfinite: what becomes of a version with NaN or infinity in what engines would be sent.
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
        source: StateSource,
        table: ModelTable | None = None,
        *,
        hub_url: str | None = None,
        token_file: StrPath | None = None,
        run_id: str | None = None,
        run_dir: StrPath | None = None,
        process_group: dist.ProcessGroup | None = None,
        options: SlotOptions | None = None,
        config: object | None = None,
        forward_dtype: torch.dtype | None = None,
        lora: Sequence[LoraMerge] = (),
        ignore: Sequence[str] = (),
        nonfinite: OnNonFinite = "refuse",
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._source = TrainerSource(source, lora=lora, ignore=ignore)
        self._nonfinite = known_option(nonfinite)
        self._options = options or SlotOptions()
        self._slots: TrainerSlots | None = None
        self._first_sender = 0
        self._publish_seconds = publish_seconds
        self._ranks = TrainerRanks(process_group)
        self._agent: AgentThread[TrainerSide] | None = None
        self._last: Publication | None = None
        self._committed: set[int] = set()
        self._failures: dict[int, int] = {}
        """Steps whose versions FAILED, and how often."""
        try:
            with self._ranks.section():
                self._settings = trainer_settings(hub_url, token_file, run_id, run_dir)
                read_token(self._settings.token_file)
                where = f"{self._settings.hub_url} {self._settings.run_id}"
                said = self._ranks.agree(f"{secrets.randbits(62)} {where}", seconds=RANKS_SECONDS)
                self._generation = agreed_start(said)
                self._follows = followed(source, table, config, forward_dtype, self._options)
                if table is not None:
                    self._slots = self._made_slots(table)
                    self._source.account_for(self._state(), self._slots.read)
                self._connect(connect_seconds)
                self._ranks.agree(seconds=RANKS_SECONDS)
        except BaseException:
            if self._agent is not None:
                self._agent.close("a trainer rank could not start")
            self._ranks.close()
            raise

    def _made_slots(self, table: ConversionTable) -> TrainerSlots:
        slots = TrainerSlots(self._source.values(), table, options=self._options)
        warm_up(slots.arenas[0].device)  # here, and not on the agent's thread while a daemon waits for its word
        return slots

    @property
    def slots(self) -> TrainerSlots:
        """What this rank sends from.

        Raises:
            PublishError: there are none yet, because no publish has learnt what the engines need.
        """
        if self._slots is None:
            raise PublishError("slots are made at the first publish, for what the engines need then")
        return self._slots

    def _connect(self, seconds: float) -> None:
        """Start the agent's thread, on ranks that hold slots, and wait until the daemon has taken it in."""
        primary = holds_slots(self._state(), self._options)
        said = self._ranks.agree(str(primary), seconds=RANKS_SECONDS)
        senders = [rank for rank, says in enumerate(said) if says == str(True)]
        self._first_sender = senders[0]
        if not primary:
            return
        member = Member("trainer", "", senders.index(self._ranks.rank))
        identity = Identity(self._settings.run_id, member, len(senders), self._generation)
        memory, size = _memory_of(self._slots, identity) if self._slots is not None else (None, 0)
        address = ControlAddress(self._settings.hub_url, self._settings.token_file)
        self._agent = AgentThread(identity, address, lambda thread: TrainerSide(thread, memory, size))
        self._agent.start()
        welcome = self._agent.wait_welcome(seconds, look=self._ranks.look)
        if self._ranks.rank == 0:
            compare_run_dirs(self._settings, welcome.run_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _state(self) -> Mapping[str, torch.Tensor]:
        """By the model's own names; in place of merged weights their bases. No rank waits for another."""
        return self._source.state()

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
            return agreed_end(self._ranks.agree(heard, seconds=max(0.0, ends - time.monotonic()) + END_SECONDS))

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
        if self._follows is None:
            self._check(state)
        self._reserve(version.step)
        try:
            # Agreed before the conversion's collectives, so that no rank waits in them for one that cannot come …
            mine = f"{version.step} {self._failures.get(version.step, 0)}"
            restaged = agreed_staging(self._ranks.agree(mine, seconds=RANKS_SECONDS))
        except BaseException:
            self._release()
            raise
        self._take()
        if self._follows is not None:
            self._follow_needs(self._follows, state)
        with held_interrupts():
            convert_seconds, digest_seconds = self._stage(version)
        # … and after, so that STABLE speaks for all. It comes before STAGED, without which the daemon does not heed it.
        self._ranks.agree(seconds=RANKS_SECONDS, then=lambda: self._mark(version, restaged))
        self._last = self._report(version, convert_seconds, digest_seconds, restaged)
        return self._last

    def _follow_needs(self, follows: FollowedNeeds, state: Mapping[str, torch.Tensor]) -> None:
        """Slots for what the engines need now, on all ranks, if the present ones are for something else."""
        # One rank was told; the others go by what it says, so that all have routes and slots of the same needs.
        first = self._ranks.rank == self._first_sender
        told = await_needs(self._told, self._publish_seconds, self._look, self._standing) if first else None
        said = self._ranks.agree(str(fingerprint_number(told)), seconds=self._publish_seconds + END_SECONDS)
        number = int(said[self._first_sender])
        if number != follows.made_for:
            message = encode(told) if told is not None else b""
            message = self._ranks.share(message, self._first_sender, seconds=RANKS_SECONDS)
            follows.made_for = 0  # until all ranks have theirs: those that failed and the others must agree next time
            self._hold(self._made_slots(follows.table(message, state)))
        self._check(state)
        self._ranks.agree(seconds=RANKS_SECONDS)  # before the conversion's collectives
        follows.made_for = number

    def _check(self, state: Mapping[str, torch.Tensor]) -> None:
        """That the slots can be filled, and that all that is trained is read; no rank waits for another."""
        self.slots.check(state)
        self._source.account_for(state, self.slots.read)

    def _hold(self, slots: TrainerSlots) -> None:
        """Send from ``slots`` in the place of the former ones, which nothing is written from."""
        if self._agent is not None:
            side, (memory, size) = self._agent.side, _memory_of(slots, self._agent.identity)
            self._agent.call(lambda: side.hold(memory, size)).result(timeout=self._publish_seconds)
        self._slots = slots

    def _told(self) -> Needs | None:
        return self._agent.side.needs if self._agent is not None else None

    def _standing(self) -> str:
        """What the daemon does at the moment, as far as this rank knows."""
        if self._agent is None:
            return ""
        trouble = self._agent.trouble
        return f"not connected ({trouble})" if trouble else self._agent.side.standing

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

    def _stage(self, version: Version) -> tuple[float, float]:
        """Fill the slots and have them digested; the seconds of each."""
        began = time.monotonic()
        with torch.no_grad():
            self.slots.convert(self._source.values())
        if (device := self.slots.arenas[ARENA_REGION].device).type == "cuda":
            torch.cuda.synchronize(device)
        judge_numbers(self.slots, self._nonfinite, version)
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
        return Publication(version, outcome, self._standing)

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


def _memory_of(slots: TrainerSlots, identity: Identity) -> tuple[SourceMemory, int]:
    return source_of(slots, identity.member, identity.world), slots.arenas[ARENA_REGION].numel()
