"""What an engine and its agent ask of each other, whichever engine it is.

The engine calls a ``WeightHolder`` with an ``InitInfo`` when the daemon introduces itself and with an ``UpdateInfo``
for each round; both arrive as the body of a call to the engine. The agent reaches the weights through a ``LiveModel``.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import msgspec
import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.inference.place import TOKEN_VARIABLE, VARIABLES, PlaceError, is_loopback, place_of
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.limits import MAX_WORLD
from weightsync.orchestrator.protocol.messages import EngineStatus
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.protocol.text import clean

T = TypeVar("T")
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class InfoError(AgentError, ValueError):
    """``init_info`` or ``update_info`` is not what this version of weightsync understands. The caller's fault.

    A ValueError too, as engines expect of a body that they cannot read.
    """


class InitInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the agent of each worker reaches its daemon.

    ``engine`` is the name of this server in the fleet, ``world`` its number of ranks over all data-parallel replicas,
    which is all that the call alone says: the rest is in the server's own environment (``place``).
    """

    hub_url: Text
    token_file: Text
    run_id: Text
    engine: Text
    world: Annotated[int, msgspec.Meta(ge=1)]


class UpdateInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One round in this engine.

    ``token`` names the call in logs; the round makes it idempotent; ``generation`` and ``step`` name the version. The
    call returns within ``deadline_seconds``. ``exposes``: the daemon says Expose before it grants any writer; without
    it, Quiesced lets writers be granted.
    """

    token: Text
    round_epoch: Natural
    round_number: Natural
    generation: Natural
    step: Natural
    deadline_seconds: Seconds
    exposes: bool = False


Cache = Literal["keep", "drop", "recompute"]
"""What becomes of keys and values that the old weights computed: all stay; running requests go on with theirs and
nobody else finds them; all are dropped, and running requests compute theirs again."""


class SwitchInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What waits in standby becomes what is served, in one call of the engine between two steps.

    ``round`` makes the call idempotent. ``incarnations``: rank → process that is meant, of at least the ranks that are
    asked. A rank answers within ``deadline_seconds``.
    """

    round: RoundName
    version: Version
    incarnations: Annotated[dict[int, int], msgspec.Meta(min_length=1, max_length=MAX_WORLD)]
    cache: Cache
    deadline_seconds: Seconds


class Ranks(Protocol):
    """A worker's place in its engine: ``rank`` of ``world``, counted from 0 over all data-parallel replicas."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def with_world(self, world: int) -> Self:
        """The same place in an engine of ``world`` ranks, for engines whose workers are not told how many they are."""


class LiveModel(Protocol):
    """The weights that an engine's worker computes with.

    ``tensors`` are uint8 views of the layout's regions, in their order. They never move: what is at these addresses is
    what the engine reads.
    """

    @property
    def layout(self) -> Layout: ...

    @property
    def tensors(self) -> Sequence[torch.Tensor]: ...

    def check(self) -> None:
        """Whether the engine reads the tensors; runs before it computes with what was written to them, on any thread,
        also beside batches. Changes nothing.

        Raises:
            AgentError: it reads other memory, or would refuse to ``refresh``.
        """

    def refresh(self) -> None:
        """Bring up to date what is derived from the tensors; runs after a write, before the engine computes again."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill everything from whole logical tensors (any order, more than needed), and refresh.

        Raises:
            AgentError: a tensor does not fit or did not come. What came before that is written.
        """

    def rebalanced(self, known: str) -> "LiveModel | None":
        """The model anew if experts have moved since its layout had the expert map ``known``, else None."""


@runtime_checkable
class PagedModel(LiveModel, Protocol):
    """A LiveModel whose weights lie in pages, twice. ``standby_tensors`` are the other set, as ``tensors`` are the
    served one: at addresses that stay; empty where there is none, and then ``no_flip`` says why."""

    @property
    def standby_tensors(self) -> Sequence[torch.Tensor]: ...

    @property
    def no_flip(self) -> str: ...

    def flip(self) -> None:
        """What is in standby is served, and what was served is in standby once that has settled; the device is idle
        before and after it."""

    def settle(self) -> None:
        """After a flip, before anything uses standby's addresses; callable on another thread, beside batches.

        Raises:
            StandbyLost: there is no standby any more.
        """


class WeightHolder(Protocol):
    """What an engine asks of the agent of its worker, on the thread that runs its batches."""

    def begin(self, info: InitInfo, /) -> None:
        """Introduce the daemon."""

    def update(self, info: UpdateInfo, /) -> None:
        """One round; returns when its version is committed and raises when it is not."""

    def ready(self, info: SwitchInfo, /) -> str:
        """As ``switchable``, of what batches that are under way do not change: asked before it, beside them.

        Raises:
            AgentError: the engine reads other memory than what it would be switched to.
        """

    def switchable(self, info: SwitchInfo, /) -> str:
        """Why ``switch`` would be refused; empty when it would not. Changes nothing."""

    def switch(self, info: SwitchInfo, /) -> None:
        """Serve what waits in standby; returns when it is in place, and raises when it is not."""

    def around(self, change: Callable[[], T], /) -> T:
        """What ``change`` returns, of which nobody knows what it does to the weights: unless their digest is the same
        afterwards, nothing runs on them before a round has written them anew."""

    def close(self) -> None:
        """The worker ends."""

    @property
    def may_run(self) -> bool:
        """Whether a batch may run; asked before each."""

    @property
    def status(self) -> EngineStatus:
        """What live memory holds."""

    @property
    def held_because(self) -> str:
        """Why the engine is not to be resumed whatever its memory holds; empty when it may be."""

    @property
    def incarnation(self) -> int:
        """Of this process, as the daemon knows it; 0 while it knows none."""

    @property
    def landing(self) -> str:
        """How versions land here, and why so: for people."""

    @property
    def lease(self) -> tuple[float, float] | None:
        """How long a paused engine waits for a silent daemon, and how long it has been silent here, in seconds; None:
        for ever."""


def parse_init_info(body: dict[str, Any]) -> InitInfo:
    """What the server's environment says, and the world that ``body`` gives: it may say the rest again.

    Raises:
        InfoError: a field is missing, unknown or of the wrong type, contradicts the environment, or is the
            environment's alone to say.
    """
    try:
        place = place_of(os.environ)
    except PlaceError as error:
        raise InfoError(str(error)) from error
    if "token_file" in body:
        raise InfoError(f"init_info.token_file: {TOKEN_VARIABLE} of this server says where its token is, nobody else")
    given = {field: value for field in VARIABLES if (value := getattr(place, field))}
    for field, value in given.items():
        if body.get(field, value) != value:
            raise InfoError(
                f"init_info.{field} contradicts {VARIABLES[field]} of the server's environment: this engine belongs to"
                f" {value!r}, and {clean(str(body[field]), 200)!r} was asked; end the daemon that asks, or start the"
                " engine anew with another environment"
            )
    info = _convert({**body, **given, "token_file": str(place.token_file)}, InitInfo, "init_info")
    if place.demo and not is_loopback(info.hub_url):
        raise InfoError(f"init_info.hub_url: {info.hub_url!r} is not on this machine, and this server is a demo on it")
    return info


def parse_update_info(body: dict[str, Any], kind: type[T]) -> T:
    """``body`` as ``kind``.

    Raises:
        InfoError: a field is missing, unknown or of the wrong type.
    """
    return _convert(body, kind, "update_info")


def parse_switch_info(kwargs: Mapping[str, Any]) -> SwitchInfo:
    """``kwargs`` of the call, as JSON brings them.

    Raises:
        InfoError: a field is missing, unknown or of the wrong type.
    """
    return _convert(dict(kwargs), SwitchInfo, "switch")


def synchronize(device: torch.device) -> None:
    """Waits until everything queued on ``device`` is done; not every engine's pause does."""
    torch.get_device_module(device.type).synchronize()


def _convert(body: Any, kind: type[T], name: str) -> T:
    try:
        return msgspec.convert(body, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise InfoError(f"{name}: {error}") from error
