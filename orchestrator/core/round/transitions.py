"""The one transition table: what a round does when something happens, phase by phase.

    PAUSING → QUIESCING → MARKING → EXPOSING → WRITING → VERIFYING → DECIDING → SWITCHING → RECORDING

Up to the decision the round's engines go through the phases together, because a version is committed on all of them or
on none. Whoever is to blame is left out, the others go on, as long as there are enough of them; too few, or a trainer
that fails, and the round is given up. Given up before a grant, nothing was written, and the engines go on with what
they had; after a grant they are torn: they stay paused until a later round repairs them. After DECIDING it only goes
forward, each engine by itself: one that fails is no longer waited for.

A shadow engine (one that lands in ``copy`` or ``flip``) is done with PAUSING and QUIESCING at once, serves through all
phases up to SWITCHING, and is never torn by what was granted. A rollback begins with DECIDING.

Whatever agents and engines may say at a wrong time has an entry in every phase, so that no peer can end the daemon: a
word out of turn costs its connection or its engine's place, a word said twice counts once.
"""

from enum import Enum, StrEnum
from typing import Final


class Phase(StrEnum):
    """Where a round stands; the comment says what it waits for."""

    PAUSING = "pausing"  # the pause of every engine that may not serve meanwhile
    QUIESCING = "quiescing"  # every worker that lands live inside the update call, idle; every writer connected
    MARKING = "marking"  # LIVE_DIRTY durable
    EXPOSING = "exposing"  # every worker, told with the marking, knows that it may be written to; writers as above
    WRITING = "writing"  # CLOSED from every writer towards every worker
    VERIFYING = "verifying"  # digests of every worker, of live memory or of its standby
    DECIDING = "deciding"  # DECIDED durable
    SWITCHING = "switching"  # every engine: switched, or out of the update call and told the version; resumed
    RECORDING = "recording"  # COMMITTED durable


class Report(StrEnum):
    """What the round sees of an event."""

    PAUSED = "paused"
    QUIESCED = "quiesced"
    EXPOSED = "exposed"
    DURABLE = "durable"
    CLOSED = "closed"
    VERIFIED = "verified"
    LEFT = "left"
    UPDATE_OVER = "update over"
    SWITCHED = "switched"
    FINISHED = "finished"
    RESUMED = "resumed"
    CALL_FAILED = "call failed"
    WRITER_GONE = "writer gone"  # for longer than a reconnect takes, or another process in its place
    RANK_GONE = "rank gone"
    DEADLINE = "deadline"
    IMPATIENCE = "impatience"  # engines that are done have waited for the others as long as they may


class Action(Enum):
    """What is done about it; the names of functions in ``reports``."""

    note = "note"  # judge it; the phase may be complete
    leave_out = "leave_out"  # go on without that engine
    leave_out_late = "leave_out_late"  # go on without the engines that did not get there in time
    give_up = "give_up"  # end the round as failed
    drop = "drop"  # end the connection of an agent that contradicts the protocol
    ignore = "ignore"  # late or already accounted for


_P, _R, _A = Phase, Report, Action

_BEFORE_WRITING: Final = {
    _R.PAUSED: _A.ignore, _R.SWITCHED: _A.ignore, _R.QUIESCED: _A.drop, _R.EXPOSED: _A.drop, _R.CLOSED: _A.drop,
    _R.VERIFIED: _A.drop, _R.LEFT: _A.leave_out, _R.UPDATE_OVER: _A.leave_out, _R.CALL_FAILED: _A.leave_out,
    _R.WRITER_GONE: _A.give_up, _R.RANK_GONE: _A.leave_out, _R.DEADLINE: _A.leave_out_late,
    _R.IMPATIENCE: _A.leave_out_late,
}  # fmt: skip
_WRITTEN: Final = {
    # A call that fails while its workers are inside says nothing: they themselves say what they hold.
    _R.PAUSED: _A.ignore, _R.SWITCHED: _A.ignore, _R.QUIESCED: _A.ignore, _R.EXPOSED: _A.ignore, _R.CLOSED: _A.ignore,
    _R.LEFT: _A.leave_out, _R.UPDATE_OVER: _A.note, _R.CALL_FAILED: _A.note, _R.RANK_GONE: _A.leave_out,
    _R.DEADLINE: _A.leave_out_late, _R.IMPATIENCE: _A.leave_out_late,
}  # fmt: skip
_FORWARD: Final = {
    _R.PAUSED: _A.ignore, _R.SWITCHED: _A.ignore, _R.QUIESCED: _A.ignore, _R.EXPOSED: _A.ignore,
    _R.CLOSED: _A.ignore, _R.VERIFIED: _A.ignore, _R.LEFT: _A.ignore, _R.UPDATE_OVER: _A.note,
    _R.FINISHED: _A.ignore, _R.RESUMED: _A.ignore, _R.CALL_FAILED: _A.note, _R.WRITER_GONE: _A.ignore,
    _R.RANK_GONE: _A.ignore, _R.DEADLINE: _A.ignore, _R.IMPATIENCE: _A.ignore,
}  # fmt: skip

TABLE: Final[dict[Phase, dict[Report, Action]]] = {
    _P.PAUSING: {**_BEFORE_WRITING, _R.PAUSED: _A.note},
    _P.QUIESCING: {**_BEFORE_WRITING, _R.QUIESCED: _A.note},
    _P.MARKING: {
        **_BEFORE_WRITING,
        _R.QUIESCED: _A.ignore,
        _R.EXPOSED: _A.note,
        _R.DURABLE: _A.note,
        _R.DEADLINE: _A.give_up,  # no engine is late, the disk is
        _R.IMPATIENCE: _A.ignore,
    },
    _P.EXPOSING: {**_BEFORE_WRITING, _R.QUIESCED: _A.ignore, _R.EXPOSED: _A.note},
    _P.WRITING: {**_WRITTEN, _R.CLOSED: _A.note, _R.VERIFIED: _A.drop, _R.WRITER_GONE: _A.give_up},
    _P.VERIFYING: {**_WRITTEN, _R.VERIFIED: _A.note, _R.WRITER_GONE: _A.ignore},
    _P.DECIDING: {**_FORWARD, _R.DURABLE: _A.note, _R.LEFT: _A.leave_out},
    _P.SWITCHING: {
        **_FORWARD,
        _R.LEFT: _A.note,
        _R.PAUSED: _A.note,
        _R.SWITCHED: _A.note,
        _R.FINISHED: _A.note,
        _R.RESUMED: _A.note,
        _R.CALL_FAILED: _A.leave_out,  # not of one that has had its effect, which ``reports`` takes for its end
        _R.DEADLINE: _A.leave_out_late,
        _R.IMPATIENCE: _A.leave_out_late,
    },
    _P.RECORDING: {**_FORWARD, _R.DURABLE: _A.note},
}
