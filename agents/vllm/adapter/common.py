"""vLLM's weight-transfer engine of our backend: what its versions have in common.

vLLM makes one in every worker after the model is loaded and before it profiles memory, and its RPCs call it on the
worker's main thread. It owns the ``InferenceAgent`` of the worker and hands everything on to it. What differs between
versions of vLLM is in ``engine_lifecycle`` and ``engine_callback``; ``engine_adapter`` chooses.
"""

import logging
import os
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec
import torch
from weightsync.agents.vllm import gate, hold
from weightsync.agents.vllm.backend import logger
from weightsync.agents.vllm.ranks import EngineRanks, engine_ranks

ENVIRONMENT: Final = {
    "hub_url": "WEIGHTSYNC_HUB_URL",
    "token_file": "WEIGHTSYNC_TOKEN_FILE",
    "run_id": "WEIGHTSYNC_RUN_ID",
    "engine": "WEIGHTSYNC_ENGINE",
}
"""Fields of ``init_info`` that the environment may give. It then wins: vLLM's admin routes ask for no password, and
whoever reaches them must not be able to send the agent, with its token, to another hub."""

T = TypeVar("T")
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class InfoError(ValueError):
    """``init_info`` or ``update_info`` is not what this version of weightsync understands. The caller's fault."""


class InitInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/init_weight_transfer_engine``: how the agent of each worker reaches its daemon.

    ``engine`` is the name of this server in the fleet, ``world`` its number of ranks over all data-parallel replicas,
    as ``GET /get_world_size`` tells it. ``deadline_seconds`` bounds each attempt to connect.
    """

    hub_url: Text
    token_file: Text
    run_id: Text
    engine: Text
    deadline_seconds: Seconds
    world: Annotated[int, msgspec.Meta(ge=1)]


class UpdateInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/update_weights``: one round in this engine.

    ``token`` names the call in logs; the round makes it idempotent; ``generation`` and ``step`` name the version. The
    call returns within ``deadline_seconds``.
    """

    token: Text
    round_epoch: Natural
    round_number: Natural
    generation: Natural
    step: Natural
    deadline_seconds: Seconds


class Agent(Protocol):
    """What an engine asks of the agent of its worker (``weightsync.agents.inference.agent.InferenceAgent``).

    ``begin`` takes an ``InitInfo``, ``update`` an ``UpdateInfo``.
    """

    def begin(self, info: Any, /) -> None: ...
    def update(self, info: Any, /) -> None: ...
    def close(self) -> None: ...
    @property
    def may_run(self) -> bool: ...
    @property
    def status(self) -> Any: ...


def make_agent(ranks: EngineRanks, model: torch.nn.Module, device: torch.device, vllm_config: Any) -> Agent:
    """The agent of this worker, with the layout of ``model`` recorded and its staging memory allocated."""
    from weightsync.agents.inference.agent import InferenceAgent
    from weightsync.agents.vllm.recorder.recorded import Recorded, expert_map_fingerprint, recorded_layout

    def rebalanced(known: str) -> Recorded | None:
        return recorded_layout(model, vllm_config) if expert_map_fingerprint(model) != known else None

    return InferenceAgent(ranks, device, recorded_layout(model, vllm_config), rebalanced)


def equip(
    model: torch.nn.Module, device: torch.device, parallel_config: Any, vllm_config: Any = None
) -> tuple[EngineRanks, Agent]:
    """What every adapter's constructor does: gate, ranks and agent, or a refusal to start.

    Args:
        vllm_config: where the adapter knows it; it only makes errors clearer.

    Raises:
        HoldUnavailable, GateUnavailable: this vLLM cannot be kept from answering with uncommitted weights.
        RanksError: the parallel configuration contradicts itself.
        RecordError: the model's layout is not known.
    """
    _log_where_vllm_does()
    hold.require()
    gate.install()
    ranks = engine_ranks(parallel_config)
    agent = make_agent(ranks, model, device, vllm_config)
    logger.info("weightsync: agent of rank %d ready on %s; waiting for the daemon", ranks.rank, device)
    return ranks, agent


def parse_init_info(body: dict[str, Any]) -> InitInfo:
    """``body`` with what the environment gives.

    Raises:
        InfoError: a field is missing, unknown or of the wrong type, or contradicts the environment.
    """
    given = {field: value for field, name in ENVIRONMENT.items() if (value := os.environ.get(name))}
    for field, value in given.items():
        if body.get(field, value) != value:
            raise InfoError(f"init_info.{field} contradicts {ENVIRONMENT[field]} of the server's environment")
    return _convert({**body, **given}, InitInfo, "init_info")


def parse_update_info(body: dict[str, Any], kind: type[T]) -> T:
    """``body`` as ``kind``.

    Raises:
        InfoError: a field is missing, unknown or of the wrong type.
    """
    return _convert(body, kind, "update_info")


def synchronize(device: torch.device) -> None:
    """Waits until everything queued on ``device`` is done; not every vLLM's pause does."""
    torch.get_device_module(device.type).synchronize()


def _log_where_vllm_does() -> None:
    """Our lines belong into the server's log; vLLM gives handlers to its own logger only."""
    ours, theirs = logging.getLogger("weightsync"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)


def _convert(body: Any, kind: type[T], name: str) -> T:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise InfoError(f"{name}: {error}") from error
