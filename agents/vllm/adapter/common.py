"""vLLM's weight-transfer engine of our backend: what its versions have in common.

vLLM makes one in every worker after the model is loaded and before it profiles memory, and its RPCs call it on the
worker's main thread. It owns the ``InferenceAgent`` of the worker and hands everything on to it. What differs between
versions of vLLM is in ``lifecycle`` and ``callback``; ``choose`` chooses.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec import structs
from weightsync.agents.inference.calls import WeightHolder
from weightsync.agents.inference.landing import ALONE, Peers
from weightsync.agents.inference.modes import wanted_mode
from weightsync.agents.inference.standby import StandbyPages
from weightsync.agents.memory.pages.paged import Pages
from weightsync.agents.memory.reach import check_reachable
from weightsync.agents.recorder.left_out import left_out
from weightsync.agents.vllm import gate, guard, hold, paging, probe
from weightsync.agents.vllm.backend import ADAPTER_VARIABLE, logger
from weightsync.agents.vllm.holders import balancer
from weightsync.agents.vllm.lora import hook
from weightsync.agents.vllm.lora.declared import AdapterRefused, declared
from weightsync.agents.vllm.lora.served import ServedAdapter
from weightsync.agents.vllm.peers import CoreRanks
from weightsync.agents.vllm.ranks import EngineRanks, engine_ranks
from weightsync.agents.vllm.recorder.recorded import Recorded, expert_map, models_of, recorded_layout, targets_of
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Layout


@dataclass(frozen=True, slots=True)
class VllmModel:
    """A vLLM model as ``inference.calls.LiveModel``: the layout that was recorded while it was loaded.

    ``unprobed``: parameters of which nobody could look whether they are read, with the reason; the layout names them,
    and all else that rounds leave out. ``pages``: hold the weights, if versions are to be switched to by remapping.
    """

    module: torch.nn.Module
    vllm_config: Any
    recorded: Recorded
    unprobed: Mapping[str, str]
    layout: Layout
    pages: Pages | None = None
    standby: StandbyPages | None = None
    no_flip: str = ""

    @classmethod
    def of(
        cls, module: torch.nn.Module, vllm_config: Any, peers: Peers = ALONE, *, lone_experts: bool = True
    ) -> "VllmModel":
        """The model with its layout as it is now, after a look at each kind of layer.

        ``lone_experts``: whether this vLLM's expert layers can be run by themselves.

        Raises:
            RecordError: the layout is not known.
            MemoryPlacementError: its weights lie where no writer can reach them, or cannot lie in pages.
            UnreadWeights: its layers compute with something else than what a round writes.
        """
        recorded = recorded_layout(module, vllm_config)
        placed = paging.place(recorded.tensors, arena_bytes(recorded.layout), wanted_mode(), peers)
        if placed.pages is None:
            check_reachable(recorded.layout.regions)  # on the agent's thread only the daemon's coming would tell
        else:
            recorded = recorded_layout(module, vllm_config)  # at its new addresses
        unprobed: dict[str, str] = {}
        for model in models_of(module):
            context = vllm_config if lone_experts else None
            unprobed |= probe.require(model, targets_of(model), recorded.refresh, context)
        return cls._of(module, vllm_config, recorded, unprobed, placed)

    @classmethod
    def _of(
        cls,
        module: torch.nn.Module,
        vllm_config: Any,
        recorded: Recorded,
        unprobed: Mapping[str, str],
        placed: paging.Placed,
    ) -> "VllmModel":
        layout, pages = _with_left_out(recorded, unprobed), placed.pages
        if not balancer.may_move(vllm_config):  # its rows say all, and nobody asks the device in a switch or to lend
            layout = structs.replace(layout, expert_map="")
        standby = None if pages is None else StandbyPages(pages, layout, recorded.tensors)
        return cls(module, vllm_config, recorded, unprobed, layout, pages, standby, placed.why_not)

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        return self.recorded.tensors

    def check(self) -> None:
        self.recorded.check()

    def refresh(self) -> None:
        self.recorded.refresh()

    @property
    def standby_tensors(self) -> Sequence[torch.Tensor]:
        return () if self.standby is None else self.standby.tensors

    def flip(self) -> None:
        assert self.standby is not None, "only a model with standby tensors is flipped"
        self.standby.flip()

    def settle(self) -> None:
        assert self.standby is not None, "only a model with standby tensors is flipped"
        self.standby.settle()

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.recorded.load(weights)

    def rebalanced(self, known: str) -> "VllmModel | None":
        if expert_map(self.module) == known:
            return None
        fresh = recorded_layout(self.module, self.vllm_config)
        return self._of(self.module, self.vllm_config, fresh, self.unprobed, paging.Placed(self.pages, self.no_flip))


def _with_left_out(recorded: Recorded, unprobed: Mapping[str, str]) -> Layout:
    names = {tensor.name for tensor in recorded.layout.tensors}
    return structs.replace(
        recorded.layout, left_out=left_out(recorded.unrecorded, recorded.unused, unprobed, needed=names)
    )


def make_agent(
    ranks: EngineRanks,
    model: torch.nn.Module,
    device: torch.device,
    vllm_config: Any,
    boundary: bool = True,
    *,
    lone_experts: bool = True,
) -> WeightHolder:
    """The agent of this worker, with the layout of ``model`` recorded and its landing memory allocated.

    ``boundary``: see ``InferenceAgent``; ``lone_experts``: see ``VllmModel``.
    """
    from weightsync.agents.inference.agent import InferenceAgent

    peers = CoreRanks.here()
    live = _adapter(model, device, vllm_config) or VllmModel.of(model, vllm_config, peers, lone_experts=lone_experts)
    return InferenceAgent(ranks, device, live, balancer.drain, boundary, peers)


def _adapter(model: torch.nn.Module, device: torch.device, vllm_config: Any) -> ServedAdapter | None:
    """The adapter that rounds write in place of the model; None without one.

    Raises:
        AdapterRefused: it cannot be, in this server.
    """
    found = declared()
    if found is None:
        return None
    settings = getattr(vllm_config, "lora_config", None)
    dtype = getattr(settings, "lora_dtype", None)
    if not isinstance(dtype, torch.dtype):
        raise AdapterRefused(
            f"adapter {found.name!r} is written by rounds ({ADAPTER_VARIABLE}), and lora_config.lora_dtype is"
            f" {dtype!r}; start the server with --enable-lora"
        )
    served = ServedAdapter(found, [name for name, _ in model.named_parameters()], dtype, device)
    check_reachable(served.layout.regions)
    hook.serve(served)
    return served


def equip(
    model: torch.nn.Module,
    device: torch.device,
    parallel_config: Any,
    vllm_config: Any,
    *,
    lone_experts: bool = True,
) -> tuple[EngineRanks, WeightHolder]:
    """What every adapter's constructor does: gate, ranks and agent, or a refusal to start.

    Args:
        vllm_config: that the model was loaded with.
        lone_experts: see ``VllmModel``.

    Raises:
        PlaceError: the server's environment does not say whose it is.
        GuardUnavailable: nothing would stand before the server's admin routes.
        HoldUnavailable, GateUnavailable: this vLLM cannot be kept from answering with uncommitted weights.
        RanksError: the parallel configuration contradicts itself.
        UnreadWeights: its layers compute with something else than what a round writes.
        MemoryPlacementError: its weights lie where no writer can reach them.
        RecordError: the model's layout is not known.
    """
    _log_where_vllm_does()
    guard.require()
    hold.require()
    gate.install()
    ranks = engine_ranks(parallel_config)
    # Replicas of a dense model are engines of their own to vLLM; those of a mixture of experts meet in every step.
    boundary = parallel_config.data_parallel_size == 1
    agent = make_agent(ranks, model, device, vllm_config, boundary, lone_experts=lone_experts)
    logger.info("weightsync: agent of rank %d ready on %s; waiting for the daemon", ranks.rank, device)
    return ranks, agent


def _log_where_vllm_does() -> None:
    """Our lines belong into the server's log; vLLM gives handlers to its own logger only."""
    ours, theirs = logging.getLogger("weightsync"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)
