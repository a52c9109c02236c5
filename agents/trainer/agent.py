"""TrainerAgent: publishes versions from one trainer rank.

Everything collective runs on the caller's thread, on all ranks in one order, and only after all ranks have agreed that
they come; the agent's own thread only writes what it is granted. Slots are separate memory, so training goes on while
they are being sent.
"""

from collections.abc import Sequence
from typing import SupportsIndex

import torch
import torch.distributed as dist
from weightsync.agents.trainer.errors import AdapterError, DifferentGathering
from weightsync.agents.trainer.following import FollowedNeeds, followed
from weightsync.agents.trainer.interrupts import held_interrupts
from weightsync.agents.trainer.models.table import ModelTable
from weightsync.agents.trainer.nonfinite import OnNonFinite
from weightsync.agents.trainer.options import StrPath, trainer_settings
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.publisher import CONNECT_SECONDS, RANKS_SECONDS, Publisher
from weightsync.agents.trainer.slots.conversion import ConversionTable
from weightsync.agents.trainer.slots.reading import State, Taken
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots, holds_slots, nobody
from weightsync.agents.trainer.sources.adapter import AdapterSource
from weightsync.agents.trainer.sources.gathered import Gathered, disagreement
from weightsync.agents.trainer.sources.lora import LoraMerge
from weightsync.agents.trainer.state import StateSource, TrainerSource
from weightsync.agents.trainer.step import step_number
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.names import Version

__all__ = ["BusyError", "LoraMerge", "Publication", "PublishError", "TrainerAgent"]


class TrainerAgent(Publisher):
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
        adapter: publish this adapter of a peft model alone, to engines whose rounds write an adapter; without a table.
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
        adapter: str | None = None,
        ignore: Sequence[str] = (),
        nonfinite: OnNonFinite = "refuse",
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._options = options or SlotOptions()
        super().__init__(process_group, nonfinite, publish_seconds, compares=self._options.replicas == "compare")
        self._source: TrainerSource | AdapterSource
        self._slots: TrainerSlots | None = None
        self._gathered = Gathered(())
        with self._starting(lambda: trainer_settings(hub_url, token_file, run_id, run_dir)):
            if adapter is None:
                self._source = TrainerSource(source, lora=lora, ignore=ignore)
            else:
                self._source = AdapterSource(source, adapter, ignore=ignore)
                if table is not None or lora:
                    raise AdapterError(adapter, "adapter= publishes it alone; table= and lora= are for a whole model")
            # An adapter's names are those of its files, whatever transformers makes of the model's.
            routed = source if adapter is None else None
            self._follows = followed(routed, table, config, forward_dtype, self._options)
            if table is not None:
                state = self._source.state()
                self._slots = self._made_slots(table, state)
                self._source.account_for(state, self._slots.read)
                del state  # of a callable, it may be a second model in memory
                self._meet()
            self._connect(connect_seconds)

    def _made_slots(self, table: ConversionTable, state: State) -> TrainerSlots:
        slots = TrainerSlots(state, table, options=self._options)
        self._gathered = Gathered(slots.slots)
        warm_up(slots.arenas[0].device)  # here, and not on the agent's thread while a daemon waits for its word
        return slots

    def _meet(self) -> None:
        """All ranks are here, before the conversion's collectives, and would gather the same.

        Raises:
            DifferentGathering: they would not, with the tensors' names.
        """
        said = self._ranks.agree(self._gathered.said(), seconds=RANKS_SECONDS)
        found = disagreement(self._ranks, said, self._gathered.each, RANKS_SECONDS)
        if found is not None:
            raise DifferentGathering(*found)

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
        """Join the fleet, on ranks that hold slots."""
        primary = holds_slots(self._source.state(), self._options)
        said = self._ranks.agree(str(primary), seconds=RANKS_SECONDS)
        senders = [rank for rank, says in enumerate(said) if says == str(True)]
        self._first_sender = senders[0]
        if primary:
            self._join(senders.index(self._ranks.rank), len(senders), self._slots, seconds)

    def publish(self, step: SupportsIndex) -> int:
        """Convert the current weights, have them written into the engines, and return when they serve.

        Args:
            step: an integer of any kind, the same on all ranks; one whose version FAILED may be published again.

        Returns:
            The commit sequence number.

        Raises:
            PublishError: the version is FAILED, or the deadline passed; on every rank.
            BusyError: an earlier ``publish_async`` has not ended; an earlier version is still being written after
                ``publish_seconds``.
        """
        return self._until_it_serves(step, lambda: self._stage_together(step))

    def publish_async(self, step: SupportsIndex) -> Publication:
        """As ``publish``, but returns once the slots hold the weights; training may go on at once."""
        with self._publishing(step):
            return self._stage_together(step)

    # ---------------------------------------------------------------------------------------- one version, on all ranks
    def _stage_together(self, step: SupportsIndex) -> Publication:
        """The version in the slots of all ranks, announced to the daemon."""
        version = Version(self._generation, step_number(step))
        state = self._source.state()
        follows = self._follows
        if follows is None:
            taken = self._checked(state)
            restaged = self._take_together(version.step)
        else:
            restaged = self._take_together(version.step)
            taken = self._follow_needs(follows, state)
        with self._given_up_on_failure(version):
            with held_interrupts():
                seconds = self._stage(version, taken, restaged)
            return self._announce_together(version, seconds, restaged)

    def _follow_needs(self, follows: FollowedNeeds, state: State) -> Taken:
        """Slots for what the engines need now, on all ranks, if the present ones are for something else."""
        number, message = self._needs_together(follows.made_for)
        if number != follows.made_for:
            follows.made_for = 0  # until all ranks have theirs: those that failed and the others must agree next time
            slots = self._made_slots(follows.table(message, state), state)
            self._hold(slots)
            self._slots = slots
        taken = self._checked(state)
        self._meet()
        follows.made_for = number
        return taken

    def _checked(self, state: State) -> Taken:
        """What the slots are filled with, found fit; all that is trained is read. No rank waits for another."""
        taken = self.slots.check(state)
        self._source.account_for(state, self.slots.read)
        return taken

    def _stage(self, version: Version, taken: Taken, restaged: int) -> tuple[float, float]:
        """Fill the slots and have them digested; the seconds of each."""
        filling = self._begin_filling(version, restaged)
        reached = filling.reached if filling is not None else nobody
        digest, convert = self._filled(version, self.slots, lambda: self.slots.fill(taken, reached))
        return convert, digest + self._prepared(version)
