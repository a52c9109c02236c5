"""The one transition table: what a round does when something happens, phase by phase.

    PAUSING → QUIESCING → MARKING → WRITING → VERIFYING → DECIDING → APPLYING → FINISHING → RESUMING → RECORDING
       └──────────┴──────────┴→ CANCELLING     └→ TEARING ←┘ └→ TEARING

Before a grant (left of WRITING) nothing was written and the engines resume with what they had. From WRITING to the
decision a failure tears: the engines stay paused until every writer is CLOSED and a later round repairs them. After
DECIDING it only goes forward: an engine that fails is evicted, the others go on.

Whatever agents and engines may say at a wrong time has an entry in every phase, so that no peer can end the daemon: out
of turn it costs the round, said twice it counts once.
"""

from enum import Enum, StrEnum
from typing import Final


class Phase(StrEnum):
    """Where a round stands; the comment says what it waits for."""

    PAUSING = "pausing"  # every engine's /pause
    QUIESCING = "quiescing"  # every worker inside the update call, its device idle
    MARKING = "marking"  # LIVE_DIRTY durable
    WRITING = "writing"  # CLOSED from every writer
    VERIFYING = "verifying"  # live digests of every worker
    DECIDING = "deciding"  # DECIDED durable
    APPLYING = "applying"  # every worker out of the update call, as committed
    FINISHING = "finishing"  # every engine's answer that it knows the version
    RESUMING = "resuming"  # every engine's /resume
    RECORDING = "recording"  # COMMITTED durable
    CANCELLING = "cancelling"  # workers out of the update call, engines resumed with what they had
    TEARING = "tearing"  # CLOSED from every writer; then workers out of the update call, engines kept paused


class Report(StrEnum):
    """What the round sees of an event."""

    PAUSED = "paused"
    QUIESCED = "quiesced"
    DURABLE = "durable"
    CLOSED = "closed"
    VERIFIED = "verified"
    LEFT = "left"
    UPDATE_OVER = "update over"
    FINISHED = "finished"
    RESUMED = "resumed"
    CALL_FAILED = "call failed"
    WRITER_LOST = "writer lost"
    RANK_LOST = "rank lost"
    DEADLINE = "deadline"


class Action(Enum):
    """What is done about it; the names of functions in ``reports``."""

    note = "note"  # judge it; the phase may be complete
    cancel = "cancel"  # give up before anything was written
    tear = "tear"  # give up after something may have been written
    evict = "evict"  # go on without that engine
    evict_missing = "evict_missing"  # go on without the engines that did not get there in time
    give_up = "give_up"  # end the round as failed with what is known
    ignore = "ignore"  # late or already accounted for


_P, _R, _A = Phase, Report, Action

_BEFORE_WRITING: Final = {
    _R.PAUSED: _A.note, _R.QUIESCED: _A.cancel, _R.CLOSED: _A.cancel, _R.VERIFIED: _A.cancel, _R.LEFT: _A.cancel,
    _R.UPDATE_OVER: _A.cancel, _R.CALL_FAILED: _A.cancel, _R.WRITER_LOST: _A.cancel, _R.RANK_LOST: _A.cancel,
    _R.DEADLINE: _A.cancel,
}  # fmt: skip
_WRITTEN: Final = {
    _R.QUIESCED: _A.ignore, _R.CLOSED: _A.note, _R.VERIFIED: _A.tear, _R.LEFT: _A.tear, _R.UPDATE_OVER: _A.note,
    _R.CALL_FAILED: _A.note, _R.RANK_LOST: _A.tear, _R.DEADLINE: _A.tear,
}  # fmt: skip
_FORWARD: Final = {
    _R.QUIESCED: _A.ignore, _R.CLOSED: _A.ignore, _R.VERIFIED: _A.ignore, _R.LEFT: _A.note, _R.UPDATE_OVER: _A.note,
    _R.FINISHED: _A.note, _R.RESUMED: _A.note, _R.CALL_FAILED: _A.evict, _R.WRITER_LOST: _A.ignore,
    _R.RANK_LOST: _A.evict, _R.DEADLINE: _A.evict_missing,
}  # fmt: skip
_BACKWARD: Final = {
    _R.PAUSED: _A.ignore, _R.QUIESCED: _A.ignore, _R.CLOSED: _A.note, _R.VERIFIED: _A.ignore, _R.LEFT: _A.note,
    _R.UPDATE_OVER: _A.note, _R.FINISHED: _A.ignore, _R.RESUMED: _A.note, _R.CALL_FAILED: _A.note,
    _R.WRITER_LOST: _A.note, _R.RANK_LOST: _A.note, _R.DEADLINE: _A.give_up, _R.DURABLE: _A.ignore,
}  # fmt: skip

TABLE: Final[dict[Phase, dict[Report, Action]]] = {
    _P.PAUSING: _BEFORE_WRITING,
    _P.QUIESCING: {**_BEFORE_WRITING, _R.QUIESCED: _A.note},
    _P.MARKING: {**_BEFORE_WRITING, _R.QUIESCED: _A.ignore, _R.DURABLE: _A.note},
    _P.WRITING: {**_WRITTEN, _R.WRITER_LOST: _A.tear},
    _P.VERIFYING: {**_WRITTEN, _R.CLOSED: _A.ignore, _R.VERIFIED: _A.note, _R.WRITER_LOST: _A.ignore},
    _P.DECIDING: {
        **_FORWARD,
        _R.DURABLE: _A.note,
        _R.LEFT: _A.evict,
        _R.CALL_FAILED: _A.note,
        _R.DEADLINE: _A.ignore,  # no engine is late, the disk is
    },
    _P.APPLYING: {**_FORWARD, _R.CALL_FAILED: _A.note},
    _P.FINISHING: _FORWARD,
    _P.RESUMING: _FORWARD,
    _P.RECORDING: {
        **_FORWARD,
        _R.DURABLE: _A.note,
        _R.CALL_FAILED: _A.ignore,
        _R.RANK_LOST: _A.ignore,
        _R.DEADLINE: _A.ignore,
    },
    _P.CANCELLING: _BACKWARD,
    _P.TEARING: _BACKWARD,
}
