"""Every message between the daemon and its agents, as tagged msgspec structs (schema version in ``limits``).

Each number, list and text has a bound, which decoding holds it to. Free text is cut and cleaned by the struct itself.
``FromAgent`` and ``FromDaemon``, at the end, list them.
"""

from typing import Annotated, Literal

import msgspec
from weightsync.orchestrator.protocol.edges import EdgeFailure, Peer, PeerTransfer
from weightsync.orchestrator.protocol.edges import FilesystemSettings as FilesystemSettings
from weightsync.orchestrator.protocol.edges import HubRendezvous as HubRendezvous
from weightsync.orchestrator.protocol.edges import NixlSettings as NixlSettings
from weightsync.orchestrator.protocol.edges import TcpStoreRendezvous as TcpStoreRendezvous
from weightsync.orchestrator.protocol.fields import Count, Endpoint, Name, Nonce, Path, Reason, Seconds, Spoken, World
from weightsync.orchestrator.protocol.findings import Finding, in_short
from weightsync.orchestrator.protocol.layout import Layout, Quantized, Tensor
from weightsync.orchestrator.protocol.limits import MAX_FINDINGS, MAX_OPEN_GRANTS, MAX_SECONDS, MAX_TENSORS, MAX_WORLD
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName, Version
from weightsync.orchestrator.protocol.traces.context import TraceContext

Members = Annotated[tuple[Member, ...], msgspec.Meta(max_length=MAX_WORLD)]
OpenRounds = Annotated[tuple[RoundName, ...], msgspec.Meta(max_length=MAX_OPEN_GRANTS)]
Fault = Literal["", "trainer", "engine", "daemon", "network", "config"]


class Message(Spoken, frozen=True, tag=True, kw_only=True):
    """Base of all messages; the tag is the class name."""


# ---------------------------------------------------------------------------------------------- agent to daemon
class TrainerStatus(msgspec.Struct, frozen=True):
    """What a trainer rank's memory holds: the version staged in its slots, the one that it is ``converting`` into
    them, and the grants it has not closed.

    ``open_rounds``: of grants without their final Closed, oldest first; one with a peer that hangs outlives its round.
    ``restaged``: as in Staged. ``follows_needs``: its slots are made from the engines' Needs; it announces no layout
    before it has been told them."""

    staged: Version | None = None
    open_rounds: OpenRounds = ()
    restaged: Count = 0
    follows_needs: bool = False
    converting: Version | None = None


class EngineStatus(msgspec.Struct, frozen=True):
    """What an inference rank's memory holds.

    ``applied``: the last version committed here, None for checkpoint weights. ``window``: the round whose update
    call is blocking the worker now. ``torn``: live memory may hold anything but ``applied``; the worker refuses to run.
    ``held``: the daemon said Hold; the worker refuses to be resumed until it is told otherwise.
    ``standby``: a whole version beside live memory, with the digest that was told of it when it was verified: one that
    landed and is not switched to, or, in ``flip``, the one before. ``torn`` does not concern it.
    ``lending``: in Hello, the grants by which it lends what it serves and that it has not closed."""

    applied: Version | None = None
    window: RoundName | None = None
    torn: bool = False
    held: bool = False
    standby: Version | None = None
    standby_digest: Digest = NO_BYTES
    lending: OpenRounds = ()

    @property
    def whole(self) -> Version | None:
        """The version that may be computed with: live memory is all of it, and no round changes that now."""
        return None if self.torn or self.window is not None else self.applied


class Announce(Message, frozen=True, kw_only=True):
    """Rendezvous round 1: the layout, and how the transport reaches this agent; ``lends``: and how an inference rank
    writes what it serves to others, if it can. ``spares``: how often it can still put other memory in the place of its
    landing. Fewer than before: it has, and nothing reaches it that could reach the one before."""

    layout: Layout
    endpoint_name: Name = ""
    endpoint: Endpoint = b""
    lends_name: Name = ""
    lends: Endpoint = b""
    spares: Count = 0


class Ready(Message, frozen=True, kw_only=True):
    """Rendezvous round 2: the tables hash to ``fingerprint``, and every edge is warm but those that ``failed``.

    Said again whenever ``failed`` changes: a dead edge is tried again for as long as the plan stands.
    """

    fingerprint: Name
    failed: Annotated[tuple[EdgeFailure, ...], msgspec.Meta(max_length=MAX_WORLD)] = ()


class Converting(Message, frozen=True, kw_only=True):
    """This rank fills its slots with ``version``, which all ranks publish and which never FAILED, and lets what is
    filled be written; None: it has given that up."""

    version: Version | None


class Staged(Message, frozen=True, kw_only=True):
    """All of this rank's slots hold ``version``, synchronised and digested.

    ``restaged``: how often the version was staged before; each time it FAILED. ``trace``: of this rank's publish.
    """

    version: Version
    bytes: Count
    convert_seconds: Seconds
    digest_seconds: Seconds
    restaged: Count = 0
    trace: TraceContext = ""


class Quiesced(Message, frozen=True, kw_only=True):
    """The worker's main thread is inside the update call of ``round`` and its device is idle."""

    round: RoundName


class Exposed(Message, frozen=True, kw_only=True):
    """The answer to Expose: from here on writers may reach this worker's memory.

    In ``live`` it counts as torn until Commit; in ``copy`` and ``flip`` its standby is forgotten."""

    round: RoundName


class Closed(Message, frozen=True, kw_only=True):
    """The grant is over towards ``peers``: every handle to them has ended and none will be posted.

    A writer may say it several times, each time with all peers that it is done with. ``final``: it is done with every
    peer, those that it does not name included, and nothing is written after it. With ``error``: nothing more was
    posted, ``fault`` says whose fault that is, ``retry`` whether another attempt at this version may succeed."""

    round: RoundName
    peers: Annotated[tuple[PeerTransfer, ...], msgspec.Meta(max_length=MAX_WORLD)] = ()
    final: bool = True
    error: Reason = ""
    fault: Fault = ""
    retry: bool = True
    spoken = ("error",)


class Verified(Message, frozen=True, kw_only=True):
    """Digest over this rank's whole layout of what has arrived.

    In ``live`` of live memory, taken after scatter and refresh of derived tensors; else of its standby.
    With ``error`` there is none: ``fault`` says whose it is, ``retry`` whether another attempt may succeed."""

    round: RoundName
    digest: Digest
    bytes: Count
    apply_seconds: Seconds
    digest_seconds: Seconds
    error: Reason = ""
    fault: Fault = ""
    retry: bool = True
    spoken = ("error",)


class Left(Message, frozen=True, kw_only=True):
    """The round has ended in this worker; its status is now ``status``.

    In ``live`` the update call has. In ``copy`` and ``flip`` it has switched, and its live memory was looked at since:
    it is what was told of the standby; or it has dropped what had landed. When it ended by itself, before Commit, Abort
    or a switch: ``fault`` says why, ``retry`` whether another attempt may succeed.
    ``switch_seconds``: how long the switch kept its main thread. ``audit_seconds``: of that look, beside serving."""

    round: RoundName
    status: EngineStatus
    fault: Fault = ""
    retry: bool = True
    switch_seconds: Seconds = 0.0
    audit_seconds: Seconds = 0.0


class Holding(Message, frozen=True, kw_only=True):
    """This worker's status now: the answer to Hold, and what it says by itself when that changes between rounds."""

    status: EngineStatus


class Hello(Message, frozen=True, kw_only=True):
    """First frame of a connection.

    ``epoch_seen``, ``journal_id`` and ``life_seen`` are the last daemon's that this agent obeyed. ``boot``: of the
    host, drawn anew by its kernel at each start. ``release``: of this project, in that process.
    After Welcome the agent repeats its words of its last round (Quiesced, Closed, Verified, Left), since the connection
    before may have lost them."""

    schema: Count
    run_id: Name
    member: Member
    world: World
    incarnation: Nonce
    generation: Nonce = 0
    epoch_seen: Count = 0
    journal_id: Name = ""
    life_seen: Name = ""
    host: Name = ""
    boot: Name = ""
    pid: Count = 0
    release: Name = ""
    trainer: TrainerStatus | None = None
    engine: EngineStatus | None = None


class Examined(Message, frozen=True, kw_only=True):
    """What is wrong around this agent's process (its variables, limits, ports, clock), worst first. Said after each
    Welcome of a new connection, as soon as it has been looked at, if there is anything. Cut again where it comes in."""

    findings: Annotated[tuple[Finding, ...], msgspec.Meta(max_length=MAX_FINDINGS)]

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "findings", in_short(self.findings))


class Heartbeat(Message, frozen=True, kw_only=True):
    """Alive. Sent by both sides."""


class Bye(Message, frozen=True, kw_only=True):
    """An orderly end of the agent's process."""

    reason: Reason = ""
    spoken = ("reason",)


# ---------------------------------------------------------------------------------------------- daemon to agent
TransportSettings = NixlSettings | FilesystemSettings
"""Every transport's settings, told apart by their tags."""


class Welcome(Message, frozen=True, kw_only=True):
    """The daemon takes this agent in.

    Either side says Heartbeat every ``heartbeat_seconds``; one that has been silent for ``lost_after_heartbeats`` of
    them is taken for lost. ``rendezvous`` None: another Welcome on this connection will say how, once the group is
    known.
    """

    epoch: Count
    journal_id: Name
    heartbeat_seconds: Annotated[float, msgspec.Meta(gt=0, le=MAX_SECONDS)]
    lost_after_heartbeats: Annotated[int, msgspec.Meta(ge=1, le=100)]
    transport: TransportSettings
    rendezvous: HubRendezvous | TcpStoreRendezvous | None
    life: Name = ""
    """Nonce of this start of the daemon: of one epoch an agent obeys one life."""
    lease_seconds: Seconds = 0.0
    """A paused engine that holds a whole committed version, and was granted to nobody since, resumes by itself when it
    has not heard the daemon for so long; 0: never."""
    run_dir: Path = ""
    """The run directory, as the daemon's host names it; a trainer compares it with its own."""
    lends: bool = False
    """Inference ranks are to say how they can write what they serve to others."""


class Refused(Message, frozen=True, kw_only=True):
    """The daemon does not take this agent in. ``retry`` false: a restart with other settings is needed."""

    reason: Reason
    fault: Fault
    retry: bool
    spoken = ("reason",)


class Needs(Message, frozen=True, kw_only=True):
    """To the first trainer rank: the tensors that all attached engines together need, each in one way.

    ``quantized`` holds indices into ``tensors``. ``quantization``: the engines' name of their format, for people.
    ``fingerprint`` covers the rest; the same needs have the same one.
    """

    tensors: Annotated[tuple[Tensor, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    quantized: Annotated[tuple[Quantized, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    quantization: Name = ""
    fingerprint: Name


class Connect(Message, frozen=True, kw_only=True):
    """Rendezvous round 2: this agent's peers and its copies ``[n, COPY_COLUMNS]`` (see ``layout``).

    For a trainer rank the copies are its writes; for an inference rank only those that arrive packed, which it
    scatters. ``expected_bytes``: of the whole layout. ``fingerprint`` covers all of it. ``lends``: the copies are what
    an inference rank may be granted to write from the memory that it serves from; what it receives is another Connect.
    ``relays``: beside those. A rank that ``lends`` by it writes its standby, which has landed by the Connect of the
    fingerprint ``landed``; another rank is written to by it in rounds whose Expose says so.
    """

    fingerprint: Name
    root: Name
    peers: Annotated[tuple[Peer, ...], msgspec.Meta(max_length=MAX_WORLD)]
    copies: bytes
    expected_bytes: Count
    lends: bool = False
    relays: bool = False
    landed: Name = ""


class Expose(Message, frozen=True, kw_only=True):
    """To a quiesced worker, or a shadow one: once it says Exposed, writers may be granted its memory. One that never
    heard this knows that nobody was, whatever became of the daemon. ``relays``: by the Connect that ``relays``."""

    round: RoundName
    relays: bool = False


class Grant(Message, frozen=True, kw_only=True):
    """The right to write ``version`` once, until CLOSED. Only to ``members``: edges to others stay silent."""

    round: RoundName
    version: Version
    fingerprint: Name
    members: Members
    deadline_seconds: Seconds
    trace: TraceContext = ""


class Verify(Message, frozen=True, kw_only=True):
    """All writers are CLOSED: scatter, refresh derived tensors, digest live memory. In ``copy`` and ``flip``: digest
    what has landed, which is ``version`` in standby from then on; also as the round is given up, so that the next
    attempt finds it there."""

    round: RoundName
    version: Version
    deadline_seconds: Seconds
    trace: TraceContext = ""


class Commit(Message, frozen=True, kw_only=True):
    """``version`` is decided: leave the update call as successful. A worker that has left it as torn, after Verified,
    holds that version whole. Only in ``live``: the others are switched by a call to their engine."""

    round: RoundName
    version: Version
    trace: TraceContext = ""


class Abort(Message, frozen=True, kw_only=True):
    """To a worker: leave the update call as failed, or drop what has landed. To a writer: post nothing more.

    ``torn``: bytes may have been written into live memory; false also mends a worker that left this round as torn,
    since nobody was granted. ``members``: to a writer, the only edges that it is about; empty: all.
    """

    round: RoundName
    torn: bool
    reason: Reason
    members: Members = ()
    spoken = ("reason",)


class Hold(Message, frozen=True, kw_only=True):
    """To a worker: refuse that its paused engine is resumed (``held``), or refuse it no longer.
    Answered with Holding. A later Commit, or a switch, ends a hold, too."""

    held: bool
    reason: Reason = ""
    spoken = ("reason",)


class Renew(Message, frozen=True, kw_only=True):
    """To a worker in no round: bytes of a writer hang on their way to it. It is to be reached by another endpoint, and
    nothing sent to the one before may arrive any more; answered with Announce. ``spare``: the writer may share memory
    with it and wake up at any time, so a spare is to take the landing's place, too."""

    reason: Reason
    spare: bool = False
    spoken = ("reason",)


class Outcome(Message, frozen=True, kw_only=True):
    """To trainer ranks: how a version ended. ``sequence`` is the number of its commit, 0 for a failed one; ``restaged``
    is of which staging it is, see Staged."""

    version: Version
    committed: bool
    sequence: Count = 0
    reason: Reason = ""
    restaged: Count = 0
    spoken = ("reason",)


class Standing(Message, frozen=True, kw_only=True):
    """To the first trainer rank while a version of its waits: what the daemon does and why. Sent when it changes."""

    sentence: Reason
    spoken = ("sentence",)


RoundWord = Quiesced | Exposed | Closed | Verified | Left
"""What an agent says about a round."""

RoundOrder = Expose | Verify | Commit | Abort
"""What a worker is told about a round."""

FromAgent = Hello | Announce | Ready | Converting | Staged | RoundWord | Holding | Examined | Heartbeat | Bye
FromDaemon = Welcome | Refused | Needs | Connect | Grant | RoundOrder | Hold | Renew | Outcome | Standing | Heartbeat
