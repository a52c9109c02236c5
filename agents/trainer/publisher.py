"""What one trainer rank's agent does to publish versions, whatever it sends from.

Everything that ranks do together runs on the caller's thread, on all ranks in one order, and only after all ranks have
agreed that they come; the agent's own thread only writes what it is granted.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self, SupportsIndex

import torch
from weightsync.agents.link.introduction import Identity
from weightsync.agents.link.thread import AgentThread, ControlAddress
from weightsync.agents.link.token import read_token
from weightsync.agents.tables.spans import NOWHERE
from weightsync.agents.trainer.agreed import COMMITTED, FAILED, agreed_end, agreed_staging, agreed_start
from weightsync.agents.trainer.errors import DifferentCopies, ReplicaFailed
from weightsync.agents.trainer.following import await_needs, fingerprint_number
from weightsync.agents.trainer.markers import write_stable
from weightsync.agents.trainer.nonfinite import OnNonFinite, judge_numbers, known_option
from weightsync.agents.trainer.options import TrainerSettings, compare_run_dirs
from weightsync.agents.trainer.publication import BusyError, Publication, PublishError
from weightsync.agents.trainer.replicas import FIRST_LOOK_SECONDS, LATER, LONGEST_LOOK_SECONDS, Group, TrainerRanks
from weightsync.agents.trainer.slots.slots import FilledSlots
from weightsync.agents.trainer.sources.copies import Copies, differing
from weightsync.agents.trainer.sources.gathered import disagreement
from weightsync.agents.trainer.surroundings import trainer_look
from weightsync.agents.trainer.thread_side import TrainerSide
from weightsync.agents.transport.filling import Filling
from weightsync.agents.transport.interface import SourceMemory
from weightsync.orchestrator.protocol.codec import encode
from weightsync.orchestrator.protocol.messages import Needs
from weightsync.orchestrator.protocol.names import Member, Version
from weightsync.orchestrator.protocol.traces.context import of_rank, of_version

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

GENERATION_BITS: Final = 53
"""JSON's readers in many languages know no longer integers, and a generation is compared."""


class Publisher:
    """What ``TrainerAgent`` and ``StreamAgent`` share: the ranks, the agent's thread, and what became of each version.

    A subclass enters ``_starting`` in its constructor, joins the fleet by ``_join``, publishes within ``_publishing``.

    Args:
        process_group: the trainer's ranks; see ``TrainerRanks``.
        nonfinite: what becomes of a version with NaN or infinity in what engines would be sent.
        publish_seconds: total deadline of a publish.
        compares: whether ranks that hold the same tensors compare them before each version.

    Raises:
        ValueError: ``nonfinite`` is none of the options.
    """

    _settings: TrainerSettings
    _generation: int

    def __init__(
        self, process_group: Group, nonfinite: OnNonFinite, publish_seconds: float, *, compares: bool = True
    ) -> None:
        self._nonfinite = known_option(nonfinite)
        self._compares = compares
        self._publish_seconds = publish_seconds
        self._ranks = TrainerRanks(process_group)
        self._first_sender = 0
        self._agent: AgentThread[TrainerSide] | None = None
        self._last: Publication | None = None
        self._copies: tuple[FilledSlots, Copies] | None = None
        """Of the slots that were filled last."""
        self._copies_said = ""
        self._committed: set[int] = set()
        self._failures: dict[int, int] = {}
        """Steps whose versions FAILED, and how often."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """Of this start of the trainer; part of every version's identity."""
        return self._generation

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

    # -------------------------------------------------------------------------------------------------------- the start
    @contextmanager
    def _starting(self, settings: Callable[[], TrainerSettings]) -> Iterator[None]:
        """A constructor on all ranks, with the settings and a generation agreed on; nobody waits for one that fails."""
        try:
            with self._ranks.section():
                self._settings = settings()
                read_token(self._settings.token_file)
                where = f"{self._settings.hub_url} {self._settings.run_id}"
                said = self._ranks.agree(f"{secrets.randbits(GENERATION_BITS)} {where}", seconds=RANKS_SECONDS)
                self._generation = agreed_start(said)
                yield
                self._ranks.agree(seconds=RANKS_SECONDS)
        except BaseException:
            if self._agent is not None:
                self._agent.close("a trainer rank could not start")
            self._ranks.close()
            raise

    def _join(self, place: int, world: int, slots: FilledSlots | None, seconds: float) -> None:
        """Start the agent's thread, ``place`` among ``world`` that send, and wait until the daemon has taken it in.

        ``slots`` None: they are made for what engines need, and ``_hold`` brings them.
        """
        identity = Identity(self._settings.run_id, Member("trainer", "", place), world, self._generation)
        memory = source_of(slots, identity.member, world) if slots is not None else None
        size = staged_bytes_of(slots) if slots is not None else 0
        address = ControlAddress(self._settings.hub_url, self._settings.token_file)
        look = trainer_look(memory, self._settings.run_dir if self._ranks.rank == 0 else None)
        agent = AgentThread(identity, address, lambda thread: TrainerSide(thread, memory, size), look)
        agent.start()
        try:
            welcome = agent.wait_welcome(seconds, look=self._ranks.look)
            if self._ranks.rank == 0:
                compare_run_dirs(self._settings, welcome.run_dir)
        except BaseException:
            agent.close("a trainer rank could not start")
            raise
        self._agent = agent

    def _hold(self, slots: FilledSlots) -> None:
        """Send from ``slots`` in the place of the former ones, which nothing is written from."""
        if self._copies is not None and self._copies[0] is not slots:
            self._copies = None  # they keep the former ones' memory
        if self._agent is not None:
            side, identity = self._agent.side, self._agent.identity
            memory, size = source_of(slots, identity.member, identity.world), staged_bytes_of(slots)
            self._agent.call(lambda: side.hold(memory, size)).result(timeout=self._publish_seconds)

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

    def _until_it_serves(self, step: SupportsIndex, stage: Callable[[], Publication]) -> int:
        """The commit sequence number of the version that ``stage`` announces."""
        ends = time.monotonic() + self._publish_seconds
        with self._publishing(step):
            heard = self._hear(stage(), ends)
            return agreed_end(self._ranks.agree(heard, seconds=max(0.0, ends - time.monotonic()) + END_SECONDS))

    def _take_together(self, step: int) -> int:
        """The slots of all ranks hold no version any more and may be filled with ``step``; how often it has FAILED.

        A committed version may still be on its way to an engine that catches up: all ranks wait until it has arrived.
        """
        self._admit(step)
        ends, pause = time.monotonic() + self._publish_seconds, FIRST_LOOK_SECONDS
        while True:
            in_use = self._reserve(ends)
            try:
                # Agreed before the conversion's collectives, so that no rank waits in them for one that cannot come …
                mine = f"{step} {self._failures.get(step, 0)} {in_use}"
                restaged, busy = agreed_staging(self._ranks.agree(mine, seconds=RANKS_SECONDS))
            except BaseException:
                self._release()
                raise
            if not busy:
                break
            self._release()  # by all, for a grant that some ranks hold back and others carry out tears an engine
            time.sleep(pause)
            pause = min(LATER * pause, LONGEST_LOOK_SECONDS)
        if self._agent is not None:
            # Posted, not called: grants wait since ``_reserve``, so that nothing can come in between.
            self._agent.post(self._agent.side.take)
        return restaged

    def _announce_together(self, version: Version, seconds: tuple[float, float], restaged: int) -> Publication:
        """The slots of all ranks hold ``version``: say so, with the seconds of its conversion and digest."""
        # … and after, so that STABLE speaks for all. It comes before STAGED, without which the daemon does not heed it.
        said = self._ranks.agree(
            self._copies_said, seconds=RANKS_SECONDS, then=lambda said: self._mark(version, restaged, said)
        )
        self._refuse_differing(said)
        self._last = self._report(version, *seconds, restaged)
        return self._last

    def _mark(self, version: Version, restaged: int, said: tuple[str, ...]) -> None:
        if differing(said) is None:
            write_stable(self._settings.run_dir, self._settings.run_id, version, restaged)

    def _say_copies(self, slots: FilledSlots) -> str:
        """What this rank's slots hold that others hold as well; see ``Copies``."""
        if self._ranks.world == 1 or not self._compares:
            return ""
        if self._copies is None or self._copies[0] is not slots:
            self._copies = slots, Copies(slots.slots, slots.layout, slots.arenas)
        return self._copies[1].said()

    def _refuse_differing(self, said: tuple[str, ...]) -> None:
        """That all ranks have said the same of what they hold alike.

        Raises:
            DifferentCopies: some have not, with the tensors' names.
        """
        each = self._copies[1].each if self._copies is not None else lambda _: b"{}"
        found = disagreement(self._ranks, said, each, RANKS_SECONDS)
        if found is not None:
            raise DifferentCopies(*found)

    def _admit(self, step: int) -> None:
        """That ``step`` may be the next version.

        Raises:
            PublishError: it is committed.
            BusyError: the version before has not ended.
        """
        if self._last is not None:
            if not self._last.done():
                raise BusyError(f"{self._last.version} has not ended")
            self._book(self._last)
        if step in self._committed:
            raise PublishError(f"step {step} is committed already; a step names one version for good")

    def _reserve(self, ends: float) -> str:
        """Which edge still reads this rank's slots; empty if none does: grants wait from here on.

        Raises:
            PublishError: the agent has ended.
            BusyError: an edge reads them, and ``ends`` is over.
        """
        if self._agent is None:
            return ""
        self._look()
        in_use = self._agent.call(self._agent.side.reserve)
        if in_use and time.monotonic() >= ends:
            raise BusyError(in_use)
        return in_use

    def _release(self) -> None:
        self._post(lambda side: side.release())

    def _post(self, work: Callable[[TrainerSide], object]) -> None:
        """Have the agent's thread do ``work``, where there is one."""
        if self._agent is not None and self._agent.failure is None:
            side = self._agent.side
            self._agent.post(lambda: work(side))

    def _book(self, ended: Publication) -> None:
        """What became of the last version. One that FAILED may be staged again, and the daemon is told how often."""
        step, self._last = ended.version.step, None
        if ended.committed():
            self._committed.add(step)
            self._failures.pop(step, None)
        else:
            self._failures[step] = self._failures.get(step, 0) + 1

    def _needs_together(self, made_for: int) -> tuple[int, bytes]:
        """What engines need now, the same on all ranks: its ``fingerprint_number``, and unless that is ``made_for`` the
        frame of the protocol."""
        # One rank was told; the others go by what it says, so that all have slots for the same needs.
        first = self._ranks.rank == self._first_sender
        told = await_needs(self._told, self._publish_seconds, self._look, self._standing) if first else None
        said = self._ranks.agree(str(fingerprint_number(told)), seconds=self._publish_seconds + END_SECONDS)
        number = int(said[self._first_sender])
        if number == made_for:
            return number, b""
        message = encode(told) if told is not None else b""
        return number, self._ranks.share(message, self._first_sender, seconds=RANKS_SECONDS)

    def _told(self) -> Needs | None:
        return self._agent.side.needs if self._agent is not None else None

    def _standing(self) -> str:
        """What the daemon does at the moment, as far as this rank knows."""
        if self._agent is None:
            return ""
        trouble = self._agent.trouble
        return f"not connected ({trouble})" if trouble else self._agent.side.standing

    def _begin_filling(self, version: Version, restaged: int) -> Filling | None:
        """That slots are filled with ``version``, of which the daemon may have written what is there; None where it may
        not. Not of one that has FAILED: the word of its new staging tells the daemon that it is no longer that."""
        if self._agent is None or restaged:
            return None
        side = self._agent.side
        return self._agent.call(lambda: side.convert(version))

    @contextmanager
    def _given_up_on_failure(self, version: Version) -> Iterator[None]:
        """From the first byte of ``version`` in the slots until STAGED: whatever is raised, none of it is published."""
        try:
            yield
        except BaseException:
            self._post(lambda side: side.give_up(f"{version} is not published"))
            raise

    def _filled(self, version: Version, slots: FilledSlots, fill: Callable[[], None]) -> tuple[float, float]:
        """Fill the slots, have them digested as far as edges are known, and judge what they hold: the seconds of the
        digest, which looks for NaN and infinity as well, and of all else."""
        began = time.monotonic()
        with torch.no_grad():
            fill()
        if (device := slots.arenas[0].device).type == "cuda":
            torch.cuda.synchronize(device)
        reads = time.monotonic()
        finite = self._agent.side.read(version, slots) if self._agent is not None else NOWHERE
        digest_seconds = time.monotonic() - reads
        judge_numbers(slots, self._nonfinite, version, finite)
        self._copies_said = self._say_copies(slots)
        return digest_seconds, time.monotonic() - began - digest_seconds

    def _prepared(self, version: Version) -> float:
        """Have digested what was not, and the transport take what it must; the seconds of it."""
        return self._agent.side.prepare(version) if self._agent is not None else 0.0

    def _report(self, version: Version, convert_seconds: float, digest_seconds: float, restaged: int) -> Publication:
        """STAGED; a replica that sends nothing learns the result from the others, in ``publish``."""
        outcome: Future[int] = Future()
        if self._agent is None:
            outcome.set_result(0)
            return Publication(version, outcome)
        side, place = self._agent.side, self._agent.identity.member.rank
        trace = of_rank(of_version(self._settings.run_id, version, restaged), place)
        # Posted, not called: a busy thread must not make this rank fail where the others go on.
        self._agent.post(lambda: side.staged(version, convert_seconds, digest_seconds, outcome, restaged, trace))
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
        """While something is waited for: whether all ranks and this one's agent are still there."""
        self._ranks.look()
        if self._agent is not None and self._agent.failure is not None:
            raise PublishError(f"the agent of rank {self._ranks.rank} has ended: {self._agent.failure}")


def source_of(slots: FilledSlots, member: Member, world: int) -> SourceMemory:
    """The slots' memory, as ``member`` of ``world`` ranks that have an agent."""
    first_replica = tuple(entry.first_replica for entry in slots.entries())
    return SourceMemory(member, world, slots.layout, slots.arenas, first_replica)


def staged_bytes_of(slots: FilledSlots) -> int:
    """What one conversion fills: all of the arenas but the staging region."""
    return sum(arena.numel() for number, arena in enumerate(slots.arenas) if number != slots.layout.staging)
