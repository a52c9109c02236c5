"""What can go wrong with a call to an engine: whose fault it is, whether a retry helps, whether it may have arrived."""

from collections.abc import Sequence
from typing import ClassVar

from weightsync.orchestrator.core.errors import WeightsyncError
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.text import clean


class UnknownEngineKind(WeightsyncError):
    """The settings name a kind of engine that has no client here. The operator's fault."""

    fault: ClassVar[Fault] = "config"

    def __init__(self, engine: str, kind: str, known: Sequence[str]) -> None:
        self.engine, self.kind = engine, kind
        fix = f"set kind of this engine to one of: {', '.join(known)}"
        super().__init__(f"engine {engine}: unknown engine kind {kind!r}. Fix: {fix}")


class EngineError(WeightsyncError):
    """Base. ``sent``: the request may have reached the engine, so its effect is unknown until asked for.

    What the engine said is part of the text, which is therefore cleaned here, where it enters.
    """

    fault: ClassVar[Fault] = "engine"
    retry: bool = True

    def __init__(self, engine: str, call: str, what: str, *, sent: bool = True) -> None:
        self.engine, self.call, self.sent = engine, call, sent
        super().__init__(clean(f"engine {engine}: {call}: {what}"))


class EngineUnreachable(EngineError):
    """No connection, or it broke before the whole answer had come."""

    fault = "network"


class EngineTimeout(EngineError):
    """The call's total deadline passed, retries included."""

    def __init__(self, engine: str, call: str, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(engine, call, f"no whole answer within {seconds:g} s")


class EngineGarbled(EngineError):
    """A success by its status that is none by its body: something else answers in the engine's place."""

    def __init__(self, engine: str, call: str, excerpt: str) -> None:
        fix = "look what stands between the daemon and the engine, and set the engine's own url"
        super().__init__(engine, call, f"an answer that is not the engine's: {excerpt}. Fix: {fix}")


class EngineRefused(EngineError):
    """An answer that is no success. ``excerpt`` is the beginning of its body."""

    def __init__(self, engine: str, call: str, status: int, excerpt: str) -> None:
        self.status, self.excerpt = status, excerpt
        self.retry = status >= 500 or status == 429
        super().__init__(engine, call, f"answered {status}: {excerpt}" if excerpt else f"answered {status}")


class EngineNotServable(EngineRefused):
    """Our plugin keeps the engine paused: a rank is torn, or holds no committed version yet. A round must mend it."""

    def __init__(self, engine: str, call: str, status: int, excerpt: str) -> None:
        super().__init__(engine, call, status, excerpt)
        self.retry = False


class EngineMisconfigured(EngineError):
    """The server was started without something that we need, or cannot do what is asked. ``fix``: what to change."""

    fault = "config"
    retry = False

    def __init__(self, engine: str, call: str, what: str, fix: str) -> None:
        self.fix = fix
        super().__init__(engine, call, f"{what}. Fix: {fix}")
