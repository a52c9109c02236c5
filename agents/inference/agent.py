"""InferenceAgent: the agent inside one worker of an inference engine.

The engine calls ``begin`` and ``update`` on the worker's main thread, the one that runs its batches; the transport and
the control channel live on the agent's thread. Nothing of ours touches the device before the first update, so graph
capture is never disturbed.
"""

import logging
import os
import time
from pathlib import Path
from typing import Final

import torch
from weightsync.agents.errors import blame
from weightsync.agents.inference.calls import InitInfo, LiveModel, Ranks, UpdateInfo, synchronize
from weightsync.agents.inference.thread_side import InferenceSide
from weightsync.agents.inference.weights import LiveWeights, staging_arenas
from weightsync.agents.inference.window import Update, UpdateFailed, Windows
from weightsync.agents.link.thread import AgentThread, ControlAddress, Identity
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.codec import cut
from weightsync.orchestrator.protocol.messages import EngineStatus, Left, Quiesced, Verified, Verify
from weightsync.orchestrator.protocol.names import NO_BYTES, Member, RoundName, Version

__all__ = ["InferenceAgent", "UpdateFailed"]

log = logging.getLogger(__name__)

STAGING_VARIABLE: Final = "WEIGHTSYNC_STAGING_MIB"
DEFAULT_STAGING_MIB: Final = 64
"""Packed writes land here before they are scattered; small tensors of a large model are a few MiB per rank."""


class InferenceAgent:
    """One worker's agent. Made after the model is loaded, so that its staging memory is in the engine's own budget.

    Everything public is for the worker's main thread; ``status`` and ``may_run`` may be read on any.

    Args:
        ranks: the worker's place in its engine.
        device: of the model.
        model: the live weights and their layout.
    """

    def __init__(self, ranks: Ranks, device: torch.device, model: LiveModel) -> None:
        self.ranks = ranks
        self._device = device
        staging = int(os.environ.get(STAGING_VARIABLE, DEFAULT_STAGING_MIB)) * 1024 * 1024
        arenas = tuple(staging_arenas(staging, device))
        warm_up(device)  # a compiler in the first round would cost its engine seconds of silence
        self._weights = LiveWeights(model, device, arenas)
        self._windows = Windows()
        self._agent: AgentThread[InferenceSide] | None = None
        self._info: InitInfo | None = None

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
        side = InferenceSide(member, self._weights, self._windows)
        self._agent = AgentThread(identity, address, lambda thread: side, self._agent)
        self._agent.start()

    def update(self, info: UpdateInfo) -> None:
        """One round, on the main thread: stand still, let the weights arrive, verify, leave as the daemon says.

        Raises:
            UpdateFailed: the round was not committed here; ``status`` says what live memory holds now.
        """
        agent = self._agent
        if agent is None:
            raise UpdateFailed("no daemon has been introduced to this worker yet")
        if agent.failure is not None:
            raise UpdateFailed(f"the agent of this worker has ended: {agent.failure}")
        if self._weights.follow_experts():
            # The plan's targets hold other experts now, so it must be made anew before any byte is granted.
            agent.post(agent.announce)
            raise UpdateFailed("experts were rebalanced since the plan was made; the layout is announced anew")
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

        self._windows.serve_round(update, self._synchronise, lambda order: self._verify(order, update.version), tell)

    def close(self) -> None:
        """End the agent's thread."""
        if self._agent is not None:
            self._agent.close("the worker ends")

    # ----------------------------------------------------------------------------------------------------- internals
    def _synchronise(self) -> None:
        synchronize(self._device)

    def _verify(self, order: Verify, version: Version) -> Verified:
        began = time.monotonic()
        try:
            self._weights.arrive(version)
            self._synchronise()
            applied = time.monotonic()
            digest = self._weights.digest()
        except Exception as error:  # the daemon decides what a rank that cannot verify means for the version
            log.exception("round %s cannot be verified", order.round)
            fault, retry = blame(error, "engine")
            return Verified(
                round=order.round,
                digest=NO_BYTES,
                bytes=0,
                apply_seconds=0.0,
                digest_seconds=0.0,
                error=cut(repr(error)),
                fault=fault,
                retry=retry,
            )
        ended = time.monotonic()
        return Verified(
            round=order.round,
            digest=digest,
            bytes=self._weights.bytes,
            apply_seconds=applied - began,
            digest_seconds=ended - applied,
        )
