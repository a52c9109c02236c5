"""Which transport serves which settings, and the ends that a process has opened."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from weightsync.agents.errors import AgentError
from weightsync.agents.transport.filesystem import FilesystemReceiver, FilesystemSender
from weightsync.agents.transport.interface import Receiver, Sender, SourceMemory, TargetMemory
from weightsync.agents.transport.nixl.receiver import NixlReceiver
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.shares import Shares
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings

EndT = TypeVar("EndT", Sender, Receiver)


@dataclass(frozen=True, slots=True)
class Transport:
    """How the two ends of a transport are made."""

    sender: Callable[[SourceMemory], Sender]
    receiver: Callable[[TargetMemory], Receiver]


TRANSPORTS: Final[dict[type[Any], Transport]] = {
    NixlSettings: Transport(NixlSender, NixlReceiver),
    FilesystemSettings: Transport(FilesystemSender, FilesystemReceiver),
}
"""By the type of ``Welcome.transport``; on the wire that is the settings' tag."""


class UnknownTransport(AgentError):
    """No transport is registered for the settings of a Welcome. The daemon is newer than this agent."""


def transport_of(settings: Any) -> Transport:
    """The transport that ``settings`` ask for.

    Raises:
        UnknownTransport: there is none.
    """
    try:
        return TRANSPORTS[type(settings)]
    except KeyError:
        known = ", ".join(sorted(kind.__name__ for kind in TRANSPORTS))
        raise UnknownTransport(f"no transport for {settings!r}; this agent has those of {known}") from None


class Ends(Generic[EndT]):
    """The ends of one kind that this process has opened, one for each transport; ``current`` is the last Welcome's.

    An end is kept when another daemon chooses another transport: a late writer may still reach its memory, and the
    first transport may come back.

    Args:
        make: an end of the given transport, not open.
    """

    def __init__(self, make: Callable[[Transport], EndT]) -> None:
        self._make: Callable[[Transport], EndT] = make
        self._ends: dict[type[Any], EndT] = {}
        self._current: EndT | None = None

    def open(self, settings: Any) -> None:
        """Open the end that ``settings`` ask for and make it the current one.

        Raises:
            UnknownTransport: there is none.
            AgentError: it cannot be opened.
        """
        end = self._ends.get(type(settings)) or self._make(transport_of(settings))
        end.open(settings)
        self._ends[type(settings)] = self._current = end

    @property
    def current(self) -> EndT:
        """The end in use. Only called after a Welcome."""
        assert self._current is not None, "no Welcome has said which transport is used"
        return self._current

    def __iter__(self) -> Iterator[EndT]:
        return iter(tuple(self._ends.values()))


def ends_of(memory: SourceMemory | None) -> tuple[Shares, Ends[Sender]]:
    """The shares and the transports' ends of these slots; of none, as long as there are none."""
    if memory is None:
        return Shares(Layout((), (), b""), ()), Ends(_no_sender)
    return Shares(memory.layout, memory.arenas), Ends(lambda transport: transport.sender(memory))


def _no_sender(transport: Transport) -> Sender:
    raise AssertionError("a transport is opened when there are slots")
