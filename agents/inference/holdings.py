"""What one worker's memory holds: one value that every thread of the worker may read, changed by few and as a whole."""

import threading

import msgspec
from weightsync.orchestrator.protocol.messages import EngineStatus
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Version


class Holdings:
    """``status`` is replaced, never changed, and only by who has the ``lock``; so any thread may read it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.status = EngineStatus()
        self.held_because = ""

    @property
    def may_run(self) -> bool:
        """Live memory holds one whole committed version."""
        return self.status.whole is not None

    def hold(self, held: bool, reason: str) -> EngineStatus:
        """Refuse that the engine is resumed, or refuse it no longer; the status then."""
        with self.lock:
            self.status = msgspec.structs.replace(self.status, held=held)
            self.held_because = reason if held else ""
            return self.status

    def committed(self, version: Version, standby: Version | None = None, digest: Digest = NO_BYTES) -> None:
        """``version`` is what live memory holds, whole; a hold has ended with it."""
        with self.lock:
            self.status = EngineStatus(applied=version, standby=standby, standby_digest=digest)
            self.held_because = ""

    def tear(self, torn: bool) -> None:
        """Live memory may hold anything, or ``torn`` false: it holds what ``applied`` says."""
        with self.lock:
            self.status = msgspec.structs.replace(self.status, torn=torn)

    def keep(self, standby: Version | None, digest: Digest = NO_BYTES) -> None:
        """``standby`` is whole beside live memory; None: nothing is."""
        with self.lock:
            self.status = msgspec.structs.replace(self.status, standby=standby, standby_digest=digest)
