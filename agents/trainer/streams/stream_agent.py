"""StreamAgent: publishes versions that pass as a stream, from one trainer rank."""

from collections.abc import Iterator, Mapping, Sequence
from typing import SupportsIndex

import torch
from weightsync.agents.trainer.interrupts import held_interrupts
from weightsync.agents.trainer.nonfinite import OnNonFinite
from weightsync.agents.trainer.options import StrPath, trainer_settings
from weightsync.agents.trainer.publication import Publication
from weightsync.agents.trainer.publisher import CONNECT_SECONDS, RANKS_SECONDS, Publisher
from weightsync.agents.trainer.replicas import ALONE, Group
from weightsync.agents.trainer.routes.treatments import treatments
from weightsync.agents.trainer.slots.conversion import ConversionTable
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.step import step_number
from weightsync.agents.trainer.streams.stream import Pairs, StreamSlots, drain, treatments_of
from weightsync.agents.trainer.streams.streamed import StreamedTensor
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.codec import decode_from_daemon
from weightsync.orchestrator.protocol.messages import Needs
from weightsync.orchestrator.protocol.names import Version


class StreamAgent(Publisher):
    """For a trainer that hands over (name, tensor) pairs and no model. Closed, or left by ``with``.

    It meets the daemon in its first ``publish_stream``.

    Args:
        table: what each tensor becomes on the wire. None: what the engines need decides, which every call waits to be
            told; a tensor that they do not need is as without an entry in the table.
        hub_url, token_file, run_id, run_dir, nonfinite, publish_seconds, connect_seconds: see TrainerAgent.
        process_group: ranks that stream together, the same calls on each; None: all of the default group. ALONE: this
            one by itself, which waits for no other rank, whatever job it is a part of.
        forward_dtype: what masters are rounded to before anything else. None: as TrainerAgent does, and a tensor
            without an entry travels in the dtype that it has.

    Raises:
        StreamError: a table for other tensors than the checkpoint's.
        ReplicaFailed, TrainerSettingsError: see TrainerAgent.
    """

    def __init__(
        self,
        table: ConversionTable | None = None,
        *,
        hub_url: str | None = None,
        token_file: StrPath | None = None,
        run_id: str | None = None,
        run_dir: StrPath | None = None,
        process_group: Group = ALONE,
        forward_dtype: torch.dtype | None = None,
        nonfinite: OnNonFinite = "refuse",
        publish_seconds: float = 600.0,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        super().__init__(process_group, nonfinite, publish_seconds)
        self._connect_seconds = connect_seconds
        self._forward_dtype = forward_dtype
        self._follows = table is None
        self._made_for = 0
        """``fingerprint_number`` of the needs that the treatments are of."""
        with self._starting(lambda: trainer_settings(hub_url, token_file, run_id, run_dir)):
            self._treatments: Mapping[str, QuantizationSpec] = treatments_of(table) if table is not None else {}
        self._slots = self._made_slots(None)
        self._sent: StreamSlots | None = None
        """What the daemon knows the layout of."""

    @property
    def slots(self) -> StreamSlots:
        """What this rank sends from; without a layout until a first pass has succeeded."""
        return self._slots

    def publish_stream(
        self, step: SupportsIndex, tensors: Pairs, *, metadata: Sequence[StreamedTensor] | None = None
    ) -> int:
        """Convert tensors into the slots as they pass, have them written, and return when the engines serve them.

        All ranks of the agent's group call it; an agent that is alone calls it while the other ranks of its job drain
        the same generator. The generator is always read to its end, also when the version is refused, because other
        ranks may stand in its collectives.

        Args:
            step: an integer of any kind; one whose version FAILED may be streamed again.
            tensors: (name in the checkpoint, tensor) pairs, in any order; every one of the model in each call. A tensor
                need not outlive its turn.
            metadata: what passes, the same on every rank. Needed where ranks yield pieces; elsewhere it lets the slots
                have exactly their size. Heeded whenever slots are made: until a first call has succeeded in filling
                them, and when the engines need something else.

        Returns:
            The commit sequence number.

        Raises:
            PublishError: the version is FAILED, the deadline passed, or the stream is not what it should be; a tensor
                that cannot travel, or a name that is lacking or new, is named, before anything was written.
            BusyError: an earlier version is still being written after ``publish_seconds``.
        """
        stream = _Once(tensors)
        try:
            return self._until_it_serves(step, lambda: self._pass_together(step, stream, metadata))
        except Exception:
            # Out of the section, in which the other ranks would wait for this one before they drain theirs.
            if not stream.begun:
                drain(stream)
            raise

    def _pass_together(
        self, step: SupportsIndex, tensors: Pairs, metadata: Sequence[StreamedTensor] | None
    ) -> Publication:
        """The version in the slots of all ranks, announced to the daemon."""
        version = Version(self._generation, step_number(step))
        if self._follows and self._agent is None:
            self._join(self._ranks.rank, self._ranks.world, None, self._connect_seconds)
        restaged = self._take_together(version.step)
        if self._follows:
            self._follow_needs(metadata)
        if not self._slots.complete:
            self._slots = self._made_slots(metadata)  # anew after a first pass that failed
        self._ranks.agree(seconds=RANKS_SECONDS)  # before the stream's collectives
        with held_interrupts():
            digest, convert = self._filled(version, self._slots, lambda: self._slots.fill(tensors))
        # Before the daemon is told of slots: it is not to see those of ranks whose version was refused at another one.
        self._ranks.agree(seconds=RANKS_SECONDS)
        self._send_from(self._slots)
        return self._announce_together(version, (convert, digest + self._prepared(version)), restaged)

    def _follow_needs(self, metadata: Sequence[StreamedTensor] | None) -> None:
        """Treatments for what the engines need now, and slots anew, if the present ones are for something else."""
        number, message = self._needs_together(self._made_for)
        if number == self._made_for:
            return
        needs = decode_from_daemon(message)
        assert isinstance(needs, Needs)
        self._treatments = {name: each.treatment for name, each in treatments(needs, self._forward_dtype).items()}
        self._slots = self._made_slots(metadata)
        self._made_for = number

    def _made_slots(self, metadata: Sequence[StreamedTensor] | None) -> StreamSlots:
        return StreamSlots(
            metadata, rank=self._ranks.rank, treatments=self._treatments, forward_dtype=self._forward_dtype
        )

    def _send_from(self, slots: StreamSlots) -> None:
        """Have the daemon know ``slots``; without needs to follow, this rank joins with those of its first pass."""
        if self._sent is slots:
            return
        warm_up(slots.arenas[0].device)  # here, and not on the agent's thread while a daemon waits for its word
        if self._agent is None:
            self._join(self._ranks.rank, self._ranks.world, slots, self._connect_seconds)
        else:
            self._hold(slots)
        self._sent = slots


class _Once:
    """A stream that knows whether anybody has begun to read it."""

    def __init__(self, tensors: Pairs) -> None:
        self._tensors = tensors
        self.begun = False

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.begun = True
        yield from self._tensors
