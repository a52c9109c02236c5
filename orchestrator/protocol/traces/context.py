"""W3C trace contexts of versions and of what is done for them, and spans.

Ids are hashes of names, so that all ranks of a trainer are in one trace of a version without having to agree on it, and
whoever knows what somebody else does knows the span of it. A context is a ``traceparent``
(https://www.w3.org/TR/trace-context/#traceparent-header); empty where there is none.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Protocol

import msgspec
from weightsync.orchestrator.protocol.names import Version

TraceContext = Annotated[str, msgspec.Meta(max_length=55)]
"""As a peer says it; one that is none is worth as much as an empty one."""

_CONTEXT: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]")

_SAMPLED: Final = "01"

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Span:
    """Something that was done, from ``start`` to ``end`` in unix nanoseconds.

    ``context`` is its own, ``parent`` that of what it was done for; ``error``: why it failed.
    """

    name: str
    context: str
    parent: str
    start: int
    end: int
    attributes: Mapping[str, Value] = field(default_factory=dict)
    error: str = ""


class SpanSink(Protocol):
    """Where spans go."""

    def __call__(self, span: Span) -> None:
        """Take it, from any thread, without waiting."""

    def close(self) -> None:
        """Send what is left; this may take seconds. Later spans are lost."""


def of_version(run_id: str, version: Version, restaged: int = 0) -> str:
    """The context of a version's publish by the first rank, which is the root of its trace.

    ``restaged``: how often it was staged before; each time is a trace of its own.
    """
    digest = _hash(f"{run_id}\n{version.generation}\n{version.step}\n{restaged}")
    return f"00-{digest[:32]}-{digest[32:48]}-{_SAMPLED}"


def of_rank(root: str, rank: int) -> str:
    """The context of the publish by one of the ranks."""
    return child(root, f"rank {rank}") if rank else root


def is_context(said: str) -> bool:
    """Whether it is one."""
    return _CONTEXT.fullmatch(said) is not None


def child(parent: str, name: str) -> str:
    """The context of what ``name`` names, among all that is done for ``parent``; empty without one."""
    if not is_context(parent):
        return ""
    return f"{parent[:36]}{_hash(f'{parent} {name}')[:16]}{parent[52:]}"


def ids(context: str) -> tuple[int, int]:
    """Numbers of the trace and of the span."""
    return int(context[3:35], 16), int(context[36:52], 16)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
