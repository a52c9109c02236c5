"""InferenceAgent: the agent inside one vLLM worker.

vLLM's own RPCs arrive on the worker's main thread (``begin``, ``update``); NIXL and the control channel live on the
agent's thread. Nothing of ours touches the device before the first update call, so graph capture is never disturbed.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from weightsync.agents.inference.window import Update, UpdateFailed, Windows
from weightsync.agents.link.thread import Agent, ControlAddress, Identity
from weightsync.agents.memory.arena import arena, region_of
from weightsync.agents.tables.runs import digest_table, scatter_table, table_bytes
from weightsync.agents.transport.filesystem import load_checkpoint_parts
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.open import open_endpoint
from weightsync.agents.vllm.adapter.common import InitInfo, UpdateInfo, synchronize
from weightsync.agents.vllm.ranks import EngineRanks
from weightsync.agents.vllm.recorder.recorded import Recorded
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.kernels.digest import prepare as prepare_digest
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.codec import cut
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Layout, as_matrix
from weightsync.orchestrator.protocol.markers import BROADCASTS, step_name
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Commit,
    Connect,
    EngineStatus,
    FilesystemSettings,
    FromDaemon,
    Left,
    NixlSettings,
    Quiesced,
    Verified,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

__all__ = ["InferenceAgent", "UpdateFailed"]

log = logging.getLogger(__name__)

STAGING_VARIABLE: Final = "WEIGHTSYNC_STAGING_MIB"
DEFAULT_STAGING_MIB: Final = 64
"""Packed writes land here before they are scattered; small tensors of a large model are a few MiB per rank."""


class InferenceAgent:
    """One worker's agent. Made after the model is loaded, so that its staging memory is in vLLM's own budget.

    Args:
        ranks: from vLLM's parallel configuration.
        device: of the model.
        recorded: the layout of the live weights.
        rebalanced: given the expert map of the layout, the layout anew if experts have moved since, else None.
    """

    def __init__(
        self,
        ranks: EngineRanks,
        device: torch.device,
        recorded: Recorded,
        rebalanced: Callable[[str], Recorded | None] = lambda known: None,
    ) -> None:
        self.ranks = ranks
        self._device = device
        self._rebalanced = rebalanced
        self._staging = self._make_staging()
        warm_up(device)  # a compiler in the first round would cost its engine seconds of silence
        self._adopt(recorded)
        self._windows = Windows()
        self._agent: Agent | None = None
        self._info: InitInfo | None = None
        self._endpoint: NixlEndpoint | None = None
        self._run_dir = ""
        self._reads_files = False

    # --------------------------------------------------------------------------------------- the worker's main thread
    @property
    def status(self) -> EngineStatus:
        """What live memory holds."""
        return self._windows.status

    @property
    def may_run(self) -> bool:
        """Whether a batch may run: live memory holds one whole committed version."""
        return self._windows.may_run

    def begin(self, info: InitInfo) -> None:
        """Start the agent's thread; the same info again does nothing, another one replaces it."""
        if info == self._info and self._agent is not None and self._agent.failure is None:
            return
        if self._agent is not None:
            self._agent.close("replaced by a newer init")
        member = Member("inference", info.engine, self.ranks.rank)
        identity = Identity(info.run_id, member, self.ranks.with_world(info.world).world)
        self._info = info
        address = ControlAddress(info.hub_url, Path(info.token_file))
        self._agent = Agent(identity, address, _Body(self, member), self._agent)
        self._agent.start()

    def update(self, info: UpdateInfo) -> None:
        """One round, on the main thread: stand still, let the weights arrive, verify, leave as the daemon says.

        Raises:
            UpdateFailed: the round was not committed here; ``status`` says what live memory holds now.
        """
        agent = self._agent
        if agent is None:
            raise UpdateFailed("/init_weight_transfer_engine has not been called on this worker")
        if agent.failure is not None:
            raise UpdateFailed(f"the agent of this worker has ended: {agent.failure}")
        self._refuse_moved_experts(agent)
        update = Update(
            RoundName(info.round_epoch, info.round_number), Version(info.generation, info.step), info.deadline_seconds
        )

        def tell(word: object) -> None:
            match word:
                case RoundName():
                    agent.post(lambda: agent.send(Quiesced(round=word)))
                case Verified():
                    agent.post(lambda: agent.send(word))
                case EngineStatus():
                    agent.post(lambda: agent.send(Left(round=update.round, status=word)))

        self._windows.hold(update, self._synchronise, lambda order: self._verify(order, update.version), tell)

    def close(self) -> None:
        """End the agent's thread."""
        if self._agent is not None:
            self._agent.close("the worker ends")

    # ----------------------------------------------------------------------------------------------------- internals
    def _refuse_moved_experts(self, agent: Agent) -> None:
        """Rebalancing (EPLB) between rounds: the plan's targets hold other experts now, so it must be made anew."""
        known = self._layout.expert_map
        fresh = self._rebalanced(known) if known else None
        if fresh is not None:
            self._adopt(fresh)
            agent.post(agent.announce)
            raise UpdateFailed("experts were rebalanced since the plan was made; the layout is announced anew")

    def _adopt(self, recorded: Recorded) -> None:
        self._recorded = recorded
        self._memory = [*recorded.tensors, *self._staging]
        self._layout = self._with_staging(recorded.layout)
        table = digest_table(self._layout.matrix(), self._layout)
        self._digest, self._bytes = prepare_digest(self._memory, table), table_bytes(table)
        self._scatter = self._scattering(b"")

    def _make_staging(self) -> list[torch.Tensor]:
        size = int(os.environ.get(STAGING_VARIABLE, DEFAULT_STAGING_MIB)) * 1024 * 1024
        return [arena(size, self._device)] if size else []

    def _with_staging(self, layout: Layout) -> Layout:
        if not self._staging:
            return layout
        regions = (*layout.regions, *map(region_of, self._staging))
        return Layout(
            tensors=layout.tensors,
            regions=regions,
            rows=layout.rows,
            staging=len(regions) - 1,
            derived=layout.derived,
            expert_map=layout.expert_map,
        )

    def _scattering(self, copies: bytes) -> PreparedCopy:
        table = scatter_table(as_matrix(copies, COPY_COLUMNS), self._layout)
        return prepare_copy(self._memory, self._memory, table)

    def _synchronise(self) -> None:
        synchronize(self._device)

    def _verify(self, order: Verify, version: Version) -> Verified:
        began = time.monotonic()
        try:
            self._apply(version)
            self._synchronise()
            applied = time.monotonic()
            digest = self._digest()
        except Exception as error:
            log.exception("round %s cannot be verified", order.round)
            return Verified(
                round=order.round, digest=(0, 0), bytes=0, apply_seconds=0.0, digest_seconds=0.0, error=cut(repr(error))
            )
        ended = time.monotonic()
        return Verified(
            round=order.round,
            digest=digest,
            bytes=self._bytes,
            apply_seconds=applied - began,
            digest_seconds=ended - applied,
        )

    def _apply(self, version: Version) -> None:
        """What remains once the bytes are here: scatter those that came packed (or read the files), and refresh."""
        if self._reads_files:
            parts = Path(self._run_dir) / BROADCASTS / step_name(version.step)
            self._recorded.load(load_checkpoint_parts(parts))
        else:
            self._scatter()
            self._recorded.refresh()


class _Body:
    """See ``agents.agent.Body``."""

    def __init__(self, owner: InferenceAgent, member: Member) -> None:
        self._owner, self._member = owner, member

    def status(self) -> EngineStatus:
        return self._owner._windows.status

    def welcomed(self, welcome: Welcome) -> None:
        owner = self._owner
        owner._run_dir = welcome.run_dir
        owner._reads_files = isinstance(welcome.transport, FilesystemSettings)
        if isinstance(welcome.transport, NixlSettings) and owner._endpoint is None:
            endpoint = open_endpoint(str(self._member), welcome.transport, owner._device)
            endpoint.register(owner._layout.regions)
            owner._endpoint = endpoint

    def announcement(self) -> tuple[Layout, str, bytes]:
        endpoint = self._owner._endpoint
        if endpoint is None:
            return self._owner._layout, "", b""
        return self._owner._layout, endpoint.name, endpoint.metadata()

    async def connect(self, connect: Connect) -> None:
        self._owner._scatter = self._owner._scattering(connect.copies)

    def heard(self, message: FromDaemon) -> None:
        if isinstance(message, Verify | Commit | Abort):
            self._owner._windows.heard(message)

    def poll(self) -> bool:
        if self._owner._endpoint is not None:
            self._owner._endpoint.poll()
        return self._owner._windows.status.window is not None

    def shut(self) -> None:
        pass  # the endpoint outlives a connection: writers may still reach this memory until the process ends
