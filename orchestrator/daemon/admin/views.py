"""What the daemon shows of itself, as ``/status`` and ``/rounds`` answer it and as the command line prints it."""

from typing import Any, Final, Literal

import msgspec
from weightsync.orchestrator.core.records import LinkUse, RoundEnded
from weightsync.orchestrator.protocol.findings import Level
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.names import Member, Version

VIEW_SCHEMA: Final = 2
"""Raised when a field changes its meaning; new fields do not raise it."""

HISTORY_ROUNDS: Final = 20
"""Rounds in a StatusView; ``/rounds`` tells more."""


SHOWN: Final = 8
"""Engines that a sentence names."""


class VersionView(msgspec.Struct, frozen=True, kw_only=True):
    """A weight version. ``sequence`` is its place in the order of commits, 0 where it has none; ``digest`` is that of
    the newest commit over all its members, as in the audit log, empty where it is not known."""

    step: int
    generation: int
    sequence: int = 0
    digest: str = ""
    unix_time: float = 0.0


def version_view(
    version: Version | None, sequence: int = 0, unix_time: float = 0.0, digest: str = ""
) -> VersionView | None:
    """A version of the protocol as a view."""
    if version is None:
        return None
    return VersionView(
        step=version.step, generation=version.generation, sequence=sequence, digest=digest, unix_time=unix_time
    )


class LeftOutView(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of an engine that rounds leave out, and why; ``names`` are the first of at least ``count``.

    ``kind``: unwritten (stay as the engine's start left them), unneeded (of the checkpoint, and no rank needs any of
    it) or unprobed (written, and nobody could look whether they are read).
    """

    kind: str
    reason: str
    names: tuple[str, ...]
    count: int


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. ``state``: serving, paused, torn, held, joining, unreachable, updating; ``since`` in unix time.

    ``paused`` is what the engine itself said last, None where it did not say. ``fault``: which side has to mend
    ``error``: trainer, engine, daemon, network or config. ``left_out``: what rounds leave out of its connected ranks.
    ``mode``: how its ranks land, live, copy or flip, and ``mode_because`` why; empty while none has said so.
    ``standby``: the version that all of them have beside the one that they serve. ``torn``: also of a rank that is not
    connected, as it said last.
    """

    name: str
    url: str
    role: str
    state: str
    version: VersionView | None = None
    ranks_connected: int = 0
    ranks_expected: int = 0
    paused: bool | None = None
    torn: bool = False
    error: str = ""
    fault: str = ""
    since: float = 0.0
    left_out: tuple[LeftOutView, ...] = ()
    mode: str = ""
    mode_because: str = ""
    standby: VersionView | None = None


class TrainerView(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer rank."""

    rank: int
    host: str = ""
    pid: int = 0
    state: str = ""
    staged: VersionView | None = None
    since: float = 0.0


class ProgressView(msgspec.Struct, frozen=True, kw_only=True):
    """The round under way: for how long, and for how long in this phase; ``waits_for``: who has not done what it
    waits for."""

    round: str
    version: VersionView
    phase: str
    attempt: int
    elapsed_seconds: float
    phase_seconds: float = 0.0
    waits_for: str = ""


class SlowEdgeView(msgspec.Struct, frozen=True, kw_only=True):
    """An edge that moved less than half of what its link can; both in 10^9 bytes per second."""

    edge: str
    by: str
    gb_per_s: float
    link_gb_per_s: float


class LinkView(msgspec.Struct, frozen=True, kw_only=True):
    """What a round moved by one kind of link: same_gpu, nvlink, nic, tcp, shm, files or unknown.

    ``gb_per_s``: bytes over the time of the longest edge; ``ways``: the transports; ``slow``: the slowest of
    ``slow_edges`` that were slower than half of their link.
    """

    link: str
    edges: int
    bytes: int
    gb_per_s: float
    ways: tuple[str, ...] = ()
    slow: tuple[SlowEdgeView, ...] = ()
    slow_edges: int = 0


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """One finished round. ``bytes`` over all edges; ``wire_gb_per_s`` in 10^9 bytes per second, 0 if nothing moved.

    ``pause_ms``: until the last engine was paused; ``stall_ms``: the longest that one of them took no step;
    ``switch_ms``: the longest switch of an engine that served meanwhile; ``skew_ms``: from the first engine that served
    the version to the last; ``verify_ms``: from the last closed writer to the last digest; ``total_ms``: the whole
    round. ``fault``: which side has to mend ``reason``: trainer, engine, daemon, network or config; of a round that was
    committed, ``reason`` is why engines were ``left_out``. ``kind``: publish, catch-up or rollback. ``modes``: how each
    engine landed; ``stalls_ms``: of each that served on, how long it took no step. ``lenders``: engine to the engine
    that it got its bytes from, of those that the trainer did not write to; ``trainer_bytes``: what left the trainer.
    """

    round: str
    step: int
    generation: int
    attempt: int
    outcome: str
    engines: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    bytes: int = 0
    descriptors: int = 0
    wire_gb_per_s: float = 0.0
    pause_ms: float = 0.0
    stall_ms: float = 0.0
    verify_ms: float = 0.0
    total_ms: float = 0.0
    switch_ms: float = 0.0
    skew_ms: float = 0.0
    times_ms: dict[str, float] = {}
    reason: str = ""
    fault: str = ""
    unix_time: float = 0.0
    kind: str = "publish"
    modes: dict[str, str] = {}
    stalls_ms: dict[str, float] = {}
    lenders: dict[str, str] = {}
    trainer_bytes: int = 0
    links: tuple[LinkView, ...] = ()

    @property
    def stood_ms(self) -> float:
        """The longest that an engine took no step: paused, or to switch."""
        return max(self.stall_ms, self.switch_ms)

    @property
    def why(self) -> tuple[str, ...]:
        """Sentences: why it failed, and which engines it went on without, as far as is known why."""
        known = self.outcome == "committed" and self.reason
        failed = () if known or not self.reason else (f"{self.fault}: {self.reason}" if self.fault else self.reason,)
        more = f" and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
        without = self.reason if known else ", ".join(self.left_out[:SHOWN]) + more
        return (*failed, f"left out: {without}") if self.left_out else failed

    def fields(self) -> dict[str, Any]:
        """Name to value, for a log line."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in _LONG}


_LONG: Final = ("times_ms", "unix_time", "modes", "stalls_ms", "lenders", "links")
"""Fields of a RoundRow that a log line does without."""


class ProblemView(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong: ``critical`` (nobody is served, or memory is torn) or ``degraded``.

    ``about``: the engines that it is about, the first of ``count``. ``since`` in unix time, 0 where nobody knows.
    """

    severity: Literal["critical", "degraded"]
    what: str
    fix: str = ""
    about: tuple[str, ...] = ()
    count: int = 0
    since: float = 0.0


class FindingView(msgspec.Struct, frozen=True, kw_only=True):
    """Something wrong, or worth knowing, around agents' processes, as they have found it themselves.

    ``level``: error, warning or note; ``check``: what was looked at; ``members``: the first of ``count`` that say so.
    """

    level: Level
    check: str
    what: str
    fix: str
    members: tuple[str, ...]
    count: int


class WaitingView(msgspec.Struct, frozen=True, kw_only=True):
    """A version that was staged and that no round has begun for, and what it waits for."""

    version: VersionView
    waits_for: str
    since: float


class VerbView(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to an operator's verb: what happens now. It is durable when this is told."""

    verb: str
    target: str
    says: str
    schema: int = VIEW_SCHEMA


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon at a glance. ``state`` is one sentence: what it does and why. ``problems``: all that is wrong, worst
    first. ``holds``: engines that the operator holds, and who said why; ``maintenance``: likewise, empty when off.

    ``source``: "daemon", or "journal" when the daemon was down and only the journal spoke. ``unneeded``: tensors that
    the trainer has and no engine needs, as far as the present plan knows. ``findings``: worst first; errors and
    warnings are among the problems, too.
    """

    run: str
    state: str
    release: str = ""
    epoch: int = 0
    journal_id: str = ""
    source: Literal["daemon", "journal"] = "daemon"
    unix_time: float = 0.0
    started: float = 0.0
    committed: VersionView | None = None
    engines: tuple[EngineView, ...] = ()
    trainers: tuple[TrainerView, ...] = ()
    round: ProgressView | None = None
    rounds: tuple[RoundRow, ...] = ()
    problems: tuple[ProblemView, ...] = ()
    waiting: tuple[WaitingView, ...] = ()
    holds: dict[str, str] = {}
    drains: dict[str, str] = {}
    """Engines that are drained, and why."""
    maintenance: str = ""
    unneeded: tuple[str, ...] = ()
    findings: tuple[FindingView, ...] = ()
    schema: int = VIEW_SCHEMA


class RoundsView(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/rounds``: oldest first."""

    run: str
    rounds: tuple[RoundRow, ...]
    source: Literal["daemon", "journal"] = "daemon"
    schema: int = VIEW_SCHEMA


class PartyView(msgspec.Struct, frozen=True, kw_only=True):
    """One side of the plan: who it is, as ``Member`` prints it and in parts, and the layout that it announced."""

    name: str
    member: Member
    incarnation: int
    layout: Layout


class LayoutsView(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/plan/layouts``: what the current plan was made from; ``root`` is its fingerprint.

    ``gb_per_s``: the most that an end of each kind of link has carried in this fleet, in 10^9 bytes per second.
    """

    run: str
    root: str
    parties: tuple[PartyView, ...]
    gb_per_s: dict[str, float] = {}
    schema: int = VIEW_SCHEMA


def round_row(record: RoundEnded, unix_time: float) -> RoundRow:
    """The row of a journal record."""
    times = {name: round(seconds * 1e3, 3) for name, seconds in record.times.items()}
    wire = record.times.get("wire", 0.0)
    return RoundRow(
        round=str(record.round),
        step=record.version.step,
        generation=record.version.generation,
        attempt=record.attempt,
        outcome=record.outcome,
        engines=record.engines,
        left_out=record.left_out,
        bytes=record.bytes,
        descriptors=record.descriptors,
        wire_gb_per_s=round(record.bytes / wire / 1e9, 3) if wire > 0 else 0.0,
        pause_ms=times.get("pausing", 0.0),
        stall_ms=times.get("stall", 0.0),
        verify_ms=times.get("verifying", 0.0),
        total_ms=times.get("total", 0.0),
        switch_ms=times.get("switch", 0.0),
        skew_ms=times.get("skew", 0.0),
        times_ms=times,
        reason=record.reason,
        fault=record.fault,
        unix_time=unix_time,
        kind=record.kind,
        modes=dict(record.modes),
        stalls_ms={name: round(seconds * 1e3, 3) for name, seconds in record.stall_seconds.items()},
        lenders=dict(record.lenders),
        trainer_bytes=record.trainer_bytes,
        links=tuple(_link_view(link, use) for link, use in record.links.items()),
    )


def _link_view(link: str, use: LinkUse) -> LinkView:
    return LinkView(
        link=link,
        edges=use.edges,
        bytes=use.bytes,
        gb_per_s=round(use.bytes / use.seconds / 1e9, 3) if use.seconds > 0 else 0.0,
        ways=use.ways,
        slow=tuple(
            SlowEdgeView(edge=slow.edge, by=slow.by, gb_per_s=slow.gb_per_s, link_gb_per_s=slow.link_gb_per_s)
            for slow in use.slow
        ),
        slow_edges=use.slow_edges,
    )
